// Attention of one query over any set of tokens, which lie wherever their slots say.
#pragma once

#include "forward_ops-inl.h"

namespace lowbit {
namespace {

constexpr int kKeys = 4;  // whose products are summed side by side, to hide the latency of an addition

// products[i]: lanes whose sum is q k, for kKeys keys.
template <class S>
LOWBIT_INLINE void multiply_keys(const HeadQuery& query, const float* const (&key)[kKeys],
                                 typename S::F32* products) {
  unroll<kKeys>([&](auto i) LOWBIT_LAMBDA { products[i] = S::zero_f32(); });
  for_vectors(query.dim, [&](int64_t d, auto count) LOWBIT_LAMBDA {
    const typename S::F32 q = load<S>(query.q + d, count);
    unroll<kKeys>([&](auto i)
                      LOWBIT_LAMBDA { products[i] = S::fmadd(q, load<S>(key[i] + d, count), products[i]); });
  });
}

// scores[0..16) = q K^T for keys [first, first + 16), minus infinity where there are none.
template <class S>
LOWBIT_INLINE typename S::F32 score_keys(const HeadQuery& query, int64_t first, float* scores) {
  const int64_t left = query.count - first;
  const float* const* slots = query.slots + first;
  typename S::F32 products[16];
  if (left >= 16) {
    unroll<16 / kKeys>([&](auto g) LOWBIT_LAMBDA {
      const float* key[kKeys];
      unroll<kKeys>([&](auto i) LOWBIT_LAMBDA { key[i] = slots[g * kKeys + i] + query.key; });
      multiply_keys<S>(query, key, products + g * kKeys);
    });
    const typename S::F32 sums = S::reduce_add_each(products);
    S::store_f32(scores, sums, 16);
    return sums;
  }
  unroll<16>([&](auto i) LOWBIT_LAMBDA { products[i] = S::zero_f32(); });
  for (int64_t group = 0; group < left; group += kKeys) {
    const float* key[kKeys];
    for (int i = 0; i < kKeys; ++i) key[i] = slots[least(group + i, left - 1)] + query.key;
    multiply_keys<S>(query, key, products + group);
  }
  S::store_f32(scores, S::reduce_add_each(products), 16);
  for (int64_t i = left; i < 16; ++i) scores[i] = kMinusInfinity;
  return S::load_f32(scores);
}

// out[0..16 * kVectors) = scale * sum of weights times values; the last vector may be partial.
template <class S, int kVectors, class Count>
LOWBIT_INLINE void mix_values(const HeadQuery& query, int64_t first, const float* weights, float scale,
                              Count last, float* out) {
  typename S::F32 even[kVectors], odd[kVectors];
  unroll<kVectors>([&](auto v) LOWBIT_LAMBDA { even[v] = odd[v] = S::zero_f32(); });
  const auto accumulate = [&](int64_t j, typename S::F32(&sum)[kVectors]) LOWBIT_LAMBDA {
    const float* value = query.slots[j] + query.value + first;
    const typename S::F32 weight = S::set1(weights[j]);
    unroll<kVectors>([&](auto v) LOWBIT_LAMBDA {
      if constexpr (v + 1 < kVectors) {
        sum[v] = S::fmadd(weight, S::load_f32(value + 16 * v), sum[v]);
      } else {
        sum[v] = S::fmadd(weight, load<S>(value + 16 * v, last), sum[v]);
      }
    });
  };
  int64_t j = 0;
  for (; j + 2 <= query.count; j += 2) {
    accumulate(j, even);
    accumulate(j + 1, odd);
  }
  if (j < query.count) accumulate(j, even);
  unroll<kVectors>([&](auto v) LOWBIT_LAMBDA {
    S::store_f32(out + 16 * v, S::mul(S::add(even[v], odd[v]), S::set1(scale)), v + 1 < kVectors ? 16 : last);
  });
}

template <class S>
void attend(const HeadQuery& query, float* scores, float* out) {
  typename S::F32 top = S::set1(kMinusInfinity);
  for (int64_t j = 0; j < query.count; j += 16) top = S::max(score_keys<S>(query, j, scores + j), top);
  const int64_t padded = ceil_div(query.count, 16) * 16;
  const float scale = 1.0f / exponentiate<S>(scores, padded, S::reduce_max(top));
  int64_t d = 0;
  constexpr std::integral_constant<int, 16> kWhole;
  for (; d + 64 <= query.dim; d += 64) mix_values<S, 4>(query, d, scores, scale, kWhole, out + d);
  for (; d + 16 <= query.dim; d += 16) mix_values<S, 1>(query, d, scores, scale, kWhole, out + d);
  if (d < query.dim) mix_values<S, 1>(query, d, scores, scale, static_cast<int>(query.dim - d), out + d);
}

template <class S>
constexpr RowOps make_row_ops() {
  return {layer_norm<S>, {relu<S>, gelu<S>}, add<S>,         scale_add<S>, rotate<S>,
          attend<S>,     softmax_part<S>,    log_sum_exp<S>, subtract<S>};
}

}  // namespace
}  // namespace lowbit
