// The kernels, written once over the operations of a simd_<isa>-inl.h class S:
//
//   small   weights stay packed and are unpacked in the inner loop (M = 1 and small M: bound by memory)
//   large   a panel of blocks is unpacked to bytes once and then serves all rows (bound by arithmetic)
//   exact   levels as floats times fp32 activations
//
// Per output:  y = bias + sum over spans of  scale * sx * I,   I = a * sum(code * q) + b * sum(q)   in int32.
#pragma once

#include "qlinear.h"
#include "quantize-inl.h"
#include "simd_common-inl.h"

namespace lowbit {
namespace {

// Where weight vectors come from. A vector holds kPositions rows of 16 outputs x 4 inputs.
template <class S, int kBits_, bool kLookup_>
struct Packed {
  static constexpr int kBits = kBits_, kPositions = positions(kBits), kPerTile = vectors_per_tile(kBits);
  static constexpr bool kLookup = kLookup_, kMaskable = !kLookup && kBits < 8;
  static constexpr Operand kOperand = S::operand(kBits, kLookup);

  template <int kRow>
  static LOWBIT_INLINE typename S::Bytes row(const typename S::Bytes& x, const typename S::Lut& lut) {
    if constexpr (kBits == 8) {
      return S::operand8(x);
    } else if constexpr (kLookup && S::kLooksUpPacked) {
      return S::template lookup_packed<kBits, kRow>(x, lut);
    } else if constexpr (kLookup) {
      return S::lookup(S::template codes<kBits, kRow>(x), lut);
    } else {
      return S::template codes<kBits, kRow>(x);
    }
  }
  // Moved down by whole steps of kStep positions only.
  template <int kRow, int kStep>
  static LOWBIT_INLINE typename S::Bytes row_in_place(const typename S::Bytes& x,
                                                      const typename S::Lut& lut) {
    if constexpr (kMaskable && kStep > 1) {
      constexpr int kDown = kRow / kStep * kStep;
      return S::template codes_in_place<kBits, kRow - kDown>(S::template move_down<kDown * kBits>(x));
    } else {
      return row<kRow>(x, lut);
    }
  }
};

// Brings the packed weights of kBlocks blocks that are multiplied next to L2, a few lines at a time beside the products
// of those before, or unpacking would wait for them.
template <int kBlocks>
class Prefetcher {
 public:
  // stride: bytes between the blocks. lines: of a block. steps: how often step() will be called.
  void start(const uint8_t* at, int64_t stride, int64_t lines, int64_t steps) {
    at_ = at;
    stride_ = stride;
    left_ = lines;
    quota_ = ceil_div(lines, steps);
  }
  LOWBIT_INLINE void step() {
    const int64_t quota = least(quota_, left_);
    left_ -= quota;
    for (const uint8_t* end = at_ + quota * kVectorBytes; at_ < end; at_ += kVectorBytes) {
      unroll<kBlocks>([&](auto n) LOWBIT_LAMBDA { __builtin_prefetch(at_ + n * stride_, 0, 2); });
    }
  }

 private:
  const uint8_t* at_ = nullptr;
  int64_t stride_ = 0, left_ = 0, quota_ = 0;  // lines of a block
};

// kM rows x kN blocks of the output: where their operands are.
template <int kM, int kN>
struct Cell {
  const uint8_t* w[kN];  // first vector of each block
  int64_t w_stride;      // bytes between a block's vectors
  const int8_t* x[kM];   // rows of activations
  int64_t row[kM];       // clamped row numbers
  int64_t block;
  int rows, blocks;  // how many of kM, kN exist; the others repeat the last one and are not stored
};

template <class S>
LOWBIT_INLINE typename S::F32 load_bias(const Job& job, int64_t block) {
  if (job.bias == nullptr) return S::zero_f32();
  return S::load_f32(job.bias + block * kTileN, static_cast<int>(least(kTileN, job.w.n - block * kTileN)));
}

// The outputs so far; at first, the bias.
template <class S, int kM, int kN>
LOWBIT_INLINE void load_cell(const Job& job, const Cell<kM, kN>& cell, bool at_first,
                             typename S::F32 (&y)[kM][kN]) {
  unroll<kM * kN>([&](auto c) LOWBIT_LAMBDA {
    constexpr int m = decltype(c)::value / kN, n = decltype(c)::value % kN;
    const int64_t block = cell.block + least(n, cell.blocks - 1), first = block * kTileN;
    y[m][n] = at_first ? load_bias<S>(job, block)
                       : S::load_f32(job.y + cell.row[m] * job.y_stride + first,
                                     static_cast<int>(least(kTileN, job.w.n - first)));
  });
}

template <class S, int kM, int kN>
LOWBIT_INLINE void store_cell(const Job& job, const Cell<kM, kN>& cell, const typename S::F32 (&y)[kM][kN]) {
  unroll<kM * kN>([&](auto c) LOWBIT_LAMBDA {
    constexpr int m = decltype(c)::value / kN, n = decltype(c)::value % kN;
    if (m >= cell.rows || n >= cell.blocks) return;
    const int64_t first = (cell.block + n) * kTileN;
    S::store_f32(job.y + cell.row[m] * job.y_stride + first, y[m][n],
                 static_cast<int>(least(kTileN, job.w.n - first)));
  });
}

template <int kM, int kN>
LOWBIT_INLINE void place(Cell<kM, kN>& cell, const Job& job, int64_t block, int blocks, int64_t row,
                         int rows) {
  cell.block = block;
  cell.blocks = blocks;
  cell.rows = rows;
  for (int m = 0; m < kM; ++m) {
    cell.row[m] = row + least(m, rows - 1);
    cell.x[m] = job.act.q == nullptr ? nullptr : job.act.at(cell.row[m], 0);
  }
}

}  // namespace
}  // namespace lowbit
