// Digits of rows, and the parts of attention in integers that a query alone shares with sixteen together.
#pragma once

#include <cstring>

#include "forward_digits.h"
#include "simd_avx512-inl.h"

namespace lowbit {
namespace {

using F32 = __m512;

constexpr int64_t kBlock = 16;                             // tokens, or queries
constexpr float kDigitsMax = 16256, kLog2E = 1.44269504f;  // 127 * 128
constexpr float kTiny = 1e-30f;                            // below it a row counts as zeros

// Lane i: all lanes of x[i] combined by op.
template <class V, class Op>
LOWBIT_INLINE V combine_each(V (&x)[16], const Op& op) {
  const auto f = [](V v) LOWBIT_LAMBDA { return (__m512)v; };
  for (int i = 0; i < 8; ++i) {
    const F32 a = f(x[2 * i]), b = f(x[2 * i + 1]);
    x[i] = op((V)_mm512_shuffle_f32x4(a, b, 0x44), (V)_mm512_shuffle_f32x4(a, b, 0xEE));
  }
  for (int i = 0; i < 4; ++i) {
    const F32 a = f(x[2 * i]), b = f(x[2 * i + 1]);
    x[i] = op((V)_mm512_shuffle_f32x4(a, b, 0x88), (V)_mm512_shuffle_f32x4(a, b, 0xDD));
  }
  for (int i = 0; i < 2; ++i) {
    const F32 a = f(x[2 * i]), b = f(x[2 * i + 1]);
    x[i] = op((V)_mm512_unpacklo_ps(a, b), (V)_mm512_unpackhi_ps(a, b));
  }
  const __m512d a = _mm512_castps_pd(f(x[0])), b = _mm512_castps_pd(f(x[1]));
  const V all =
      op((V)_mm512_unpacklo_pd(a, b), (V)_mm512_unpackhi_pd(a, b));  // x[4 k + l] in element k of quarter l
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return (V)_mm512_permutexvar_epi32(order, (__m512i)all);
}

struct AddI32 {
  LOWBIT_INLINE __m512i operator()(__m512i a, __m512i b) const { return _mm512_add_epi32(a, b); }
};
struct MaxI32 {  // of floats that are not negative too; a NaN is greatest
  LOWBIT_INLINE __m512i operator()(__m512i a, __m512i b) const { return _mm512_max_epi32(a, b); }
};
struct MaxF32 {
  LOWBIT_INLINE F32 operator()(F32 a, F32 b) const { return _mm512_max_ps(a, b); }
};

struct Digits {
  __m512i high, low;
};

// 64 integers up to 16256 as digits, dwords of 64 bytes as a transposed 4 x 4 matrix.
LOWBIT_INLINE Digits digits(const __m512i (&x)[4]) {
  const __m512i half = _mm512_set1_epi16(64);
  __m512i high[2], low[2];
  for (int i = 0; i < 2; ++i) {
    const __m512i words = _mm512_packs_epi32(x[2 * i], x[2 * i + 1]);
    high[i] = _mm512_srai_epi16(_mm512_add_epi16(words, half), 7);
    low[i] = _mm512_sub_epi16(words, _mm512_slli_epi16(high[i], 7));
  }
  return {_mm512_packs_epi16(high[0], high[1]), _mm512_packs_epi16(low[0], low[1])};
}

LOWBIT_INLINE __m512i in_order(__m512i x) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, x);
}

LOWBIT_INLINE F32 load_part(const float* x, int64_t left) {
  return left >= 16 ? _mm512_loadu_ps(x)
                    : _mm512_maskz_loadu_ps(left > 0 ? Avx512::first(static_cast<int>(left)) : 0, x);
}

LOWBIT_INLINE void store_part(float* to, F32 x, int64_t left) {
  if (left >= 16) {
    _mm512_storeu_ps(to, x);
  } else {
    Avx512::store_f32(to, x, static_cast<int>(left));
  }
}

// Digits of rows x + i * stride, i < count <= 16: put(i, chunk, digits) for every 64 inputs. Returns the scales, NaN of
// a row that holds a NaN or an infinity.
template <class Put>
LOWBIT_INLINE F32 split_rows(const float* x, int64_t stride, int count, int64_t dim, const Put& put) {
  const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
  __m512i most[16];
  for (int i = 0; i < 16; ++i) {
    __m512i m = _mm512_setzero_si512();
    for (int64_t d = 0; i < count && d < dim; d += 16) {
      const __m512i bits = _mm512_castps_si512(load_part(x + i * stride + d, dim - d));
      __builtin_prefetch(x + i * stride + d + dim);  // the next head
      m = _mm512_max_epi32(m, _mm512_and_si512(bits, magnitude));
    }
    most[i] = m;
  }
  const F32 top = _mm512_castsi512_ps(combine_each(most, MaxI32()));
  const F32 one = _mm512_add_ps(_mm512_set1_ps(1), _mm512_mul_ps(top, _mm512_setzero_ps()));  // or NaN
  const __mmask16 some = _mm512_cmp_ps_mask(top, _mm512_set1_ps(kTiny), _CMP_GE_OQ);
  alignas(64) float inverse[16];
  _mm512_store_ps(inverse, _mm512_maskz_div_ps(some, _mm512_set1_ps(kDigitsMax), top));
  for (int i = 0; i < count; ++i) {
    const F32 by = _mm512_set1_ps(inverse[i]);
    for (int64_t d = 0; d < dim; d += kTileK) {
      __m512i r[4];
      for (int j = 0; j < 4; ++j)
        r[j] =
            _mm512_cvtps_epi32(_mm512_mul_ps(load_part(x + i * stride + d + 16 * j, dim - d - 16 * j), by));
      put(i, d, digits(r));
    }
  }
  return _mm512_mul_ps(_mm512_mul_ps(top, _mm512_set1_ps(1 / kDigitsMax)), one);
}

