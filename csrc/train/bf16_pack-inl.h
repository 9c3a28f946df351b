// bf16 operands in the order of AMX tiles, 1 KiB each:
//
//     A tile   16 rows of 32 values:             byte row r = A[row r][k .. k + 31]
//     B tile   16 rows of 16 pairs of values:    byte row r = B[k + 2r][n], B[k + 2r + 1][n] for n = 0 .. 15
//
// A matrix whose rows are what the tile wants in its lines needs no packing (A), or the interleaving of two rows (B).
// Otherwise pairs of values are transposed, 16 x 16 at a time.
#pragma once

#include <immintrin.h>

#include "../cpu/amx-inl.h"
#include "../cpu/simd_common-inl.h"

namespace lowbit {
namespace {

constexpr int64_t kTileDepth = 32;  // values of k

struct Pairs {
  __m512i row[16];
};

LOWBIT_INLINE __mmask16 first_of(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xFFFF : count <= 0 ? 0 : (1u << count) - 1);
}

LOWBIT_INLINE void transpose(Pairs& t) {
  __m512i x[16];
  unroll<8>([&](auto i) LOWBIT_LAMBDA {
    x[2 * i] = _mm512_unpacklo_epi32(t.row[2 * i], t.row[2 * i + 1]);
    x[2 * i + 1] = _mm512_unpackhi_epi32(t.row[2 * i], t.row[2 * i + 1]);
  });
  __m512i y[16];  // y[4 * i + j]: column j of every 128 bits, rows 4i .. 4i + 3
  unroll<4>([&](auto i) LOWBIT_LAMBDA {
    y[4 * i] = _mm512_unpacklo_epi64(x[4 * i], x[4 * i + 2]);
    y[4 * i + 1] = _mm512_unpackhi_epi64(x[4 * i], x[4 * i + 2]);
    y[4 * i + 2] = _mm512_unpacklo_epi64(x[4 * i + 1], x[4 * i + 3]);
    y[4 * i + 3] = _mm512_unpackhi_epi64(x[4 * i + 1], x[4 * i + 3]);
  });
  unroll<4>([&](auto j) LOWBIT_LAMBDA {
    const __m512i low = _mm512_shuffle_i32x4(y[j], y[4 + j], 0x88),
                  high = _mm512_shuffle_i32x4(y[8 + j], y[12 + j], 0x88);
    const __m512i low2 = _mm512_shuffle_i32x4(y[j], y[4 + j], 0xDD),
                  high2 = _mm512_shuffle_i32x4(y[8 + j], y[12 + j], 0xDD);
    t.row[j] = _mm512_shuffle_i32x4(low, high, 0x88);
    t.row[8 + j] = _mm512_shuffle_i32x4(low, high, 0xDD);
    t.row[4 + j] = _mm512_shuffle_i32x4(low2, high2, 0x88);
    t.row[12 + j] = _mm512_shuffle_i32x4(low2, high2, 0xDD);
  });
}

LOWBIT_INLINE void store(const Pairs& t, uint8_t* tile) {
  unroll<16>([&](auto i) LOWBIT_LAMBDA { _mm512_store_si512(tile + 64 * i, t.row[i]); });
}

LOWBIT_INLINE __m512i widened(const uint16_t* p, __mmask16 mask) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
}
LOWBIT_INLINE __m512i widened(const float* p, __mmask16 mask) {  // rounded to bf16
  return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, p)));
}

// Pairs of the rows k .. k + 31 of x [rows, columns] at the columns c .. c + 15; zero beyond either end.
template <class T>
LOWBIT_INLINE Pairs interleave(const T* x, int64_t stride, int64_t rows, int64_t columns, int64_t k,
                               int64_t c) {
  const __mmask16 mask = first_of(columns - c);
  const T* p = x + k * stride + c;
  Pairs t;
  if (k + kTileDepth <= rows) {
    unroll<16>([&](auto i) LOWBIT_LAMBDA {
      const __m512i odd = widened(p + (2 * i + 1) * stride, mask);
      t.row[i] = _mm512_or_si512(widened(p + 2 * i * stride, mask), _mm512_slli_epi32(odd, 16));
    });
    return t;
  }
  for (int64_t i = 0; i < 16; ++i) {
    const __m512i even = k + 2 * i < rows ? widened(p + 2 * i * stride, mask) : _mm512_setzero_si512();
    const __m512i odd =
        k + 2 * i + 1 < rows ? widened(p + (2 * i + 1) * stride, mask) : _mm512_setzero_si512();
    t.row[i] = _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
  }
  return t;
}

