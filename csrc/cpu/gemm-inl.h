// GEMM: bound by arithmetic. Weights are unpacked to bytes once and then serve many rows.
//
// Loops, outside in:  rows whose sums fit L2  ->  a panel of kPanelBlocks blocks  ->  a piece of K, unpacked
// into L1 as  panel[row of 4 inputs][kPanelBlocks][64]  ->  kPanelRows rows at a time, one accumulator for
// each row and block. Where a piece ends amid a span, its sums wait in int32; those of finished spans are in y.
#pragma once

#include "qlinear-inl.h"

namespace lowbit {
namespace {

constexpr int64_t kPieceTiles = 8;     // of 4 blocks: 32 KiB; with the rows' activations less than L1
constexpr int64_t kRowsAtATime = 384;  // sums that wait: 96 KiB
constexpr int64_t kRowsOfTile = kTileK / 4;

// Consecutive inputs: whole spans, or a part of one.
struct Piece {
  int64_t tile, tiles;
  Range spans;
  bool first, last;  // whether it begins and ends its spans
};

template <class F>
void for_each_piece(const Matrix& w, const F& f) {
  const int64_t span_tiles = w.span_tiles(), spans = w.spans();
  const int64_t whole = span_tiles < kPieceTiles ? kPieceTiles / span_tiles : 1;
  for (int64_t s = 0; s < spans; s += whole) {
    const Range some{s, least(s + whole, spans)};
    const int64_t begin = s * span_tiles, end = least(some.end * span_tiles, w.tiles_k());
    const int64_t step = ceil_div(end - begin, ceil_div(end - begin, kPieceTiles));
    for (int64_t t = begin; t < end; t += step) {
      f(Piece{t, least(step, end - t), some, t == begin, t + step >= end});
    }
  }
}

template <class S, int kBits, bool kLookup>
void unpack_piece(const Matrix& w, const Piece& piece, int64_t block, int blocks, uint8_t* panel) {
  using Source = Packed<S, kBits, kLookup>;
  typename S::Lut lut{};
  if constexpr (kLookup) lut = S::load_lut(w.levels);
  for (int n = 0; n < blocks; ++n) {
    const uint8_t* from = w.tiles + (block + n) * w.block_bytes() + piece.tile * tile_bytes(kBits);
    uint8_t* to = panel + n * kVectorBytes;
    for (int64_t v = 0; v < piece.tiles * Source::kPerTile; ++v, from += kVectorBytes) {
      const typename S::Bytes raw = S::load(from);
      unroll<Source::kPositions>([&](auto i) LOWBIT_LAMBDA {
        S::store(to, Source::template row<decltype(i)::value>(raw, lut));
        to += S::kPanelBlocks * kVectorBytes;
      });
    }
  }
}

// total[m][n] = sum over `count` rows of 4 inputs of operand * q, exact in int32. w: row 0 of each block, the next ones
// `stride` bytes apart.
template <class S, Operand kOperand, int kM, int kN>
LOWBIT_INLINE void dot_panel(const uint8_t* const (&w)[kN], int64_t stride, const int8_t* const (&x)[kM],
                             int64_t first, int64_t count, typename S::I32 (&total)[kM][kN]) {
  unroll<kM * kN>([&](auto c) LOWBIT_LAMBDA { total[c / kN][c % kN] = S::zero_i32(); });
  for (int64_t r = first; r < first + count; ++r) {
    typename S::Bytes operand[kN];
    unroll<kN>([&](auto n) LOWBIT_LAMBDA { operand[n] = S::load(w[n] + r * stride); });
    unroll<kM>([&](auto m) LOWBIT_LAMBDA {
      const typename S::X4 four = S::broadcast4(x[m] + 4 * r);
      unroll<kN>([&](auto n) LOWBIT_LAMBDA {
        total[m][n] = S::template dot<kOperand>(total[m][n], operand[n], four);
      });
    });
  }
}

// kM rows x kN blocks over one piece. panel: its weights, unpacked; null where they are bytes and are read where they lie.
// waiting: [kM][kN] sums of the pieces before, in this span.
template <class S, Operand kOperand, bool kInPlace, int kM, int kN>
void multiply_piece(const Job& job, const Cell<kM, kN>& cell, const Piece& piece, const uint8_t* panel,
                    typename S::I32* waiting) {
  const Matrix& w = job.w;
  const int64_t spans = w.spans(), span_tiles = w.span_tiles();
  const int32_t a = kOperand == Operand::kCode ? w.a : 1;
  const int32_t b = kOperand == Operand::kCode ? w.b : -128;
  const int8_t* x[kM];
  for (int m = 0; m < kM; ++m) x[m] = cell.x[m] + piece.tile * kTileK;
  const uint8_t* from[kN];
  for (int n = 0; n < kN; ++n)
    from[n] = kInPlace ? cell.w[n] + piece.tile * tile_bytes(8) : panel + n * kVectorBytes;
  typename S::F32 y[kM][kN];
  load_cell<S, kM, kN>(job, cell, piece.spans.begin == 0 || !piece.last, y);

  for (int64_t s = piece.spans.begin; s < piece.spans.end; ++s) {
    const int64_t begin = piece.first ? s * span_tiles - piece.tile : 0;
    const int64_t tiles = piece.first ? least(span_tiles, piece.tiles - begin) : piece.tiles;
    typename S::I32 total[kM][kN];
    dot_panel<S, kOperand, kM, kN>(from, (kInPlace ? 1 : kN) * kVectorBytes, x, begin * kRowsOfTile,
                                   tiles * kRowsOfTile, total);
    if (!piece.first) {
      unroll<kM * kN>(
          [&](auto c) LOWBIT_LAMBDA { total[c / kN][c % kN] = S::add(total[c / kN][c % kN], waiting[c]); });
    }
    if (!piece.last) {
      unroll<kM * kN>([&](auto c) LOWBIT_LAMBDA { waiting[c] = total[c / kN][c % kN]; });
      return;
    }
    typename S::F32 scale[kN];
    unroll<kN>([&](auto n) LOWBIT_LAMBDA {
      scale[n] = S::load_half(w.scales + ((cell.block + least(n, cell.blocks - 1)) * spans + s) * kTileN);
    });
    unroll<kM>([&](auto m) LOWBIT_LAMBDA {
      const int64_t at = cell.row[m] * spans + s;
      const typename S::F32 sx = S::set1(job.act.scale[at]);
      const uint32_t offset = static_cast<uint32_t>(b) * static_cast<uint32_t>(job.act.sum[at]);
      unroll<kN>([&](auto n) LOWBIT_LAMBDA {
        typename S::I32 t = total[m][n];
        if constexpr (kOperand != Operand::kLevel) t = S::affine(t, a, static_cast<int32_t>(offset));
        y[m][n] = S::fmadd(S::to_f32(t), S::mul(scale[n], sx), y[m][n]);
      });
    });
  }
  store_cell<S, kM, kN>(job, cell, y);
}

template <class S, int kBits, bool kLookup>
void int8_large(const Job& job, Range blocks, Range all_rows, uint8_t* scratch) {
  constexpr int kM = S::kPanelRows, kN = S::kPanelBlocks;
  constexpr Operand kOperand = S::operand(kBits, kLookup);
  constexpr bool kInPlace =
      kBits == 8 && kOperand == Operand::kOffset;  // then a code of 8 bits is its operand
  static_assert(sizeof(typename S::I32) == kVectorBytes, "16 outputs");
  auto* waiting = reinterpret_cast<typename S::I32*>(scratch + kN * kPieceTiles * tile_bytes(8));
  for (int64_t first = all_rows.begin; first < all_rows.end; first += kRowsAtATime) {
    const Range rows{first, least(first + kRowsAtATime, all_rows.end)};
    for (int64_t block = blocks.begin; block < blocks.end; block += kN) {
      const int count = static_cast<int>(least(kN, blocks.end - block));
      for_each_piece(job.w, [&](const Piece& piece) {
        if constexpr (!kInPlace) unpack_piece<S, kBits, kLookup>(job.w, piece, block, count, scratch);
        Cell<kM, kN> cell;
        for (int n = 0; n < kN; ++n)
          cell.w[n] = job.w.tiles + (block + least(n, count - 1)) * job.w.block_bytes();
        // Each group of rows asks for its part of the next piece.
        const int64_t after = piece.tile + piece.tiles;
        const bool ends = after == job.w.tiles_k();
        const uint8_t* next = job.w.tiles + (block + (ends ? kN : 0)) * job.w.block_bytes() +
                              (ends ? 0 : after) * tile_bytes(kBits);
        Prefetcher<kN> prefetcher;
        prefetcher.start(next, job.w.block_bytes(), piece.tiles * Packed<S, kBits, kLookup>::kPerTile,
                         ceil_div(rows.size(), kM));
        for (int64_t m = rows.begin; m < rows.end; m += kM) {
          prefetcher.step();
          place(cell, job, block, count, m, static_cast<int>(least(kM, rows.end - m)));
          multiply_piece<S, kOperand, kInPlace, kM, kN>(job, cell, piece, scratch,
                                                        waiting + (m - rows.begin) * kN);
        }
      });
    }
  }
}

template <class S>
int64_t panel_bytes(const Job& job) {
  const int64_t rows = ceil_div(least(job.m, kRowsAtATime), S::kPanelRows) * S::kPanelRows;
  return S::kPanelBlocks * (kPieceTiles * tile_bytes(8) + rows * kVectorBytes);
}

}  // namespace
}  // namespace lowbit
