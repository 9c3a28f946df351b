// Rows between the matrix products, written once over the operations of a simd_<isa>-inl.h class S.
#pragma once

#include <cmath>

#include "forward_ops.h"
#include "quantize-inl.h"
#include "simd_common-inl.h"

namespace lowbit {
namespace {

constexpr float kMinusInfinity = -__builtin_inff(), kLog2E = 1.44269504f;

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

// e^(x - top) for x <= top within 3e-6 + 1e-7 |x| (relative); at most 1e-38 where x - top < -87.
// top is given as -top * log2(e).
template <class S>
LOWBIT_INLINE typename S::F32 exp_below(typename S::F32 x, typename S::F32 minus_top) {
  return S::exp2(S::fmadd(x, S::set1(kLog2E), minus_top));
}

// The sum of f(i) over the whole vectors of n values, four side by side: one alone would wait for each addition.
template <class S, class F>
LOWBIT_INLINE float add_up(int64_t n, const F& f) {
  typename S::F32 sum[4];
  unroll<4>([&](auto j) LOWBIT_LAMBDA { sum[j] = S::zero_f32(); });
  int64_t i = 0;
  for (; i + 64 <= n; i += 64)
    unroll<4>([&](auto j) LOWBIT_LAMBDA { sum[j] = S::add(sum[j], f(i + 16 * j)); });
  for (; i + 16 <= n; i += 16) sum[0] = S::add(sum[0], f(i));
  return S::reduce_add(S::add(S::add(sum[0], sum[1]), S::add(sum[2], sum[3])));
}

// Keeps the greatest magnitude of the vectors that pass.
template <class S>
struct Top {
  typename S::I32 bits = S::zero_i32();

  template <class Count>
  LOWBIT_INLINE void store(float* p, typename S::F32 x, Count count) {
    S::store_f32(p, x, count);
    if constexpr (std::is_same_v<Count, int>)
      x = S::choose(static_cast<uint16_t>((1 << count) - 1), x, S::zero_f32());
    add(x);
  }
  LOWBIT_INLINE void add(typename S::F32 x) { bits = S::magnitude_max(bits, x); }
  LOWBIT_INLINE float value() const { return bits_to_float(static_cast<uint32_t>(S::reduce_max(bits))); }
};

template <class S>
void quantize_row(const Job& job, int64_t m, float top) {
  const float *row = job.x + m * job.x_stride, *next = m + 1 < job.m ? row + job.x_stride : row;
  quantize_span<S, 4>(job, m, 0, row, {0, job.w.tiles_k()}, top, next);
}

// total: of the n values.
template <class S>
LOWBIT_INLINE float normalize(const float* x, float total, const NormWeights& norm, int64_t n, float* out) {
  using F32 = typename S::F32;
  const float mean = total / static_cast<float>(n);
  const F32 minus_mean = S::set1(-mean);
  float squares = add_up<S>(n, [&](int64_t i) LOWBIT_LAMBDA {
    const F32 d = S::add(S::load_f32(x + i), minus_mean);
    return S::mul(d, d);
  });
  for (int64_t i = n / 16 * 16; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const float variance = squares / static_cast<float>(n);
  const F32 scale = S::set1(1.0f / std::sqrt(variance + norm.eps));
  Top<S> top;
  for_vectors(n, [&](int64_t i, auto count) LOWBIT_LAMBDA {
    const F32 y = S::mul(S::add(load<S>(x + i, count), minus_mean), scale);
    top.store(out + i, S::fmadd(y, load<S>(norm.weight + i, count), load<S>(norm.bias + i, count)), count);
  });
  return top.value();
}

template <class S>
float layer_norm(const float* x, const NormWeights& norm, int64_t n, float* out) {
  float total = add_up<S>(n, [&](int64_t i) LOWBIT_LAMBDA { return S::load_f32(x + i); });
  for (int64_t i = n / 16 * 16; i < n; ++i) total += x[i];
  return normalize<S>(x, total, norm, n, out);
}

template <class S>
float add_norm(float* x, const float* y, const NormWeights& norm, int64_t n, float* out) {
  float total = add_up<S>(n, [&](int64_t i) LOWBIT_LAMBDA {
    const typename S::F32 sum = S::add(S::load_f32(x + i), S::load_f32(y + i));
    __builtin_prefetch(x + n + i);
    __builtin_prefetch(y + n + i);
    S::store_f32(x + i, sum, 16);
    return sum;
  });
  for (int64_t i = n / 16 * 16; i < n; ++i) total += x[i] += y[i];
  return normalize<S>(x, total, norm, n, out);
}

template <class S, Activation kActivation>
float activate_row(const float* x, int64_t n, float* out) {
  Top<S> top;
  for_vectors(n, [&](int64_t i, auto count) LOWBIT_LAMBDA {
    __builtin_prefetch(x + n + i);
    top.store(out + i, activate<S, kActivation>(load<S>(x + i, count)), count);
  });
  return top.value();
}

template <class S>
float magnitude(const float* x, int64_t n) {
  Top<S> top;
  for_vectors(n, [&](int64_t i, auto count) LOWBIT_LAMBDA {
    __builtin_prefetch(x + n + i);
    top.add(load<S>(x + i, count));
  });
  return top.value();
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
void rotate(const float* x, const float* cos, const float* sin, int64_t half, float* out) {
  for_vectors(half, [&](int64_t i, auto count) LOWBIT_LAMBDA {
    const typename S::F32 first = load<S>(x + i, count), second = load<S>(x + half + i, count);
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
  const typename S::F32 minus_top = S::set1(-top * kLog2E);
  for (int64_t i = 0; i < n; i += 16) {
    const typename S::F32 e = exp_below<S>(S::load_f32(x + i), minus_top);
    S::store_f32(x + i, e, 16);
    total = S::add(total, e);
  }
  return S::reduce_add(total);
}

template <class S>
LOWBIT_INLINE float greatest(const float* x, int64_t n) {
  typename S::F32 top[4];  // side by side: one alone would wait for each maximum
  unroll<4>([&](auto j) LOWBIT_LAMBDA { top[j] = S::load_f32(x); });
  int64_t i = 0;
  for (; i + 64 <= n; i += 64)
    unroll<4>([&](auto j) LOWBIT_LAMBDA { top[j] = S::max(S::load_f32(x + i + 16 * j), top[j]); });
  for (; i < n; i += 16) top[0] = S::max(S::load_f32(x + i), top[0]);
  return S::reduce_max(S::max(S::max(top[0], top[1]), S::max(top[2], top[3])));
}

template <class S>
void softmax_part(float* x, int64_t n, float* max, float* sum) {
  n = pad(x, n, kMinusInfinity);
  const float top = greatest<S>(x, n);
  const typename S::F32 minus_top = S::set1(-top * kLog2E);
  *max = top;
  *sum = add_up<S>(n, [&](int64_t i) LOWBIT_LAMBDA { return exp_below<S>(S::load_f32(x + i), minus_top); });
}

template <class S>
float log_sum_exp(float* max, float* sum, int64_t n) {
  pad(sum, n, 0.0f);
  n = pad(max, n, kMinusInfinity);
  const float top = greatest<S>(max, n);
  typename S::F32 total = S::zero_f32();
  const typename S::F32 minus_top = S::set1(-top * kLog2E);
  for (int64_t i = 0; i < n; i += 16) {
    total = S::fmadd(S::load_f32(sum + i), exp_below<S>(S::load_f32(max + i), minus_top), total);
  }
  return top + std::log(S::reduce_add(total));
}

}  // namespace
}  // namespace lowbit
