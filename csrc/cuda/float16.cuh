// fp16 and bf16 as bit patterns: tags, and portable conversions (round to nearest even).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace lowbit::gpu {

// How a code becomes a number without a conversion: OR it into the mantissa of kBase, whose last place is 1. The
// mantissa bits [kFirst, kFirst + kWindow) are used: from kFirst on, all constants of the affine maps are exact.
struct Fp16 {
  static constexpr uint32_t kMagic = 0x64006400u;  // 1024, twice
  static constexpr uint32_t kOne = 0x3C003C00u;
  static constexpr int kBase = 1024, kFirst = 2, kWindow = 8;
};
struct Bf16 {
  static constexpr uint32_t kMagic = 0x43004300u;  // 128, twice
  static constexpr uint32_t kOne = 0x3F803F80u;
  static constexpr int kBase = 128, kFirst = 3, kWindow = 4;
};

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = half >> 10 & 31u, fraction = half & 0x3FFu;
  if (exponent == 0) {
    const float value = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -value : value;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | fraction << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// `bits` of a double rounded to `digits` significant binary digits above 2^lowest; the caller packs them.
inline double round_to(double value, int digits, int lowest) {
  if (value == 0 || !std::isfinite(value)) return value;
  int exponent;
  std::frexp(value, &exponent);
  const int last = exponent - digits < lowest ? lowest : exponent - digits;  // weight of the last place
  return std::ldexp(std::nearbyint(std::ldexp(value, -last)), last);
}

inline uint16_t narrow(Fp16, double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000u : 0u;
  if (std::isnan(value)) return 0x7FFFu;
  const double rounded = std::fabs(round_to(value, 11, -24));
  if (rounded >= 65536.0) return static_cast<uint16_t>(sign | 0x7C00u);
  if (rounded < 0x1p-14) return static_cast<uint16_t>(sign | static_cast<uint16_t>(rounded * 0x1p24));
  int exponent;
  const double fraction = std::frexp(rounded, &exponent);  // [0.5, 1)
  return static_cast<uint16_t>(sign | ((exponent + 14) << 10 | (static_cast<int>(fraction * 2048) & 0x3FF)));
}

inline uint16_t narrow(Bf16, double value) {
  if (std::isnan(value)) return 0x7FFFu;
  const float rounded = static_cast<float>(round_to(value, 8, -133));
  uint32_t bits;
  std::memcpy(&bits, &rounded, 4);
  return static_cast<uint16_t>(bits >> 16);
}

inline double value_of(Fp16, uint32_t bits) { return half_to_float(static_cast<uint16_t>(bits)); }
inline double value_of(Bf16, uint32_t bits) {
  const uint32_t wide = bits << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// Products of two 8- or 11-bit numbers and their sum with a third are exact in a double for the values that occur.
template <class T>
inline uint32_t portable_fma2(T type, uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out = 0;
  for (int i = 0; i < 32; i += 16) {
    const double x = value_of(type, a >> i & 0xFFFFu), y = value_of(type, b >> i & 0xFFFFu);
    out |= static_cast<uint32_t>(narrow(type, x * y + value_of(type, c >> i & 0xFFFFu))) << i;
  }
  return out;
}

template <class T>
inline uint32_t pack_portable(T type, float low, float high) {
  return narrow(type, low) | static_cast<uint32_t>(narrow(type, high)) << 16;
}

}  // namespace lowbit::gpu
