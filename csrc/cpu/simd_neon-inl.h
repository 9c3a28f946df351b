// AArch64 with the dot-product extension: four 128-bit registers (four outputs each) make a vector, and SDOT
// is the operation that the layout was made for. Meanings: simd_scalar-inl.h.
#pragma once

#include <arm_neon.h>

#include "simd_common-inl.h"

namespace lowbit {
namespace {

struct Neon {
  struct Bytes {
    uint8x16_t q[4];
  };
  struct I32 {
    int32x4_t q[4];
  };
  struct F32 {
    float32x4_t q[4];
  };
  using X4 = int8x16_t;
  using Lut = uint8x16_t;
  using Levels = int8x16_t;

  static constexpr int kAccumulators = 0;  // SDOT is signed: the top position of a byte must be shifted down
  static constexpr int kAttentionKeys = 4, kAttentionDims = 4;
  static constexpr bool kLooksUpPacked = false;
  static constexpr int kPanelRows = 4, kPanelBlocks = 1, kMaxRows = 4, kExactBlocks = 1;
  static constexpr int blocks(int rows, int /*positions*/) { return rows == 4 ? 1 : 2; }
  static constexpr Operand operand(int bits, bool lookup) {
    return lookup || bits == 8 ? Operand::kLevel : Operand::kCode;
  }

  template <class F>
  static LOWBIT_INLINE auto each(F&& f) -> Bytes {
    return {{f(0), f(1), f(2), f(3)}};
  }
  template <class F>
  static LOWBIT_INLINE auto each_i32(F&& f) -> I32 {
    return {{f(0), f(1), f(2), f(3)}};
  }
  template <class F>
  static LOWBIT_INLINE auto each_f32(F&& f) -> F32 {
    return {{f(0), f(1), f(2), f(3)}};
  }

  static Bytes load(const uint8_t* p) {
    return each([&](int i) { return vld1q_u8(p + 16 * i); });
  }
  static void store(uint8_t* p, const Bytes& x) {
    for (int i = 0; i < 4; ++i) vst1q_u8(p + 16 * i, x.q[i]);
  }

  template <int kBits, int kRow>
  static Bytes codes(const Bytes& x) {
    const uint8x16_t mask = vdupq_n_u8((1 << kBits) - 1);
    if constexpr (kRow == 0) {
      return each([&](int i) { return vandq_u8(x.q[i], mask); });
    } else {
      return each([&](int i) { return vandq_u8(vshrq_n_u8(x.q[i], kRow * kBits), mask); });
    }
  }
  static Bytes operand8(const Bytes& x) {  // code - 128, signed
    return each([&](int i) { return veorq_u8(x.q[i], vdupq_n_u8(0x80)); });
  }
  static Lut load_lut(const int8_t* levels) { return vreinterpretq_u8_s8(vld1q_s8(levels)); }
  static Bytes lookup(const Bytes& codes, Lut lut) {
    return each([&](int i) { return vqtbl1q_u8(lut, codes.q[i]); });
  }

  static X4 broadcast4(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
  }
  template <Operand kOperand>
  static I32 dot(const I32& acc, const Bytes& w, X4 x) {  // codes are below 16: signed and unsigned agree
    static_assert(kOperand != Operand::kOffset, "SDOT wants signed weights");
    return each_i32([&](int i) { return vdotq_s32(acc.q[i], vreinterpretq_s8_u8(w.q[i]), x); });
  }

  static I32 zero_i32() {
    return each_i32([](int) { return vdupq_n_s32(0); });
  }
  static I32 add(const I32& a, const I32& b) {
    return each_i32([&](int i) { return vaddq_s32(a.q[i], b.q[i]); });
  }
  static I32 affine(const I32& t, int32_t a, int32_t b) {
    return each_i32([&](int i) { return vmlaq_n_s32(vdupq_n_s32(b), t.q[i], a); });
  }