// The value of sums of high * high and of high * low, in units of 128.
LOWBIT_INLINE F32 value(__m512i high, __m512i mixed) {
  return Avx512::fmadd(_mm512_cvtepi32_ps(high), _mm512_set1_ps(128), _mm512_cvtepi32_ps(mixed));
}

LOWBIT_INLINE F32 score(__m512i high, __m512i mixed, F32 key_scale, F32 query_scale) {
  return _mm512_mul_ps(value(high, mixed), _mm512_mul_ps(key_scale, query_scale));
}

// A query's scale such that scores are exponents of 2.
LOWBIT_INLINE F32 query_scale(F32 scale, float by) {
  return _mm512_mul_ps(scale, _mm512_set1_ps(by * 128 * kLog2E));
}

// What makes weights of values out of e^(score - top), given the greatest scale of a value that the query sees.
LOWBIT_INLINE F32 weight_scale(F32 most, int sum_bits) {
  const float units = kDigitsMax / static_cast<float>(1 << sum_bits);
  return _mm512_div_ps(_mm512_set1_ps(units), _mm512_max_ps(most, _mm512_set1_ps(1e-36f)));
}

// What makes outputs out of value(): NaN where the query, a key or a value holds one.
LOWBIT_INLINE F32 output_scale(F32 most, __m512i sum, F32 top, F32 query_scale, int sum_bits) {
  const float units = 128 / kDigitsMax * static_cast<float>(1 << sum_bits);
  const F32 poison = _mm512_mul_ps(_mm512_setzero_ps(), _mm512_add_ps(top, query_scale));
  return _mm512_add_ps(_mm512_div_ps(_mm512_mul_ps(most, _mm512_set1_ps(units)), _mm512_cvtepi32_ps(sum)),
                       poison);
}

// e^(score - top) of seen tokens in the units of their sum, which grows, and their weights as integers.
LOWBIT_INLINE __m512i weigh(F32 score, F32 shift, __mmask16 seen, F32 value_scale, F32 by, __m512i& sum) {
  const F32 e = Avx512::exp2(_mm512_add_ps(score, shift));
  sum = _mm512_add_epi32(sum, _mm512_maskz_cvtps_epi32(seen, e));
  return _mm512_maskz_cvtps_epi32(seen, _mm512_mul_ps(e, _mm512_mul_ps(value_scale, by)));
}

// Four rows of 64 values to [dims][4 tokens]: 16 dims in each of four vectors.
LOWBIT_INLINE void interleave(__m512i (&x)[4]) {
  const __m512i ab = _mm512_unpacklo_epi8(x[0], x[1]), AB = _mm512_unpackhi_epi8(x[0], x[1]);
  const __m512i cd = _mm512_unpacklo_epi8(x[2], x[3]), CD = _mm512_unpackhi_epi8(x[2], x[3]);
  x[0] = _mm512_unpacklo_epi16(ab, cd);
  x[1] = _mm512_unpackhi_epi16(ab, cd);
  x[2] = _mm512_unpacklo_epi16(AB, CD);
  x[3] = _mm512_unpackhi_epi16(AB, CD);
}

const uint8_t* record_of(const DigitHead& h, int64_t token) {
  return reinterpret_cast<const uint8_t*>(h.slots[token]) + h.offset;
}

void keep(const DigitHead& to, const float* k, const float* v, int64_t stride, int count) {
  const int64_t row = to.record.row(), at = to.record.head(to.head);
  uint8_t* record[kBlock];
  for (int i = 0; i < count; ++i) record[i] = const_cast<uint8_t*>(record_of(to, i));
  const F32 key_scale = split_rows(k, stride, count, to.record.dim, [&](int i, int64_t d, const Digits& x) {
    _mm512_storeu_si512(record[i] + at + d, in_order(x.high));
    _mm512_storeu_si512(record[i] + at + row + d, in_order(x.low));
  });
  const F32 value_scale = split_rows(v, stride, count, to.record.dim, [&](int i, int64_t d, const Digits& x) {
    _mm512_storeu_si512(record[i] + at + 2 * row + d, x.high);
    _mm512_storeu_si512(record[i] + at + 3 * row + d, x.low);
  });
  alignas(64) float scales[2][kBlock];
  _mm512_store_ps(scales[0], key_scale);
  _mm512_store_ps(scales[1], value_scale);
  for (int i = 0; i < count; ++i) {
    const float both[2] = {scales[0][i], scales[1][i]};
    std::memcpy(record[i] + to.record.scales(to.head), both, sizeof(both));
  }
}

// The scales of up to 16 tokens; a value's is NaN where its key's is.
struct Scales {
  alignas(64) float key[kBlock] = {}, value[kBlock] = {};

  Scales(const DigitHead& h, const uint8_t* const (&record)[kBlock], int count) {
    for (int i = 0; i < count; ++i) {
      float both[2];
      std::memcpy(both, record[i] + h.record.scales(h.head), sizeof(both));
      key[i] = both[0];
      value[i] = both[1] + 0 * both[0];
    }
  }
};

}  // namespace
}  // namespace lowbit
