// Attention of queries over any set of tokens, which lie wherever their slots say.
//
// A query comes alone (decoding), or sixteen come together, one a lane (scoring). Both add in the same order, so that
// an output has the same bits either way:
//
//   score = q0 k0 + q1 k1 + ...        total = e0 + e1 + ...        out = (e0 v0 + e1 v1 + ...) * (1 / total)
#pragma once

#include "forward_ops-inl.h"

namespace lowbit {
namespace {

// scores[0..16) = q K^T for keys [first, first + 16), minus infinity where there are none.
template <class S>
LOWBIT_INLINE typename S::F32 score_keys(const HeadQuery& query, int64_t first, float* scores) {
  const int64_t left = query.count - first;
  typename S::F32 sum = S::zero_f32();
  for_vectors(query.dim, [&](int64_t d, auto count) LOWBIT_LAMBDA {
    typename S::F32 k[16];
    unroll<16>([&](auto i) LOWBIT_LAMBDA {
      k[i] = load<S>(query.slots[first + least(i, left - 1)] + query.key + d, count);
    });
    S::transpose(k);
    for (int i = 0; i < count; ++i) sum = S::fmadd(S::set1(query.q[d + i]), k[i], sum);
  });
  if (left < 16) sum = S::choose(static_cast<uint16_t>((1 << left) - 1), sum, S::set1(kMinusInfinity));
  S::store_f32(scores, sum, 16);
  return sum;
}

// out[0..16 * kVectors) = the weighted mean of values; the last vector may be partial.
template <class S, int kVectors, class Count>
LOWBIT_INLINE void mix_values(const HeadQuery& query, int64_t first, const float* weights, Count last,
                              float* out) {
  typename S::F32 sum[kVectors], total = S::zero_f32();
  unroll<kVectors>([&](auto v) LOWBIT_LAMBDA { sum[v] = S::zero_f32(); });
  for (int64_t j = 0; j < query.count; ++j) {
    const float* value = query.slots[j] + query.value + first;
    const typename S::F32 weight = S::set1(weights[j]);
    total = S::add(total, weight);
    unroll<kVectors>([&](auto v) LOWBIT_LAMBDA {
      if constexpr (v + 1 < kVectors) {
        sum[v] = S::fmadd(weight, S::load_f32(value + 16 * v), sum[v]);
      } else {
        sum[v] = S::fmadd(weight, load<S>(value + 16 * v, last), sum[v]);
      }
    });
  }
  const typename S::F32 scale = S::set1(1.0f / S::reduce_max(total));
  unroll<kVectors>([&](auto v) LOWBIT_LAMBDA {
    S::store_f32(out + 16 * v, S::mul(sum[v], scale), v + 1 < kVectors ? 16 : last);
  });
}

template <class S>
void attend(const HeadQuery& query, float* scores, float* out) {
  typename S::F32 top = S::set1(kMinusInfinity);
  for (int64_t j = 0; j < query.count; j += 16) top = S::max(score_keys<S>(query, j, scores + j), top);
  const typename S::F32 minus_top = S::set1(-S::reduce_max(top) * kLog2E);
  for (int64_t j = 0; j < query.count; j += 16)
    S::store_f32(scores + j, exp_below<S>(S::load_f32(scores + j), minus_top), 16);
  int64_t d = 0;
  constexpr std::integral_constant<int, 16> kWhole;
  for (; d + 64 <= query.dim; d += 64) mix_values<S, 4>(query, d, scores, kWhole, out + d);
  for (; d + 16 <= query.dim; d += 16) mix_values<S, 1>(query, d, scores, kWhole, out + d);
  if (d < query.dim) mix_values<S, 1>(query, d, scores, static_cast<int>(query.dim - d), out + d);
}

// turned[d][i] = scale * q[i][d], 0 for queries that do not exist.
template <class S>
LOWBIT_INLINE void turn_queries(const HeadBlock& block, float* turned) {
  for_vectors(block.dim, [&](int64_t d, auto count) LOWBIT_LAMBDA {
    typename S::F32 q[16];
    unroll<16>([&](auto i) LOWBIT_LAMBDA {
      q[i] = i < block.queries
                 ? S::mul(load<S>(block.q + i * block.q_stride + d, count), S::set1(block.scale))
                 : S::zero_f32();
    });
    S::transpose(q);
    unroll<16>([&](auto i) LOWBIT_LAMBDA { S::store_f32(turned + 16 * (d + i), q[i], 16); });
  });
}

// scores[j][i] = q[i] k[j], minus infinity where query i does not see key j. Returns the maximum of each query.
template <class S>
LOWBIT_INLINE typename S::F32 score_together(const HeadBlock& block, const float* turned, float* scores) {
  constexpr int kKeys = S::kAttentionKeys;
  typename S::F32 top = S::set1(kMinusInfinity);
  for (int64_t j = 0; j < block.count; j += kKeys) {
    const float* key[kKeys];
    typename S::F32 sum[kKeys];
    unroll<kKeys>([&](auto i) LOWBIT_LAMBDA {
      key[i] = block.slots[least(j + i, block.count - 1)] + block.key;
      sum[i] = S::zero_f32();
    });
    const auto add = [&](int64_t d) LOWBIT_LAMBDA {
      const typename S::F32 q = S::load_f32(turned + 16 * d);
      unroll<kKeys>([&](auto i) LOWBIT_LAMBDA { sum[i] = S::fmadd(q, S::set1(key[i][d]), sum[i]); });
    };
    int64_t d = 0;
    for (; d + 4 <= block.dim; d += 4) unroll<4>([&](auto i) LOWBIT_LAMBDA { add(d + i); });
    for (; d < block.dim; ++d) add(d);
    for (int i = 0; i < kKeys && j + i < block.count; ++i) {
      const typename S::F32 seen = S::choose(block.lanes[j + i], sum[i], S::set1(kMinusInfinity));
      S::store_f32(scores + 16 * (j + i), seen, 16);
      top = S::max(seen, top);
    }
  }
  return top;
}

// Replaces scores by exp(score - top), 0 where a key is not seen. Returns the sum for each query.
template <class S>
LOWBIT_INLINE typename S::F32 weigh_together(const HeadBlock& block, typename S::F32 top, float* scores) {
  const typename S::F32 minus_top = S::mul(top, S::set1(-kLog2E));
  typename S::F32 total = S::zero_f32();
  for (int64_t j = 0; j < block.count; ++j) {
    const typename S::F32 e = exp_below<S>(S::load_f32(scores + 16 * j), minus_top);
    const typename S::F32 weight = S::choose(block.lanes[j], e, S::zero_f32());
    S::store_f32(scores + 16 * j, weight, 16);
    total = S::add(total, weight);
  }
  return total;
}

// mixed[d][i] = sum over keys of their weight for query i times their value, for kDims dimensions.
template <class S, int kDims>
LOWBIT_INLINE void mix_together(const HeadBlock& block, int64_t first, const float* weights, float* mixed) {
  typename S::F32 sum[kDims];
  unroll<kDims>([&](auto d) LOWBIT_LAMBDA { sum[d] = S::zero_f32(); });
  for (int64_t j = 0; j < block.count; ++j) {
    const float* value = block.slots[j] + block.value + first;
    const typename S::F32 weight = S::load_f32(weights + 16 * j);
    unroll<kDims>([&](auto d) LOWBIT_LAMBDA { sum[d] = S::fmadd(weight, S::set1(value[d]), sum[d]); });
  }
  unroll<kDims>([&](auto d) LOWBIT_LAMBDA { S::store_f32(mixed + 16 * (first + d), sum[d], 16); });
}

template <class S>
void attend_together(const HeadBlock& block, float* room, float* out) {
  float *turned = room, *scores = room + ceil_div(block.dim, 16) * 256;
  turn_queries<S>(block, turned);
  const typename S::F32 top = score_together<S>(block, turned, scores);
  const typename S::F32 total = weigh_together<S>(block, top, scores);
  int64_t d = 0;
  for (; d + S::kAttentionDims <= block.dim; d += S::kAttentionDims)
    mix_together<S, S::kAttentionDims>(block, d, scores, turned);
  for (; d < block.dim; ++d) mix_together<S, 1>(block, d, scores, turned);

  alignas(kAlign) float inverse[16];
  S::store_f32(inverse, total, 16);
  for (float& x : inverse) x = 1.0f / x;
  const typename S::F32 scale = S::load_f32(inverse);
  for_vectors(block.dim, [&](int64_t d, auto count) LOWBIT_LAMBDA {
    typename S::F32 y[16];
    unroll<16>([&](auto i) LOWBIT_LAMBDA { y[i] = S::mul(S::load_f32(turned + 16 * (d + i)), scale); });
    S::transpose(y);
    for (int i = 0; i < block.queries; ++i) {
      if (block.wanted >> i & 1) S::store_f32(out + i * block.q_stride + d, y[i], count);
    }
  });
}

template <class S>
constexpr RowOps make_row_ops() {
  return {layer_norm<S>,   add_norm<S>,     {activate_row<S, kRelu>, activate_row<S, kGelu>},
          magnitude<S>,    quantize_row<S>, scale_add<S>,
          rotate<S>,       attend<S>,       attend_together<S>,
          softmax_part<S>, log_sum_exp<S>,  subtract<S>};
}

}  // namespace
}  // namespace lowbit
