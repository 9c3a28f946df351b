// Portable C++: the twin that every SIMD operation is tested against, and the fallback on unknown machines.
// Defines the operations that qlinear-inl.h is written in; read this file to learn what each one means.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "simd_common-inl.h"

namespace lowbit {
namespace {

struct Scalar {
  struct Bytes {
    uint8_t v[64];
  };  // [16 outputs][4 inputs]
  struct I32 {
    int32_t v[16];
  };  // one lane an output
  struct F32 {
    float v[16];
  };
  struct X4 {
    int8_t v[4];
  };  // 4 consecutive activations, meant for all outputs
  using Lut = Bytes;   // 16 levels, in whatever form lookup() likes
  using Levels = F32;  // 16 levels as floats

  static constexpr int kAccumulators = 0;  // budget for the shift-free accumulators; 0: shift always
  // Of attention: keys, or dimensions of values, that are summed side by side.
  static constexpr int kAttentionKeys = 4, kAttentionDims = 4;
  static constexpr bool kLooksUpPacked = false;  // has lookup_packed(), for codes where they stand
  static constexpr int kPanelRows = 4, kPanelBlocks = 1, kMaxRows = 4, kExactBlocks = 1;
  static constexpr int blocks(int /*rows*/, int /*positions*/) { return 1; }
  static constexpr Operand operand(int bits, bool lookup) {
    return lookup || bits == 8 ? Operand::kLevel : Operand::kCode;
  }

  static Bytes load(const uint8_t* p) {
    Bytes r;
    std::memcpy(r.v, p, 64);
    return r;
  }
  static void store(uint8_t* p, const Bytes& x) { std::memcpy(p, x.v, 64); }

  // Row i of a packed vector, as plain codes.
  template <int kBits, int kRow>
  static Bytes codes(const Bytes& x) {
    Bytes r;
    for (int i = 0; i < 64; ++i) r.v[i] = static_cast<uint8_t>(x.v[i] >> (kRow * kBits) & ((1 << kBits) - 1));
    return r;
  }
  // The same, left in place (a multiple of 2^(kRow * kBits)).
  template <int kBits, int kRow>
  static Bytes codes_in_place(const Bytes& x) {
    Bytes r;
    for (int i = 0; i < 64; ++i)
      r.v[i] = static_cast<uint8_t>(x.v[i] & (((1 << kBits) - 1) << (kRow * kBits)));
    return r;
  }
  // Every row moved down by kShift bits; neighbours may leave theirs in the upper bits of a byte.
  template <int kShift>
  static Bytes move_down(Bytes x) {
    for (auto& byte : x.v) byte = static_cast<uint8_t>(byte >> kShift);
    return x;
  }
  // 8-bit codes -> the operand that operand() announces: code - 128 as int8, or the code itself.
  static Bytes operand8(const Bytes& x) {
    Bytes r;
    for (int i = 0; i < 64; ++i) r.v[i] = x.v[i] ^ 0x80;
    return r;
  }
  static Lut load_lut(const int8_t* levels) {
    Lut r;
    for (int i = 0; i < 64; ++i) r.v[i] = static_cast<uint8_t>(levels[i % 16]);
    return r;
  }
  static Bytes lookup(const Bytes& codes, const Lut& lut) {
    Bytes r;
    for (int i = 0; i < 64; ++i) r.v[i] = lut.v[codes.v[i]];
    return r;
  }

  static X4 broadcast4(const int8_t* p) {
    X4 r;
    std::memcpy(r.v, p, 4);
    return r;
  }
  // acc[n] += sum_j w[n][j] * x[j].
  template <Operand kOperand>
  static I32 dot(I32 acc, const Bytes& w, const X4& x) {
    for (int n = 0; n < 16; ++n) {
      for (int j = 0; j < 4; ++j) {
        const uint8_t byte = w.v[4 * n + j];
        acc.v[n] += (kOperand == Operand::kLevel ? static_cast<int8_t>(byte) : byte) * x.v[j];
      }
    }
    return acc;
  }

  static I32 zero_i32() { return I32{}; }
  static I32 add(I32 a, const I32& b) {
    for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
    return a;
  }
  template <int kShift>
  static I32 shift_right(I32 a) {
    for (int i = 0; i < 16; ++i) a.v[i] >>= kShift;
    return a;
  }
  // a * t + b, modulo 2^32: the true value fits, its parts need not.
  static I32 affine(I32 t, int32_t a, int32_t b) {
    for (int i = 0; i < 16; ++i) {
      t.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a) * static_cast<uint32_t>(t.v[i]) +
                                    static_cast<uint32_t>(b));
    }
    return t;
  }

