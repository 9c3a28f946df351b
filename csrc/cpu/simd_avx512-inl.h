// AVX-512 with VNNI: one zmm register holds a vector of 64 weights or 16 outputs. Meanings:
// simd_scalar-inl.h.
#pragma once

#include <immintrin.h>

#include "simd_common-inl.h"

namespace lowbit {
namespace {

// Phi(x) = c0 + c1 r + c2 r^2 + c3 r^3, r = x / 0.32 - n, n = the nearest integer, whose lowest 5 bits choose the
// column: fits of the least error |x| |Phi|, and 0 and 1 at the ends.
alignas(64) constexpr float kNormalCdf[4][32] = {
    {0.5f,
     0.6255149f,
     0.738912f,
     0.8314707f,
     0.8997264f,
     0.94520044f,
     0.9725713f,
     0.987455f,
     0.99476683f,
     0.99801195f,
     0.99931306f,
     0.9997843f,
     0.99993855f,
     0.9999841f,
     0.99999624f,
     0.99999917f,
     0,
     7.9200504e-7f,
     3.727524e-6f,
     1.5898075e-5f,
     6.1478284e-5f,
     0.00021568118f,
     0.00068694906f,
     0.001988048f,
     0.005233143f,
     0.012544966f,
     0.027428674f,
     0.054799557f,
     0.1002736f,
     0.16852929f,
     0.26108804f,
     0.3744851f},
    {0.12766063f,   0.12128536f,   0.10401697f,   0.08052485f,   0.056271028f,   0.03549506f,
     0.020210542f,  0.010387554f,  0.004819166f,  0.002018141f,  0.00076286844f, 0.0002602935f,
     8.0165846e-5f, 2.2285589e-5f, 5.591954e-6f,  8.8434604e-7f, 2.3802547e-6f,  1.266495e-6f,
     5.591954e-6f,  2.2285589e-5f, 8.0165846e-5f, 0.0002602935f, 0.00076286844f, 0.002018141f,
     0.004819166f,  0.010387554f,  0.020210542f,  0.03549506f,   0.056271028f,   0.08052485f,
     0.10401697f,   0.12128536f},
    {0,
     -0.006174128f,
     -0.010593726f,
     -0.012314389f,
     -0.011490961f,
     -0.009078063f,
     -0.0062175062f,
     -0.0037387416f,
     -0.0019888221f,
     -0.0009404656f,
     -0.0003966525f,
     -0.0001495641f,
     -5.050734e-5f,
     -1.5295669e-5f,
     -4.1583166e-6f,
     -1.3298948e-7f,
     -7.706066e-6f,
     1.0156799e-6f,
     4.1583166e-6f,
     1.5295669e-5f,
     5.050734e-5f,
     0.0001495641f,
     0.0003966525f,
     0.0009404656f,
     0.0019888221f,
     0.0037387416f,
     0.0062175062f,
     0.009078063f,
     0.011490961f,
     0.012314389f,
     0.010593726f,
     0.006174128f},
    {-0.002167149f,  -0.0018279875f, -0.001030835f,  -0.0001029945f, 0.000609674f,    0.0009391522f,
     0.00092218816f, 0.00071042165f, 0.00045686297f, 0.00025210963f, 0.000121163896f, 5.1173807e-5f,
     1.9106546e-5f,  6.3323473e-6f,  1.8685089e-6f,  3.7605173e-6f,  8.819655e-6f,    4.9198394e-7f,
     1.8685089e-6f,  6.3323473e-6f,  1.9106546e-5f,  5.1173807e-5f,  0.000121163896f, 0.00025210963f,
     0.00045686297f, 0.00071042165f, 0.00092218816f, 0.0009391522f,  0.000609674f,    -0.0001029945f,
     -0.001030835f,  -0.0018279875f}};

struct Avx512 {
  using Bytes = __m512i;
  using I32 = __v16si;  // not __m512i: GCC 12 copies accumulators whose type it must cast
  using F32 = __m512;
  using X4 = __m512i;
  using Lut = __m512i;
  using Levels = __m512;

  static constexpr int kAccumulators = 16;
  static constexpr int kAttentionKeys = 8, kAttentionDims = 16;
  static constexpr bool kLooksUpPacked = false;
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
  static I32 round_store_tile(const float* x, F32 scale, int8_t* out) {
    __m512i r[4];
    for (int i = 0; i < 4; ++i) r[i] = _mm512_cvtps_epi32(mul(load_f32(x + 16 * i), scale));
    const __m512i packed = _mm512_packs_epi16(_mm512_packs_epi32(r[0], r[1]), _mm512_packs_epi32(r[2], r[3]));
    // Packing works within 128 bits: the permutation puts the quarters back in order.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi32(order, packed));
    return (I32)_mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), packed);
  }

  static F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
  static F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
  static F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
  static float reduce_add(F32 x) { return _mm512_reduce_add_ps(x); }
  static float reduce_max(F32 x) { return _mm512_reduce_max_ps(x); }
  // VREDUCEPS leaves t - floor(t), VSCALEFPS multiplies by 2^floor(t).
  static F32 exp2(F32 t) {
    constexpr int kFloor = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
    return _mm512_scalef_ps(power_of_fraction<Avx512>(_mm512_reduce_ps(t, kFloor)), t);
  }
  // 13 operations, a chain of 40 cycles. A polynomial over all x has a chain of 75: more than the core looks ahead.
  static F32 normal_cdf(F32 x) {
    const F32 magic = set1(12582912.0f);  // 1.5 * 2^23: what is added to it loses its fraction
    const F32 u = min(set1(15.49f), max(set1(-16.0f), mul(x, set1(3.125f))));
    const F32 z = add(u, magic), r = sub(u, sub(z, magic));
    const auto coefficient = [n = _mm512_castps_si512(z)](int i) {
      return _mm512_permutex2var_ps(_mm512_load_ps(kNormalCdf[i]), n, _mm512_load_ps(kNormalCdf[i] + 16));
    };
    return fmadd(fmadd(fmadd(coefficient(3), r, coefficient(2)), r, coefficient(1)), r, coefficient(0));
  }
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

// For short spans at 1 bit: positions share four sums, so that fewer are left to add up where a span ends, and four
// streams share what is done once.
struct Avx512Short : Avx512 {
  static constexpr int blocks(int rows, int positions) {
    return rows == 1 ? 4 : Avx512::blocks(rows, positions);
  }
};

}  // namespace
}  // namespace lowbit
