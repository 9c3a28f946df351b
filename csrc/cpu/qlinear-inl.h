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

// Already unpacked by unpack_panel().
template <class S, Operand kOperand_>
struct Plain {
  static constexpr int kBits = 8, kPositions = 1, kPerTile = vectors_per_tile(8);
  static constexpr bool kMaskable = false;
  static constexpr Operand kOperand = kOperand_;

  template <int kRow>
  static LOWBIT_INLINE typename S::Bytes row(const typename S::Bytes& x, const typename S::Lut&) {
    return x;
  }
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

// total[m][n] = sum over vectors [begin, end) of operand * q, exact in int32.
//
// Shift-free where registers allow: the code of position i is masked but not shifted, and position i has its
// own accumulator. Each partial sum is a multiple of 2^(i * bits), so one arithmetic shift at the end is
// exact.
template <class S, class Source, int kM, int kN>
LOWBIT_INLINE void dot_span(const Cell<kM, kN>& cell, int64_t begin, int64_t end, const typename S::Lut& lut,
                            typename S::I32 (&total)[kM][kN]) {
  constexpr int kP = Source::kPositions;
  constexpr bool kInPlace = Source::kMaskable && kM * kN * kP <= S::kAccumulators;
  constexpr int kA = kInPlace ? kP : 1;
  typename S::I32 acc[kM][kN][kA];
  unroll<kM * kN * kA>([&](auto i)
                           LOWBIT_LAMBDA { acc[i / (kN * kA)][i / kA % kN][i % kA] = S::zero_i32(); });

  for (int64_t v = begin; v < end; ++v) {
    typename S::Bytes raw[kN];
    unroll<kN>([&](auto n) LOWBIT_LAMBDA { raw[n] = S::load(cell.w[n] + v * cell.w_stride); });
    unroll<kP>([&](auto i) LOWBIT_LAMBDA {
      constexpr int kRow = decltype(i)::value;
      typename S::Bytes w[kN];
      unroll<kN>([&](auto n) LOWBIT_LAMBDA {
        if constexpr (kInPlace) {
          w[n] = S::template codes_in_place<Source::kBits, kRow>(raw[n]);
        } else {
          w[n] = Source::template row<kRow>(raw[n], lut);
        }
      });
      unroll<kM>([&](auto m) LOWBIT_LAMBDA {
        const typename S::X4 x = S::broadcast4(cell.x[m] + 4 * (v * kP + kRow));
        unroll<kN>([&](auto n) LOWBIT_LAMBDA {
          auto& a = acc[m][n][kInPlace ? kRow : 0];
          a = S::template dot<Source::kOperand>(a, w[n], x);
        });
      });
    });
  }
  unroll<kM * kN>([&](auto c) LOWBIT_LAMBDA {
    constexpr int m = decltype(c)::value / kN, n = decltype(c)::value % kN;
    total[m][n] = acc[m][n][0];
    if constexpr (kInPlace) {
      unroll<kA - 1>([&](auto i) LOWBIT_LAMBDA {
        total[m][n] = S::add(total[m][n], S::template shift_right<(i + 1) * Source::kBits>(acc[m][n][i + 1]));
      });
    }
  });
}

template <class S>
LOWBIT_INLINE typename S::F32 load_bias(const Job& job, int64_t block) {
  if (job.bias == nullptr) return S::zero_f32();
  return S::load_f32(job.bias + block * kTileN, static_cast<int>(least(kTileN, job.w.n - block * kTileN)));
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

template <class S, class Source, int kM, int kN>
void int8_cell(const Job& job, const Cell<kM, kN>& cell, const typename S::Lut& lut) {
  const Matrix& w = job.w;
  const int64_t spans = w.spans(), per_span = w.span_tiles() * Source::kPerTile;
  const int64_t vectors = w.tiles_k() * Source::kPerTile;
  const int32_t a = Source::kOperand == Operand::kCode ? w.a : 1;
  const int32_t b = Source::kOperand == Operand::kCode ? w.b : -128;
  typename S::F32 y[kM][kN];
  unroll<kM * kN>([&](auto c) LOWBIT_LAMBDA {
    y[c / kN][c % kN] = load_bias<S>(job, cell.block + least(c % kN, cell.blocks - 1));
  });

  for (int64_t s = 0; s < spans; ++s) {
    typename S::I32 total[kM][kN];
    dot_span<S, Source, kM, kN>(cell, s * per_span, least(vectors, (s + 1) * per_span), lut, total);
    typename S::F32 scale[kN];
    unroll<kN>([&](auto n) LOWBIT_LAMBDA {
      scale[n] = S::load_half(w.scales + ((cell.block + least(n, cell.blocks - 1)) * spans + s) * kTileN);
    });
    unroll<kM>([&](auto m) LOWBIT_LAMBDA {
      const int64_t at = cell.row[m] * spans + s;
      const typename S::F32 sx = S::set1(job.act.scale[at]);
      unroll<kN>([&](auto n) LOWBIT_LAMBDA {
        typename S::I32 t = total[m][n];
        if constexpr (Source::kOperand != Operand::kLevel) {
          t = S::affine(
              t, a, static_cast<int32_t>(static_cast<uint32_t>(b) * static_cast<uint32_t>(job.act.sum[at])));
        }
        y[m][n] = S::fmadd(S::to_f32(t), S::mul(scale[n], sx), y[m][n]);
      });
    });
  }
  store_cell<S, kM, kN>(job, cell, y);
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

// Blocks [block, block + blocks) as operand bytes, interleaved: panel[row of 4 inputs][kPanelBlocks][64].
template <class S, int kBits, bool kLookup>
void unpack_panel(const Matrix& w, int64_t block, int blocks, uint8_t* panel) {
  using Source = Packed<S, kBits, kLookup>;
  typename S::Lut lut{};
  if constexpr (kLookup) lut = S::load_lut(w.levels);
  const int64_t vectors = w.tiles_k() * Source::kPerTile;
  for (int n = 0; n < blocks; ++n) {
    const uint8_t* from = w.tiles + (block + n) * w.block_bytes();
    uint8_t* to = panel + n * kVectorBytes;
    for (int64_t v = 0; v < vectors; ++v) {
      const typename S::Bytes raw = S::load(from + v * kVectorBytes);
      unroll<Source::kPositions>([&](auto i) LOWBIT_LAMBDA {
        constexpr int kRow = decltype(i)::value;
        S::store(to, Source::template row<kRow>(raw, lut));
        to += S::kPanelBlocks * kVectorBytes;
      });
    }
  }
}

template <class S, int kBits, bool kLookup>
void int8_large(const Job& job, Range blocks, Range rows, uint8_t* scratch) {
  constexpr int kM = S::kPanelRows, kN = S::kPanelBlocks;
  using Source = Plain<S, S::operand(kBits, kLookup)>;
  Cell<kM, kN> cell;
  cell.w_stride = kN * kVectorBytes;
  for (int64_t block = blocks.begin; block < blocks.end; block += kN) {
    const int count = static_cast<int>(least(kN, blocks.end - block));
    unpack_panel<S, kBits, kLookup>(job.w, block, count, scratch);
    for (int n = 0; n < kN; ++n) cell.w[n] = scratch + least(n, count - 1) * kVectorBytes;
    for (int64_t m = rows.begin; m < rows.end; m += kM) {
      place(cell, job, block, count, m, static_cast<int>(least(kM, rows.end - m)));
      int8_cell<S, Source, kM, kN>(job, cell, typename S::Lut{});
    }
  }
}

}  // namespace
}  // namespace lowbit
