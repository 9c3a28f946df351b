// AVX-512 with VNNI: one zmm register holds a vector of 64 weights or 16 outputs. Meanings:
// simd_scalar-inl.h.
#pragma once

#include <immintrin.h>

#include "simd_common-inl.h"

namespace lowbit {
namespace {

struct Avx512 {
  using Bytes = __m512i;
  using I32 = __v16si;  // not __m512i: GCC 12 copies accumulators whose type it must cast
  using F32 = __m512;
  using X4 = __m512i;
  using Lut = __m512i;
  using Levels = __m512;

  static constexpr int kAccumulators = 16;
  static constexpr int kAttentionKeys = 8, kAttentionDims = 16;
  static constexpr int kPanelRows = 6, kPanelBlocks = 4, kMaxRows = 8, kExactBlocks = 2;
  static constexpr int blocks(int rows, int positions) { return rows * positions <= 4 ? 4 : 2; }
  static constexpr Operand operand(int bits, bool lookup) {
    return lookup || bits == 8 ? Operand::kOffset : Operand::kCode;
  }

  static Bytes load(const uint8_t* p) { return _mm512_load_si512(p); }
  static void store(uint8_t* p, Bytes x) { _mm512_store_si512(p, x); }

  template <int kBits, int kRow>
  static Bytes codes(Bytes x) {
    const Bytes mask = _mm512_set1_epi8(static_cast<char>((1 << kBits) - 1));
    return _mm512_and_si512(kRow == 0 ? x : _mm512_srli_epi16(x, kRow * kBits), mask);
  }
  template <int kBits, int kRow>
  static Bytes codes_in_place(Bytes x) {
    return _mm512_and_si512(x, _mm512_set1_epi8(static_cast<char>(((1 << kBits) - 1) << (kRow * kBits))));
  }
  template <int kShift>
  static Bytes move_down(Bytes x) {
    return kShift == 0 ? x : _mm512_srli_epi16(x, kShift);
  }
  static Bytes operand8(Bytes x) { return x; }  // code = level + 128
  static Lut load_lut(const int8_t* levels) {
    const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(levels));
    return _mm512_xor_si512(_mm512_broadcast_i32x4(table), _mm512_set1_epi8(static_cast<char>(0x80)));
  }
  static Bytes lookup(Bytes codes, Lut lut) { return _mm512_shuffle_epi8(lut, codes); }

  static X4 broadcast4(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
  }
  template <Operand kOperand>
  static I32 dot(I32 acc, Bytes w, X4 x) {
    static_assert(kOperand != Operand::kLevel, "VPDPBUSD wants unsigned weights");
    return (I32)_mm512_dpbusd_epi32((__m512i)acc, w, x);
  }

  static I32 zero_i32() { return I32{}; }
  static I32 add(I32 a, I32 b) { return a + b; }
  template <int kShift>
  static I32 shift_right(I32 a) {
    return a >> kShift;
  }
  static I32 affine(I32 t, int32_t a, int32_t b) {
    return (I32)_mm512_add_epi32(_mm512_mullo_epi32((__m512i)t, _mm512_set1_epi32(a)), _mm512_set1_epi32(b));
  }

  static F32 zero_f32() { return _mm512_setzero_ps(); }
  static F32 to_f32(I32 a) { return _mm512_cvtepi32_ps((__m512i)a); }
  static F32 to_f32(Bytes a) { return _mm512_cvtepi32_ps(a); }
  static F32 set1(float x) { return _mm512_set1_ps(x); }
  static F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
  static F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
  static F32 fmadd(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
  static F32 load_f32(const float* p) { return _mm512_loadu_ps(p); }
  static __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1); }
  static F32 load_f32(const float* p, int count) { return _mm512_maskz_loadu_ps(first(count), p); }
  static F32 load_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store_f32(float* p, F32 x, int count) { _mm512_mask_storeu_ps(p, first(count), x); }

  static Levels load_levels(const int8_t* levels) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels))));
  }
  // VPERMPS reads the low 4 bits of its index, so below 8 bits the code needs no mask: load_levels() was
  // given the table repeated to 16 entries.
  template <int kBits, int kShift>
  static F32 level(Bytes x, Levels levels) {
    if constexpr (kBits == 8) {
      const __m512i flipped = _mm512_xor_si512(x, _mm512_set1_epi8(static_cast<char>(0x80)));
      return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(flipped, 24 - kShift), 24));
    } else {
      return _mm512_permutexvar_ps(_mm512_srli_epi32(x, kShift), levels);
    }
  }

  static I32 magnitude_max(I32 top, F32 x) {
    return (I32)_mm512_max_epi32((__m512i)top,
                                 _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7FFFFFFF)));
  }
  static int32_t reduce_max(I32 a) { return _mm512_reduce_max_epi32((__m512i)a); }
  static int32_t reduce_add(I32 a) { return _mm512_reduce_add_epi32((__m512i)a); }
  static I32 round_store(F32 x, int8_t* out) {
    const __m512i rounded = _mm512_cvtps_epi32(x);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtsepi32_epi8(rounded));
    return (I32)rounded;
  }

  static F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
  static F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
  static F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
  static F32 round(F32 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F32 scale_by_power(F32 x, F32 n) { return _mm512_scalef_ps(x, n); }
  static float reduce_add(F32 x) { return _mm512_reduce_add_ps(x); }
  static float reduce_max(F32 x) { return _mm512_reduce_max_ps(x); }
  static F32 choose(uint16_t lanes, F32 yes, F32 no) { return _mm512_mask_mov_ps(no, lanes, yes); }
  static void transpose(F32 (&x)[16]) {
    for (int g = 0; g < 16; g += 4) {  // 4 x 4 within every 128 bits
      const __m512d ab = _mm512_castps_pd(_mm512_unpacklo_ps(x[g], x[g + 1]));
      const __m512d AB = _mm512_castps_pd(_mm512_unpackhi_ps(x[g], x[g + 1]));
      const __m512d cd = _mm512_castps_pd(_mm512_unpacklo_ps(x[g + 2], x[g + 3]));
      const __m512d CD = _mm512_castps_pd(_mm512_unpackhi_ps(x[g + 2], x[g + 3]));
      x[g] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
      x[g + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
      x[g + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(AB, CD));
      x[g + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(AB, CD));
    }
    for (int i = 0; i < 4; ++i) {  // then the quarters
      const F32 a = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x44),
                b = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0x44);
      const F32 c = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xEE),
                d = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0xEE);
      x[i] = _mm512_shuffle_f32x4(a, b, 0x88);
      x[i + 4] = _mm512_shuffle_f32x4(a, b, 0xDD);
      x[i + 8] = _mm512_shuffle_f32x4(c, d, 0x88);
      x[i + 12] = _mm512_shuffle_f32x4(c, d, 0xDD);
    }
  }
};

}  // namespace
}  // namespace lowbit
