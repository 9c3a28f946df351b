// Attention in integers of a query alone, by VNNI.
#pragma once

#include "forward_digits-inl.h"

namespace lowbit {
namespace {

// Sums over dims or tokens by VPDPBUSD, which wants one side unsigned: keys and values, plus 128.
class Alone {
 public:
  Alone(const DigitHead& h, uint8_t* room) : h_(h), row_(h.record.row()) {
    const int64_t padded = ceil_div(h.tokens, kTileK) * kTileK;
    scores_ = reinterpret_cast<float*>(room);
    value_scale_ = scores_ + padded;
    weights_[0] = reinterpret_cast<int8_t*>(value_scale_ + padded);
    weights_[1] = weights_[0] + padded;
    query_[0] = weights_[1] + padded;
    query_[1] = query_[0] + row_;
  }
  static int64_t room(const DigitHead& h) {
    return ceil_div(h.tokens, kTileK) * kTileK * 10 + 2 * h.record.row();
  }

  void run() {
    const F32 scale = split_rows(h_.q, 0, 1, h_.record.dim, [&](int, int64_t d, const Digits& x) {
      _mm512_storeu_si512(query_[0] + d, in_order(x.high));
      _mm512_storeu_si512(query_[1] + d, in_order(x.low));
    });
    query_scale_ = _mm512_set1_ps(_mm512_cvtss_f32(query_scale(scale, h_.scale)));
    F32 top = _mm512_set1_ps(-__builtin_inff());
    __m512i most = _mm512_setzero_si512();
    for (int64_t j = 0; j < h_.tokens; j += kBlock) score_block(j, top, most);
    top = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    const F32 most_f32 = _mm512_castsi512_ps(_mm512_set1_epi32(_mm512_reduce_max_epi32(most)));
    const F32 factor = output_scale(most_f32, weigh_all(top, most_f32), top, query_scale_, h_.sum_bits);
    for (int64_t d = 0; d < row_; d += kTileK) mix(d, factor);
  }

 private:
  static __m512i flipped(const void* p) {
    return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(static_cast<char>(0x80)));
  }
  static int32_t total(const int8_t* x, int64_t n) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += kTileK)
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_loadu_si512(x + i));
    return _mm512_reduce_add_epi32(sum);
  }
  static __mmask16 first(int64_t left) { return Avx512::first(static_cast<int>(least(left, kBlock))); }

  void score_block(int64_t j, F32& top, __m512i& most) {
    const int count = static_cast<int>(least(h_.tokens - j, kBlock));
    const uint8_t* record[kBlock];
    for (int i = 0; i < kBlock; ++i) record[i] = record_of(h_, j + least(i, count - 1));
    const Scales scales(h_, record, count);
    __m512i high[16], mixed[16];
    for (int i = 0; i < kBlock; ++i) {
      high[i] = mixed[i] = _mm512_setzero_si512();
      const uint8_t* key = record[i] + h_.record.head(h_.head);
      for (int64_t d = 0; d < row_; d += kTileK) {
        const __m512i k0 = flipped(key + d), k1 = flipped(key + row_ + d);
        const __m512i q0 = _mm512_loadu_si512(query_[0] + d), q1 = _mm512_loadu_si512(query_[1] + d);
        high[i] = _mm512_dpbusd_epi32(high[i], k0, q0);
        mixed[i] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(mixed[i], k0, q1), k1, q0);
      }
    }
    const int32_t extra = 128 * total(query_[0], row_);
    const __m512i more_high = _mm512_set1_epi32(extra),
                  more_mixed = _mm512_set1_epi32(extra + 128 * total(query_[1], row_));
    const F32 s = score(_mm512_sub_epi32(combine_each(high, AddI32()), more_high),
                        _mm512_sub_epi32(combine_each(mixed, AddI32()), more_mixed),
                        _mm512_load_ps(scales.key), query_scale_);
    const F32 value_scale = _mm512_load_ps(scales.value);
    _mm512_storeu_ps(scores_ + j, s);
    _mm512_storeu_ps(value_scale_ + j, value_scale);
    top = _mm512_mask_max_ps(top, first(count), top, s);
    most = _mm512_max_epi32(most, _mm512_castps_si512(value_scale));
  }

  __m512i weigh_all(F32 top, F32 most) {
    const F32 shift = _mm512_sub_ps(_mm512_set1_ps(static_cast<float>(h_.sum_bits)), top);
    const F32 by = weight_scale(most, h_.sum_bits);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t j = 0; j < h_.tokens; j += kTileK) {
      __m512i x[4];
      for (int64_t at = j; at < j + kTileK; at += kBlock) {
        x[(at - j) / kBlock] = at < h_.tokens
                                   ? weigh(_mm512_loadu_ps(scores_ + at), shift, first(h_.tokens - at),
                                           _mm512_loadu_ps(value_scale_ + at), by, sum)
                                   : _mm512_setzero_si512();
      }
      const Digits p = digits(x);
      _mm512_storeu_si512(weights_[0] + j, in_order(p.high));
      _mm512_storeu_si512(weights_[1] + j, in_order(p.low));
    }
    return _mm512_set1_epi32(_mm512_reduce_add_epi32(sum));
  }

  // 64 dims of the output.
  void mix(int64_t d, F32 factor) {
    const int64_t padded = ceil_div(h_.tokens, kTileK) * kTileK,
                  value = h_.record.head(h_.head) + 2 * row_ + d;
    __m512i high[4], mixed[4];
    const int32_t extra = 128 * total(weights_[0], padded);
    for (int i = 0; i < 4; ++i) {
      high[i] = _mm512_set1_epi32(-extra);
      mixed[i] = _mm512_set1_epi32(-extra - 128 * total(weights_[1], padded));
    }
    for (int64_t j = 0; j < h_.tokens; j += 4) {
      __m512i v0[4], v1[4];
      for (int i = 0; i < 4; ++i) {
        const uint8_t* from = record_of(h_, least(j + i, h_.tokens - 1)) + value;
        v0[i] = flipped(from);
        v1[i] = flipped(from + row_);
      }
      interleave(v0);
      interleave(v1);
      const __m512i p0 = Avx512::broadcast4(weights_[0] + j), p1 = Avx512::broadcast4(weights_[1] + j);
      for (int i = 0; i < 4; ++i) {
        high[i] = _mm512_dpbusd_epi32(high[i], v0[i], p0);
        mixed[i] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(mixed[i], v0[i], p1), v1[i], p0);
      }
    }
    for (int i = 0; i < 4; ++i) {
      const int64_t left = h_.record.dim - d - i * kTileN;
      if (left > 0)
        store_part(h_.q + d + i * kTileN, _mm512_mul_ps(lowbit::value(high[i], mixed[i]), factor), left);
    }
  }

  const DigitHead& h_;
  const int64_t row_;
  F32 query_scale_;
  float *scores_, *value_scale_;
  int8_t *weights_[2], *query_[2];
};

}  // namespace
}  // namespace lowbit
