// Rows between the matrix products, written once over the operations of a simd_<isa>-inl.h class S.
#pragma once

#include <cmath>

#include "forward_ops.h"
#include "simd_common-inl.h"

namespace lowbit {
namespace {

constexpr float kMinusInfinity = -__builtin_inff();

// f(first, count) for every 16 of n values; count is a constant 16 but for the last ones.
template <class F>
LOWBIT_INLINE void for_vectors(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) f(i, std::integral_constant<int, 16>());
  if (i < n) f(i, static_cast<int>(n - i));
}

template <class S>
LOWBIT_INLINE typename S::F32 load(const float* p, std::integral_constant<int, 16>) {
  return S::load_f32(p);
}
template <class S>
LOWBIT_INLINE typename S::F32 load(const float* p, int count) {
  return S::load_f32(p, count);
}

// e^x within 1e-7, relative; e^-87 (about 1e-38) for all smaller x.
template <class S>
LOWBIT_INLINE typename S::F32 exp(typename S::F32 x) {
  using F32 = typename S::F32;
  x = S::min(S::set1(88.0f), S::max(S::set1(-87.0f), x));  // a NaN stays one
  const F32 n = S::round(S::mul(x, S::set1(1.44269504f)));
  // ln 2 in two parts, the first with trailing zeros, so that n times it is exact.
  const F32 r = S::fmadd(n, S::set1(2.12194440e-4f), S::fmadd(n, S::set1(-0.693359375f), x));
  // (e^r - 1 - r) / r^2 on |r| <= ln(2) / 2, Chebyshev fit.
  F32 p = S::set1(1.39336521e-3f);
  p = S::fmadd(p, r, S::set1(8.36318173e-3f));
  p = S::fmadd(p, r, S::set1(4.16664667e-2f));
  p = S::fmadd(p, r, S::set1(0.166665763f));
  p = S::fmadd(p, r, S::set1(0.5f));
  p = S::add(S::fmadd(S::mul(r, r), p, r), S::set1(1.0f));
  return S::scale_by_power(p, n);
}

// erf(x) within 4e-7: x P(x^2) on |x| <= 3.7, a Chebyshev fit in t = 2 x^2 / 3.7^2 - 1; 1 - 2e-7 beyond.
template <class S>
LOWBIT_INLINE typename S::F32 erf(typename S::F32 x) {
  constexpr float kP[14] = {0.382137507f,   -0.190467626f,   0.140790194f,   -0.112649113f,  0.0906161666f,
                            -0.0704047605f, 0.0515171885f,   -0.0363214761f, 0.0250565317f,  -0.013929789f,
                            0.00531083113f, -0.00384076592f, 0.00389556144f, -0.00144026778f};
  x = S::min(S::set1(3.7f), S::max(S::set1(-3.7f), x));
  const typename S::F32 t = S::fmadd(S::mul(x, x), S::set1(0.146092038f), S::set1(-1.0f));
  typename S::F32 p = S::set1(kP[13]);
  unroll<13>([&](auto i) LOWBIT_LAMBDA { p = S::fmadd(p, t, S::set1(kP[12 - i])); });
  return S::mul(x, p);
}

template <class S>
void layer_norm(const float* x, const NormWeights& norm, int64_t n, float* out) {
  using F32 = typename S::F32;
  F32 total = S::zero_f32();
  for_vectors(n, [&](int64_t i, auto count) LOWBIT_LAMBDA { total = S::add(total, load<S>(x + i, count)); });
  const float mean = S::reduce_add(total) / static_cast<float>(n);
  const F32 minus_mean = S::set1(-mean);
  F32 squares = S::zero_f32();
  for (int64_t i = 0; i + 16 <= n; i += 16) {
    const F32 d = S::add(S::load_f32(x + i), minus_mean);
    squares = S::fmadd(d, d, squares);
  }
  float rest = 0;  // lanes that a partial load fills with zeros would count as mean^2
  for (int64_t i = n / 16 * 16; i < n; ++i) rest += (x[i] - mean) * (x[i] - mean);
  const float variance = (S::reduce_add(squares) + rest) / static_cast<float>(n);
  const F32 scale = S::set1(1.0f / std::sqrt(variance + norm.eps));
  for_vectors(n, [&](int64_t i, auto count) LOWBIT_LAMBDA {
    const F32 y = S::mul(S::add(load<S>(x + i, count), minus_mean), scale);
    S::store_f32(out + i, S::fmadd(y, load<S>(norm.weight + i, count), load<S>(norm.bias + i, count)), count);
  });
}

template <class S>
void relu(const float* x, int64_t n, float* out) {
  for_vectors(n, [&](int64_t i, auto count) LOWBIT_LAMBDA {
    S::store_f32(out + i, S::max(S::zero_f32(), load<S>(x + i, count)), count);
  });
}

template <class S>
void gelu(const float* x, int64_t n, float* out) {
  for_vectors(n, [&](int64_t i, auto count) LOWBIT_LAMBDA {
    const typename S::F32 v = load<S>(x + i, count), half = S::mul(v, S::set1(0.5f));
    S::store_f32(out + i, S::fmadd(half, erf<S>(S::mul(v, S::set1(0.707106781f))), half), count);
  });
}

template <class S>
void add(float* x, const float* y, int64_t n) {
  for_vectors(n, [&](int64_t i, auto count) LOWBIT_LAMBDA {
    S::store_f32(x + i, S::add(load<S>(x + i, count), load<S>(y + i, count)), count);
  });
}

template <class S>
void scale_add(float* x, float scale, const float* y, int64_t n) {
  for_vectors(n, [&](int64_t i, auto count) LOWBIT_LAMBDA {
    const typename S::F32 v = S::mul(load<S>(x + i, count), S::set1(scale));
    S::store_f32(x + i, y == nullptr ? v : S::add(v, load<S>(y + i, count)), count);
  });
}

template <class S>
void subtract(const float* x, float by, int64_t n, float* out) {
  for_vectors(n, [&](int64_t i, auto count) LOWBIT_LAMBDA {
    S::store_f32(out + i, S::sub(load<S>(x + i, count), S::set1(by)), count);
  });
}

template <class S>
void rotate(const float* x, const float* cos, const float* sin, int64_t half, float scale, float* out) {
  for_vectors(half, [&](int64_t i, auto count) LOWBIT_LAMBDA {
    const typename S::F32 by = S::set1(scale);
    const typename S::F32 first = S::mul(load<S>(x + i, count), by);
    const typename S::F32 second = S::mul(load<S>(x + half + i, count), by);
    const typename S::F32 c = load<S>(cos + i, count), s = load<S>(sin + i, count);
    S::store_f32(out + i, S::sub(S::mul(first, c), S::mul(second, s)), count);
    S::store_f32(out + half + i, S::fmadd(second, c, S::mul(first, s)), count);
  });
}

LOWBIT_INLINE int64_t pad(float* x, int64_t n, float value) {
  for (; n % 16 != 0; ++n) x[n] = value;
  return n;
}

// Replaces the n (a multiple of 16) values by exp(x - top); returns their sum.
template <class S>
LOWBIT_INLINE float exponentiate(float* x, int64_t n, float top) {
  typename S::F32 total = S::zero_f32();
  for (int64_t i = 0; i < n; i += 16) {
    const typename S::F32 e = exp<S>(S::sub(S::load_f32(x + i), S::set1(top)));
    S::store_f32(x + i, e, 16);
    total = S::add(total, e);
  }
  return S::reduce_add(total);
}

template <class S>
LOWBIT_INLINE float greatest(const float* x, int64_t n) {
  typename S::F32 top = S::load_f32(x);
  for (int64_t i = 16; i < n; i += 16) top = S::max(S::load_f32(x + i), top);
  return S::reduce_max(top);
}

template <class S>
void softmax_part(float* x, int64_t n, float* max, float* sum) {
  n = pad(x, n, kMinusInfinity);
  const float top = greatest<S>(x, n);
  typename S::F32 total = S::zero_f32();
  for (int64_t i = 0; i < n; i += 16) {
    total = S::add(total, exp<S>(S::sub(S::load_f32(x + i), S::set1(top))));
  }
  *max = top;
  *sum = S::reduce_add(total);
}

template <class S>
float log_sum_exp(float* max, float* sum, int64_t n) {
  pad(sum, n, 0.0f);
  n = pad(max, n, kMinusInfinity);
  const float top = greatest<S>(max, n);
  typename S::F32 total = S::zero_f32();
  for (int64_t i = 0; i < n; i += 16) {
    total = S::fmadd(S::load_f32(sum + i), exp<S>(S::sub(S::load_f32(max + i), S::set1(top))), total);
  }
  return top + std::log(S::reduce_add(total));
}

}  // namespace
}  // namespace lowbit
