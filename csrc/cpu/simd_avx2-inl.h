// AVX2 with FMA and F16C: two ymm registers (outputs 0-7 and 8-15) make a vector. Meanings:
// simd_scalar-inl.h.
#pragma once

#include <immintrin.h>

#include "simd_common-inl.h"

namespace lowbit {
namespace {

struct Avx2 {
  struct Bytes {
    __m256i lo, hi;
  };
  struct I32 {
    __m256i lo, hi;
  };
  struct F32 {
    __m256 lo, hi;
  };
  using X4 = __m256i;
  using Lut = __m256i;
  struct Levels {
    __m256 lo, hi;
  };  // levels 0-7 and 8-15

  static constexpr int kAccumulators =
      0;  // VPMADDUBSW saturates at 16 bits: codes must be shifted down first
  static constexpr int kAttentionKeys = 4, kAttentionDims = 4;
  static constexpr bool kLooksUpPacked = false;
  static constexpr int kPanelRows = 2, kPanelBlocks = 2, kMaxRows = 4, kExactBlocks = 1;
  static constexpr int blocks(int rows, int /*positions*/) { return rows == 4 ? 1 : 2; }
  static constexpr Operand operand(int bits, bool lookup) {
    return lookup || bits == 8 ? Operand::kLevel : Operand::kCode;
  }