  static F32 zero_f32() { return F32{}; }
  static F32 to_f32(const I32& a) {
    F32 r;
    for (int i = 0; i < 16; ++i) r.v[i] = static_cast<float>(a.v[i]);
    return r;
  }
  static F32 set1(float x) {
    F32 r;
    for (int i = 0; i < 16; ++i) r.v[i] = x;
    return r;
  }
  static F32 add(F32 a, const F32& b) {
    for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
    return a;
  }
  static F32 mul(F32 a, const F32& b) {
    for (int i = 0; i < 16; ++i) a.v[i] *= b.v[i];
    return a;
  }
  static F32 fmadd(const F32& a, const F32& b, F32 c) {
    for (int i = 0; i < 16; ++i) c.v[i] += a.v[i] * b.v[i];
    return c;
  }
  static F32 load_f32(const float* p) {
    F32 r;
    std::memcpy(r.v, p, 64);
    return r;
  }
  static F32 load_f32(const float* p, int count) {
    F32 r{};
    for (int i = 0; i < count; ++i) r.v[i] = p[i];
    return r;
  }
  static F32 load_half(const uint16_t* p) {
    F32 r;
    for (int i = 0; i < 16; ++i) r.v[i] = half_bits_to_float(p[i]);
    return r;
  }
  static void store_f32(float* p, const F32& x, int count) {
    for (int i = 0; i < count; ++i) p[i] = x.v[i];
  }

  static Levels load_levels(const int8_t* levels) {
    Levels r;
    for (int i = 0; i < 16; ++i) r.v[i] = levels[i];
    return r;
  }
  // The level of bits [kShift, kShift + kBits) of every output's 32-bit word.
  template <int kBits, int kShift>
  static F32 level(const Bytes& x, const Levels& levels) {
    F32 r;
    for (int n = 0; n < 16; ++n) {
      const int code = x.v[4 * n + kShift / 8] >> (kShift % 8) & ((1 << kBits) - 1);
      r.v[n] = kBits == 8 ? static_cast<float>(code - 128) : levels.v[code & 15];
    }
    return r;
  }

  // Bits of |x|: as integers they order like the magnitudes, and NaN > infinity > finite.
  static I32 magnitude_max(I32 top, const F32& x) {
    for (int i = 0; i < 16; ++i) {
      int32_t bits;
      std::memcpy(&bits, &x.v[i], 4);
      bits &= 0x7FFFFFFF;
      if (bits > top.v[i]) top.v[i] = bits;
    }
    return top;
  }
  static int32_t reduce_max(const I32& a) {
    int32_t r = a.v[0];
    for (int i = 1; i < 16; ++i) r = a.v[i] > r ? a.v[i] : r;
    return r;
  }
  static int32_t reduce_add(const I32& a) {
    int32_t r = 0;
    for (int i = 0; i < 16; ++i) r += a.v[i];
    return r;
  }
  // Rounds x to nearest even, stores 16 int8 and returns them. Non-finite x gives an unspecified int8.
  static I32 round_store(const F32& x, int8_t* out) {
    I32 r;
    for (int i = 0; i < 16; ++i) {
      r.v[i] = std::fabs(x.v[i]) <= 127.5f ? static_cast<int32_t>(std::nearbyint(x.v[i])) : 0;
      out[i] = static_cast<int8_t>(r.v[i]);
    }
    return r;
  }
  // Rounds the 64 values x * scale to int8. Returns sums whose total is that of the rounded values.
  static I32 round_store_tile(const float* x, const F32& scale, int8_t* out) {
    return round_store_vectors<Scalar>(x, scale, out);
  }

  // For the elementwise part of a forward (float-inl.h).
  static F32 sub(F32 a, const F32& b) {
    for (int i = 0; i < 16; ++i) a.v[i] -= b.v[i];
    return a;
  }
  // b where either is NaN.
  static F32 max(const F32& a, F32 b) {
    for (int i = 0; i < 16; ++i) b.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return b;
  }
  static F32 min(const F32& a, F32 b) {
    for (int i = 0; i < 16; ++i) b.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
    return b;
  }
  static F32 round(F32 x) {  // to nearest, ties to even
    for (int i = 0; i < 16; ++i) x.v[i] = std::nearbyint(x.v[i]);
    return x;
  }
  // x * 2^n for whole n in [-126, 127].
  static F32 scale_by_power(F32 x, const F32& n) {
    for (int i = 0; i < 16; ++i)
      x.v[i] *= bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23);
    return x;
  }
  static float reduce_add(const F32& x) {
    float r = 0;
    for (int i = 0; i < 16; ++i) r += x.v[i];
    return r;
  }
  static float reduce_max(const F32& x) {
    float r = x.v[0];
    for (int i = 1; i < 16; ++i) r = x.v[i] > r ? x.v[i] : r;
    return r;
  }
  // (1 + erf(x / sqrt 2)) / 2 within 2e-6 / |x|.
  static F32 normal_cdf(const F32& x) { return normal_cdf_polynomial<Scalar>(x); }
  static F32 exp2(const F32& t) { return exp2_polynomial<Scalar>(t); }
  // Lane i of `yes` where bit i of lanes is set, else of `no`.
  static F32 choose(uint16_t lanes, const F32& yes, F32 no) {
    for (int i = 0; i < 16; ++i) no.v[i] = lanes >> i & 1 ? yes.v[i] : no.v[i];
    return no;
  }
  static void transpose(F32 (&x)[16]) {
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < i; ++j) std::swap(x[i].v[j], x[j].v[i]);
    }
  }
};

}  // namespace
}  // namespace lowbit
