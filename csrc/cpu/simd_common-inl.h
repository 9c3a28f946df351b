// What all instruction sets share. Everything here and in the other -inl.h files has internal linkage: these
// headers are compiled once per instruction set, and a merged symbol could carry AVX-512 into the baseline.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../layout.h"

namespace lowbit {
namespace {

// What a byte of an unpacked weight vector means to dot().
enum class Operand {
  kCode,    // the code, unsigned:     level = a * code + b
  kOffset,  // the level + 128, unsigned
  kLevel,   // the level, signed
};

template <class F, int... kI>
LOWBIT_INLINE void unroll_impl(F&& f, std::integer_sequence<int, kI...>) {
  (f(std::integral_constant<int, kI>()), ...);
}

// f(0), f(1), ... f(kCount - 1) with constant arguments.
template <int kCount, class F>
LOWBIT_INLINE void unroll(F&& f) {
  unroll_impl(f, std::make_integer_sequence<int, kCount>());
}

LOWBIT_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

LOWBIT_INLINE float half_bits_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = half >> 10 & 31u, fraction = half & 0x3FFu;
  if (exponent == 0) {  // zero and subnormal: fraction * 2^-24
    const float value = static_cast<float>(fraction) * 5.9604644775390625e-8f;
    return sign ? -value : value;
  }
  return bits_to_float(sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | fraction << 13);
}

LOWBIT_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace
}  // namespace lowbit