  static __m256i load_half_vector(const uint8_t* p) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
  }
  static Bytes load(const uint8_t* p) { return {load_half_vector(p), load_half_vector(p + 32)}; }
  static void store(uint8_t* p, Bytes x) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(p), x.lo);
    _mm256_store_si256(reinterpret_cast<__m256i*>(p + 32), x.hi);
  }

  template <int kBits, int kRow>
  static Bytes codes(Bytes x) {
    const __m256i mask = _mm256_set1_epi8(static_cast<char>((1 << kBits) - 1));
    return {_mm256_and_si256(_mm256_srli_epi16(x.lo, kRow * kBits), mask),
            _mm256_and_si256(_mm256_srli_epi16(x.hi, kRow * kBits), mask)};
  }
  static Bytes operand8(Bytes x) {  // code - 128, signed
    const __m256i flip = _mm256_set1_epi8(static_cast<char>(0x80));
    return {_mm256_xor_si256(x.lo, flip), _mm256_xor_si256(x.hi, flip)};
  }
  static Lut load_lut(const int8_t* levels) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels)));
  }
  static Bytes lookup(Bytes codes, Lut lut) {
    return {_mm256_shuffle_epi8(lut, codes.lo), _mm256_shuffle_epi8(lut, codes.hi)};
  }

  static X4 broadcast4(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
  }
  // Pairs fit in 16 bits: 15 * 127 * 2 for codes below 16, and 128 * 127 * 2 = 32512 for |level| <= 128.
  template <Operand kOperand>
  static __m256i dot_half(__m256i acc, __m256i w, __m256i x) {
    static_assert(kOperand != Operand::kOffset, "level + 128 would saturate");
    const __m256i pairs = kOperand == Operand::kCode
                              ? _mm256_maddubs_epi16(w, x)
                              : _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  template <Operand kOperand>
  static I32 dot(I32 acc, Bytes w, X4 x) {
    return {dot_half<kOperand>(acc.lo, w.lo, x), dot_half<kOperand>(acc.hi, w.hi, x)};
  }

  static I32 zero_i32() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static I32 add(I32 a, I32 b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
  static I32 affine(I32 t, int32_t a, int32_t b) {
    const __m256i va = _mm256_set1_epi32(a), vb = _mm256_set1_epi32(b);
    return {_mm256_add_epi32(_mm256_mullo_epi32(t.lo, va), vb),
            _mm256_add_epi32(_mm256_mullo_epi32(t.hi, va), vb)};
  }

  static F32 zero_f32() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static F32 to_f32(I32 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
  static F32 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static F32 add(F32 a, F32 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
  static F32 mul(F32 a, F32 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
  static F32 fmadd(F32 a, F32 b, F32 c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
  }
  static F32 load_f32(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  // Lanes below count: -1, the others 0.
  static __m256i first(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static F32 load_f32(const float* p, int count) {
    return {_mm256_maskload_ps(p, first(count)), _mm256_maskload_ps(p + 8, first(count - 8))};
  }
  static F32 load_half(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(p + 8)))};
  }
  static void store_f32(float* p, F32 x, int count) {
    if (count >= 16) {
      _mm256_storeu_ps(p, x.lo);
      _mm256_storeu_ps(p + 8, x.hi);
    } else {
      _mm256_maskstore_ps(p, first(count), x.lo);
      if (count > 8) _mm256_maskstore_ps(p + 8, first(count - 8), x.hi);
    }
  }

  static Levels load_levels(const int8_t* levels) {
    const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(levels));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(all)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(all, 8)))};
  }
  // VPERMPS reads the low 3 bits of its index (the table is repeated to 16 entries below 4 bits); at 4 bits
  // the fourth bit, moved to the sign, chooses between the halves of the table.
  template <int kBits, int kShift>
  static __m256 level_half(__m256i x, Levels levels) {
    if constexpr (kBits == 8) {
      const __m256i flipped = _mm256_xor_si256(x, _mm256_set1_epi8(static_cast<char>(0x80)));
      return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(flipped, 24 - kShift), 24));
    } else {
      const __m256i index = _mm256_srli_epi32(x, kShift);
      const __m256 low = _mm256_permutevar8x32_ps(levels.lo, index);
      if constexpr (kBits < 4) return low;
      const __m256 high = _mm256_permutevar8x32_ps(levels.hi, index);
      return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(x, 28 - kShift)));
    }
  }
  template <int kBits, int kShift>
  static F32 level(Bytes x, Levels levels) {
    return {level_half<kBits, kShift>(x.lo, levels), level_half<kBits, kShift>(x.hi, levels)};
  }

  static I32 magnitude_max(I32 top, F32 x) {
    const __m256i mask = _mm256_set1_epi32(0x7FFFFFFF);
    return {_mm256_max_epi32(top.lo, _mm256_and_si256(_mm256_castps_si256(x.lo), mask)),
            _mm256_max_epi32(top.hi, _mm256_and_si256(_mm256_castps_si256(x.hi), mask))};
  }
  static int32_t reduce_max(I32 a) {
    alignas(32) int32_t lane[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lane), _mm256_max_epi32(a.lo, a.hi));
    int32_t top = lane[0];
    for (int i = 1; i < 8; ++i) top = lane[i] > top ? lane[i] : top;
    return top;
  }
  static int32_t reduce_add(I32 a) {
    alignas(32) int32_t lane[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lane), _mm256_add_epi32(a.lo, a.hi));
    int32_t sum = 0;
    for (int i = 0; i < 8; ++i) sum += lane[i];
    return sum;
  }
  static I32 round_store(F32 x, int8_t* out) {
    const I32 r = {_mm256_cvtps_epi32(x.lo), _mm256_cvtps_epi32(x.hi)};
    // Packing works within 128-bit lanes: the permutation puts the quarters back in order.
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(r.lo, r.hi), 0xD8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes);
    return r;
  }
  static I32 round_store_tile(const float* x, F32 scale, int8_t* out) {
    return round_store_vectors<Avx2>(x, scale, out);
  }

  static F32 sub(F32 a, F32 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
  static F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
  static F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
  static F32 round(F32 x) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.lo, kNearest), _mm256_round_ps(x.hi, kNearest)};
  }
  static __m256 power_of_two(__m256 n) {
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
  }
  static F32 scale_by_power(F32 x, F32 n) { return mul(x, {power_of_two(n.lo), power_of_two(n.hi)}); }
  static float reduce_add(F32 x) {
    const __m256 eight = _mm256_add_ps(x.lo, x.hi);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }
  static float reduce_max(F32 x) {
    const __m256 eight = _mm256_max_ps(x.lo, x.hi);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
  }
  static F32 normal_cdf(F32 x) { return normal_cdf_polynomial<Avx2>(x); }
  static F32 exp2(F32 t) { return exp2_polynomial<Avx2>(t); }
  static F32 choose(uint16_t lanes, F32 yes, F32 no) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const auto half = [&](int eight, __m256 a, __m256 b) {
      const __m256i set = _mm256_and_si256(_mm256_set1_epi32(eight), bit);
      return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bit)));
    };
    return {half(lanes, yes.lo, no.lo), half(lanes >> 8, yes.hi, no.hi)};
  }
  static void transpose_eight(__m256 (&x)[8]) {
    for (int g = 0; g < 8; g += 4) {  // 4 x 4 within every 128 bits
      const __m256d ab = _mm256_castps_pd(_mm256_unpacklo_ps(x[g], x[g + 1]));
      const __m256d AB = _mm256_castps_pd(_mm256_unpackhi_ps(x[g], x[g + 1]));
      const __m256d cd = _mm256_castps_pd(_mm256_unpacklo_ps(x[g + 2], x[g + 3]));
      const __m256d CD = _mm256_castps_pd(_mm256_unpackhi_ps(x[g + 2], x[g + 3]));
      x[g] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd));
      x[g + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd));
      x[g + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(AB, CD));
      x[g + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(AB, CD));
    }
    for (int i = 0; i < 4; ++i) {
      const __m256 low = _mm256_permute2f128_ps(x[i], x[i + 4], 0x20);
      x[i + 4] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x31);
      x[i] = low;
    }
  }
  static void transpose(F32 (&x)[16]) {
    __m256 quarter[2][2][8];
    for (int i = 0; i < 16; ++i) quarter[i / 8][0][i % 8] = x[i].lo, quarter[i / 8][1][i % 8] = x[i].hi;
    for (auto& rows : quarter) transpose_eight(rows[0]), transpose_eight(rows[1]);
    for (int i = 0; i < 16; ++i) x[i] = {quarter[0][i / 8][i % 8], quarter[1][i / 8][i % 8]};
  }
};

}  // namespace
}  // namespace lowbit