// The rows that interleave() asks for next: at strides of more than a page no hardware foresees them.
template <class T>
LOWBIT_INLINE void fetch_rows(const T* x, int64_t stride, int64_t rows, int64_t k, int64_t c) {
  if (k + kTileDepth > rows) return;
  const T* p = x + k * stride + c;
  for (int64_t i = 0; i < kTileDepth; ++i) _mm_prefetch(p + i * stride, _MM_HINT_T0);
}

// B tiles of kPanels times 16 columns of B[k][n] = x[k][n], from c on: together they use whole cache lines.
template <int kPanels, class T>
LOWBIT_INLINE void pack_columns(const T* x, int64_t stride, int64_t rows, int64_t columns, int64_t c,
                                uint8_t* tiles, int64_t panel_bytes) {
  for (int64_t k = 0; k < rows; k += kTileDepth) {
    fetch_rows(x, stride, rows, k + kTileDepth, c);
    unroll<kPanels>([&](auto i) LOWBIT_LAMBDA {
      store(interleave(x, stride, rows, columns, k, c + 16 * i),
            tiles + i * panel_bytes + k / kTileDepth * kTileBytes);
    });
  }
}

// B tiles of the columns n .. n + 15 of B[k][n] = w[n][k].
LOWBIT_INLINE void pack_rows(const float* w, int64_t rows, int64_t columns, int64_t n, uint8_t* tiles) {
  for (int64_t k = 0; k < columns; k += kTileDepth) {
    const __mmask16 low = first_of(columns - k), high = first_of(columns - k - 16);
    Pairs t;
    for (int64_t i = 0; i < 16; ++i) {
      const bool there = n + i < rows;
      const float* p = w + (there ? n + i : n) * columns + k;
      const __m512 first = _mm512_maskz_loadu_ps(there ? low : 0, p);
      t.row[i] = (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(there ? high : 0, p + 16), first);
    }
    transpose(t);
    store(t, tiles + k / kTileDepth * kTileBytes);
  }
}

// A tiles of kGroups times 16 rows of A[n][k] = x[k][n], from c on, and the sum of every such row.
template <int kGroups>
LOWBIT_INLINE void pack_transposed(const uint16_t* x, int64_t stride, int64_t rows, int64_t columns,
                                   int64_t c, uint8_t* tiles, int64_t group_bytes, __m512* sums) {
  __m512 even[kGroups], odd[kGroups];
  unroll<kGroups>([&](auto g) LOWBIT_LAMBDA { even[g] = odd[g] = _mm512_setzero_ps(); });
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  for (int64_t k = 0; k < rows; k += kTileDepth) {
    fetch_rows(x, stride, rows, k + kTileDepth, c);
    unroll<kGroups>([&](auto g) LOWBIT_LAMBDA {
      Pairs t = interleave(x, stride, rows, columns, k, c + 16 * g);
      unroll<16>([&](auto i) LOWBIT_LAMBDA {
        even[g] = _mm512_add_ps(even[g], _mm512_castsi512_ps(_mm512_slli_epi32(t.row[i], 16)));
        odd[g] = _mm512_add_ps(odd[g], _mm512_castsi512_ps(_mm512_and_si512(t.row[i], upper)));
      });
      transpose(t);
      store(t, tiles + g * group_bytes + k / kTileDepth * kTileBytes);
    });
  }
  unroll<kGroups>([&](auto g) LOWBIT_LAMBDA { sums[g] = _mm512_add_ps(even[g], odd[g]); });
}

}  // namespace
}  // namespace lowbit
