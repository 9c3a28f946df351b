// fp32 activations: y = bias + sum over spans of scale * sum(level * x). The oracle's twin.
#pragma once

#include "gemm-inl.h"
#include "gemv-inl.h"

namespace lowbit {
namespace {

// Partial sums are folded this often, so that rounding grows with kChunkTiles * 64 + K / (kChunkTiles * 64),
// not K.
constexpr int64_t kChunkTiles = 8;

// part[m][n] = sum over vectors [begin, end) of level * x. kSplit accumulators each hide the FMA latency.
template <class S, int kBits, int kM, int kN>
LOWBIT_INLINE void exact_span(const Cell<kM, kN>& cell, const float* const (&x)[kM], int64_t begin,
                              int64_t end, int64_t block_bytes, const typename S::Levels& levels,
                              typename S::F32 (&part)[kM][kN]) {
  constexpr int kP = positions(kBits), kSplit = kM == 1 ? 4 : kM == 2 ? 2 : 1;
  typename S::F32 acc[kSplit][kM][kN];
  unroll<kSplit * kM * kN>([&](auto i)
                               LOWBIT_LAMBDA { acc[i / (kM * kN)][i / kN % kM][i % kN] = S::zero_f32(); });

  const int64_t turn = block_bytes - kPrefetch, jump = kPrefetch + (kN - 1) * block_bytes;  // see gemv-inl.h
  for (int64_t v = begin; v < end; ++v) {
    const int64_t at = v * kVectorBytes, ahead = at < turn ? kPrefetch : jump;
    typename S::Bytes raw[kN];
    unroll<kN>([&](auto n) LOWBIT_LAMBDA {
      __builtin_prefetch(cell.w[n] + at + ahead);
      raw[n] = S::load(cell.w[n] + at);
    });
    unroll<4 * kP>([&](auto i) LOWBIT_LAMBDA {
      constexpr int kRow = decltype(i)::value / 4, kJ = decltype(i)::value % 4;
      typename S::F32 w[kN];
      unroll<kN>([&](auto n) LOWBIT_LAMBDA {
        w[n] = S::template level<kBits, 8 * kJ + kRow * kBits>(raw[n], levels);
      });
      unroll<kM>([&](auto m) LOWBIT_LAMBDA {
        const typename S::F32 xm = S::set1(x[m][4 * (v * kP + kRow) + kJ]);
        unroll<kN>([&](auto n) LOWBIT_LAMBDA {
          auto& a = acc[kJ % kSplit][m][n];
          a = S::fmadd(w[n], xm, a);
        });
      });
    });
  }
  unroll<kM * kN>([&](auto c) LOWBIT_LAMBDA {
    constexpr int m = decltype(c)::value / kN, n = decltype(c)::value % kN;
    part[m][n] = acc[0][m][n];
    unroll<kSplit - 1>([&](auto i) LOWBIT_LAMBDA { part[m][n] = S::add(part[m][n], acc[i + 1][m][n]); });
  });
}

template <class S, int kBits, int kM, int kN>
void exact_cell(const Job& job, const Cell<kM, kN>& cell, const typename S::Levels& levels) {
  const Matrix& w = job.w;
  constexpr int64_t kPerTile = vectors_per_tile(kBits);
  const int64_t spans = w.spans(), tiles = w.tiles_k(), span_tiles = w.span_tiles();
  const float* x[kM];
  for (int m = 0; m < kM; ++m) x[m] = job.x_tiled + cell.row[m] * job.x_tiled_stride;
  typename S::F32 y[kM][kN];
  unroll<kM * kN>([&](auto c) LOWBIT_LAMBDA { y[c / kN][c % kN] = S::zero_f32(); });

  for (int64_t s = 0; s < spans; ++s) {
    const int64_t end = least(tiles, (s + 1) * span_tiles);
    typename S::F32 scale[kN];
    unroll<kN>([&](auto n) LOWBIT_LAMBDA {
      scale[n] = S::load_half(w.scales + ((cell.block + least(n, cell.blocks - 1)) * spans + s) * kTileN);
    });
    for (int64_t t = s * span_tiles; t < end; t += kChunkTiles) {
      typename S::F32 part[kM][kN];
      exact_span<S, kBits, kM, kN>(cell, x, t * kPerTile, least(end, t + kChunkTiles) * kPerTile,
                                   w.block_bytes(), levels, part);
      unroll<kM * kN>([&](auto c) LOWBIT_LAMBDA {
        auto& to = y[c / kN][c % kN];
        to = S::fmadd(part[c / kN][c % kN], scale[c % kN], to);
      });
    }
  }
  unroll<kM * kN>([&](auto c) LOWBIT_LAMBDA {
    auto& to = y[c / kN][c % kN];
    to = S::add(to, load_bias<S>(job, cell.block + least(c % kN, cell.blocks - 1)));
  });
  store_cell<S, kM, kN>(job, cell, y);
}

template <class S, int kBits, int kM>
__attribute__((noinline)) void exact_rows(const Job& job, Range blocks, int64_t row, int rows) {
  constexpr int kN = kM > 2 ? S::kExactBlocks : 2;
  typename S::Levels levels{};
  if constexpr (kBits < 8) levels = S::load_levels(job.w.levels);
  Cell<kM, kN> cell;
  for (int64_t block = blocks.begin; block < blocks.end; block += kN) {
    place(cell, job, block, static_cast<int>(least(kN, blocks.end - block)), row, rows);
    for (int n = 0; n < kN; ++n) {
      cell.w[n] = job.w.tiles + (block + least(n, cell.blocks - 1)) * job.w.block_bytes();
    }
    exact_cell<S, kBits, kM, kN>(job, cell, levels);
  }
}

template <class S, int kBits>
void exact(const Job& job, Range blocks, Range rows, uint8_t* /*scratch*/) {
  for (int64_t block = blocks.begin; block < blocks.end; block += kBlocksAtATime) {
    const Range some{block, least(block + kBlocksAtATime, blocks.end)};
    for (int64_t m = rows.begin; m < rows.end; m += S::kMaxRows) {
      const int count = static_cast<int>(least(rows.end - m, S::kMaxRows));
      // With 16 registers, three rows take longer than four: an accumulator less hides less latency, or more spill.
      const int64_t kind = S::kMaxRows == 4 && count == 3 ? 4 : count;
      with_constant<1, S::kMaxRows>(kind, [&](auto kM) { exact_rows<S, kBits, kM>(job, some, m, count); });
    }
  }
}

template <class S, int kBits>
constexpr KernelSet kernel_set() {
  KernelSet set{};
  set.small = int8_small<S, kBits, false>;
  set.large = {int8_large<S, kBits, false>, nullptr, panel_bytes<S>, S::kPanelBlocks, false, false};
  if constexpr (kBits == 2 || kBits == 4) {  // two levels are always affine; 8-bit levels are code - 128
    set.small_lookup = int8_small<S, kBits, true>;
    set.large.lookup = int8_large<S, kBits, true>;
  }
  set.exact = exact<S, kBits>;
  set.quantize = quantize_rows<S>;
  return set;
}

}  // namespace
}  // namespace lowbit