  static F32 zero_f32() { return set1(0.0f); }
  static F32 to_f32(const I32& a) {
    return each_f32([&](int i) { return vcvtq_f32_s32(a.q[i]); });
  }
  static F32 set1(float x) {
    return each_f32([&](int) { return vdupq_n_f32(x); });
  }
  static F32 add(const F32& a, const F32& b) {
    return each_f32([&](int i) { return vaddq_f32(a.q[i], b.q[i]); });
  }
  static F32 mul(const F32& a, const F32& b) {
    return each_f32([&](int i) { return vmulq_f32(a.q[i], b.q[i]); });
  }
  static F32 fmadd(const F32& a, const F32& b, const F32& c) {
    return each_f32([&](int i) { return vfmaq_f32(c.q[i], a.q[i], b.q[i]); });
  }
  static F32 load_f32(const float* p) {
    return each_f32([&](int i) { return vld1q_f32(p + 4 * i); });
  }
  static F32 load_f32(const float* p, int count) {
    float lane[16] = {};
    std::memcpy(lane, p, static_cast<size_t>(count) * sizeof(float));
    return load_f32(lane);
  }
  static F32 load_half(const uint16_t* p) {
    return each_f32([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
  }
  static void store_f32(float* p, const F32& x, int count) {
    float lane[16];
    for (int i = 0; i < 4; ++i) vst1q_f32(lane + 4 * i, x.q[i]);
    std::memcpy(p, lane, static_cast<size_t>(count) * sizeof(float));
  }

  static Levels load_levels(const int8_t* levels) { return vld1q_s8(levels); }
  // Byte 0 of each word looks up its level; shifting up and down discards what the other bytes looked up and
  // extends the sign.
  template <int kBits, int kShift>
  static F32 level(const Bytes& x, Levels levels) {
    return each_f32([&](int i) {
      uint32x4_t code = vreinterpretq_u32_u8(x.q[i]);
      if constexpr (kShift > 0) code = vshrq_n_u32(code, kShift);
      int32x4_t value;
      if constexpr (kBits == 8) {
        value = vreinterpretq_s32_u32(veorq_u32(code, vdupq_n_u32(0x80)));
      } else {
        const uint32x4_t index = vandq_u32(code, vdupq_n_u32((1 << kBits) - 1));
        value = vreinterpretq_s32_s8(vqtbl1q_s8(levels, vreinterpretq_u8_u32(index)));
      }
      return vcvtq_f32_s32(vshrq_n_s32(vshlq_n_s32(value, 24), 24));
    });
  }

  static I32 magnitude_max(const I32& top, const F32& x) {
    return each_i32([&](int i) {
      return vmaxq_s32(top.q[i], vandq_s32(vreinterpretq_s32_f32(x.q[i]), vdupq_n_s32(0x7FFFFFFF)));
    });
  }
  static int32_t reduce_max(const I32& a) {
    return vmaxvq_s32(vmaxq_s32(vmaxq_s32(a.q[0], a.q[1]), vmaxq_s32(a.q[2], a.q[3])));
  }
  static int32_t reduce_add(const I32& a) {
    return vaddvq_s32(vaddq_s32(vaddq_s32(a.q[0], a.q[1]), vaddq_s32(a.q[2], a.q[3])));
  }
  static I32 round_store(const F32& x, int8_t* out) {
    const I32 r = each_i32([&](int i) { return vcvtnq_s32_f32(x.q[i]); });
    const int16x8_t low = vcombine_s16(vqmovn_s32(r.q[0]), vqmovn_s32(r.q[1]));
    const int16x8_t high = vcombine_s16(vqmovn_s32(r.q[2]), vqmovn_s32(r.q[3]));
    vst1q_s8(out, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
    return r;
  }
  static I32 round_store_tile(const float* x, const F32& scale, int8_t* out) {
    return round_store_vectors<Neon>(x, scale, out);
  }

  static F32 sub(const F32& a, const F32& b) {
    return each_f32([&](int i) { return vsubq_f32(a.q[i], b.q[i]); });
  }
  static F32 max(const F32& a, const F32& b) {  // a NaN stays one
    return each_f32([&](int i) { return vmaxq_f32(a.q[i], b.q[i]); });
  }
  static F32 min(const F32& a, const F32& b) {
    return each_f32([&](int i) { return vminq_f32(a.q[i], b.q[i]); });
  }
  static F32 round(const F32& x) {
    return each_f32([&](int i) { return vrndnq_f32(x.q[i]); });
  }
  static F32 scale_by_power(const F32& x, const F32& n) {
    return each_f32([&](int i) {
      const int32x4_t biased = vaddq_s32(vcvtq_s32_f32(n.q[i]), vdupq_n_s32(127));
      return vmulq_f32(x.q[i], vreinterpretq_f32_s32(vshlq_n_s32(biased, 23)));
    });
  }
  static float reduce_add(const F32& x) {
    return vaddvq_f32(vaddq_f32(vaddq_f32(x.q[0], x.q[1]), vaddq_f32(x.q[2], x.q[3])));
  }
  static float reduce_max(const F32& x) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.q[0], x.q[1]), vmaxq_f32(x.q[2], x.q[3])));
  }
  static F32 normal_cdf(const F32& x) { return normal_cdf_polynomial<Neon>(x); }
  static F32 exp2(const F32& t) { return exp2_polynomial<Neon>(t); }
  static F32 choose(uint16_t lanes, const F32& yes, const F32& no) {
    constexpr uint32_t kBit[4] = {1, 2, 4, 8};
    return each_f32([&](int i) {
      return vbslq_f32(vtstq_u32(vdupq_n_u32(lanes >> (4 * i)), vld1q_u32(kBit)), yes.q[i], no.q[i]);
    });
  }
  static void transpose_four(float32x4_t& a, float32x4_t& b, float32x4_t& c, float32x4_t& d) {
    const auto pairs = [](float32x4_t x) { return vreinterpretq_f64_f32(x); };
    const float64x2_t ab = pairs(vtrn1q_f32(a, b)), AB = pairs(vtrn2q_f32(a, b));
    const float64x2_t cd = pairs(vtrn1q_f32(c, d)), CD = pairs(vtrn2q_f32(c, d));
    a = vreinterpretq_f32_f64(vtrn1q_f64(ab, cd));
    b = vreinterpretq_f32_f64(vtrn1q_f64(AB, CD));
    c = vreinterpretq_f32_f64(vtrn2q_f64(ab, cd));
    d = vreinterpretq_f32_f64(vtrn2q_f64(AB, CD));
  }
  static void transpose(F32 (&x)[16]) {
    for (int r = 0; r < 16; r += 4) {
      for (int c = 0; c < 4; ++c) transpose_four(x[r].q[c], x[r + 1].q[c], x[r + 2].q[c], x[r + 3].q[c]);
    }
    for (int r = 0; r < 4; ++r) {
      for (int c = 0; c < r; ++c) {
        for (int i = 0; i < 4; ++i) std::swap(x[4 * r + i].q[c], x[4 * c + i].q[r]);
      }
    }
  }
};

}  // namespace
}  // namespace lowbit
