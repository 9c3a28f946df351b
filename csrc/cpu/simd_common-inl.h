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

// f(count) with a constant argument, for a count from kFrom to kTo.
template <int kFrom, int kTo, class F>
LOWBIT_INLINE void with_constant(int64_t count, F&& f) {
  if constexpr (kFrom < kTo) {
    if (count > kFrom) return with_constant<kFrom + 1, kTo>(count, f);
  }
  f(std::integral_constant<int, kFrom>());
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

// round_store() of the 64 values x * scale. Returns sums whose total is that of the rounded values.
template <class S>
LOWBIT_INLINE typename S::I32 round_store_vectors(const float* x, const typename S::F32& scale, int8_t* out) {
  typename S::I32 sum = S::zero_i32();
  unroll<4>([&](auto i) LOWBIT_LAMBDA {
    sum = S::add(sum, S::round_store(S::mul(S::load_f32(x + 16 * i), scale), out + 16 * i));
  });
  return sum;
}

// (1 + erf(x / sqrt 2)) / 2: erf as c P(c^2) with c = x cut at +-5.1, where it is 1 - 3e-7, and P a Chebyshev fit in
// t = 2 c^2 / 5.1^2 - 1.
template <class S>
LOWBIT_INLINE typename S::F32 normal_cdf_polynomial(const typename S::F32& x) {
  constexpr float kP[13] = {0.138605282f,   -0.0690033585f,  0.0507830717f,  -0.0402159318f, 0.0317131244f,
                            -0.024036251f,  0.0174861047f,   -0.0119673014f, 0.00680116378f, -0.00329977204f,
                            0.00247637415f, -0.00192598358f, 0.000622676918f};
  const typename S::F32 c = S::min(S::set1(5.1f), S::max(S::set1(-5.1f), x));
  const typename S::F32 t = S::fmadd(S::mul(c, c), S::set1(0.0768935f), S::set1(-1.0f));
  typename S::F32 p = S::set1(kP[12]);
  unroll<12>([&](auto k) LOWBIT_LAMBDA { p = S::fmadd(p, t, S::set1(kP[11 - k])); });
  return S::fmadd(c, p, S::set1(0.5f));
}

// 2^f for 0 <= f <= 1 within 2.6e-6 (relative), by a fit of the least relative error.
template <class S>
LOWBIT_INLINE typename S::F32 power_of_fraction(const typename S::F32& f) {
  typename S::F32 p = S::set1(0.0135341724f);
  p = S::fmadd(p, f, S::set1(0.0520114638f));
  p = S::fmadd(p, f, S::set1(0.24144274f));
  p = S::fmadd(p, f, S::set1(0.693003833f));
  return S::fmadd(p, f, S::set1(1.00000262f));
}

// 2^t; about 1e-38 where t < -126.
template <class S>
LOWBIT_INLINE typename S::F32 exp2_polynomial(const typename S::F32& t) {
  const typename S::F32 cut = S::max(S::set1(-126.0f), t);  // a NaN stays one
  const typename S::F32 n = S::round(S::add(cut, S::set1(-0.5f)));
  return S::scale_by_power(power_of_fraction<S>(S::sub(cut, n)), n);
}

LOWBIT_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace
}  // namespace lowbit
