// Activations to int8, per row and span: q = round(x * (127 / max|x|)), scale = max|x| / 127.
#pragma once

#include "qlinear.h"
#include "simd_common-inl.h"

namespace lowbit {
namespace {

// Below this maximum 127 / max overflows; such a span quantizes to zeros (an absolute error below 1e-36).
constexpr float kSmallestMax = 1e-36f;

// GELU: x (1 + erf(x / sqrt 2)) / 2. A NaN stays one.
template <class S, Activation kActivation>
LOWBIT_INLINE typename S::F32 activate(const typename S::F32& x) {
  if constexpr (kActivation == kRelu) return S::max(S::zero_f32(), x);
  if constexpr (kActivation == kGelu) return S::mul(x, S::normal_cdf(x));
  return x;
}

// f(tile, its 64 inputs) for every tile of a span. A ragged last one is copied and zero-padded.
template <class F>
LOWBIT_INLINE void for_tiles(const float* row, Range tiles, int64_t k, const F& f) {
  const int64_t whole = least(tiles.end, k / kTileK);
  int64_t t = tiles.begin;
  for (; t < whole; ++t) f(t, row + t * kTileK);
  if (t == tiles.end) return;
  alignas(kAlign) float buffer[kTileK];
  for (int64_t i = 0; i < kTileK; ++i) buffer[i] = t * kTileK + i < k ? row[t * kTileK + i] : 0.0f;
  f(t, buffer);
}

// Asks for kLines lines of the memory that is read next: the core waits for a dozen lines at a time only, so that asking
// must go on throughout.
template <int kLines>
LOWBIT_INLINE void ask_for(const float* ahead) {
  unroll<kLines>([&](auto i) LOWBIT_LAMBDA { __builtin_prefetch(ahead + 16 * i); });
}

// ahead: what is read next, as long as half of the span.
template <class S>
LOWBIT_INLINE float max_magnitude(const float* row, Range tiles, int64_t k, const float* ahead) {
  typename S::I32 top = S::zero_i32();
  for_tiles(row, tiles, k, [&](int64_t t, const float* x) LOWBIT_LAMBDA {
    ask_for<2>(ahead + (t - tiles.begin) * 32);
    unroll<4>([&](auto i) LOWBIT_LAMBDA { top = S::magnitude_max(top, S::load_f32(x + 16 * i)); });
  });
  return bits_to_float(static_cast<uint32_t>(S::reduce_max(top)));  // NaN or infinity if the span holds any
}

// Span s of row m, whose greatest magnitude is known: NaN or infinity where it holds any. The row is in L1 by then.
// ahead: what is read next, kLines lines for each tile of the span.
template <class S, int kLines>
LOWBIT_INLINE void quantize_span(const Job& job, int64_t m, int64_t s, const float* row, Range tiles,
                                 float top, const float* ahead) {
  const int64_t at = m * job.w.spans() + s, stride = job.act.tile_stride;
  const bool finite = top - top == 0.0f;
  const typename S::F32 inverse = S::set1(finite && top > kSmallestMax ? 127.0f / top : 0.0f);
  typename S::I32 sum = S::zero_i32();
  int8_t* out = job.act.at(m, tiles.begin);
  for_tiles(row, tiles, job.w.k, [&](int64_t t, const float* x) LOWBIT_LAMBDA {
    ask_for<kLines>(ahead + (t - tiles.begin) * 16 * kLines);
    sum = S::add(sum, S::round_store_tile(x, inverse, out));
    out += stride;
  });
  job.act.scale[at] = finite ? top / 127.0f : bits_to_float(0x7FC00000u);
  job.act.sum[at] = finite ? S::reduce_add(sum) : 0;
}

template <class S>
void quantize_rows(const Job& job, Range rows) {
  const Matrix& w = job.w;
  const int64_t spans = w.spans(), span_tiles = w.span_tiles(), all_tiles = w.tiles_k();
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    const float *row = job.x + m * job.x_stride, *next = m + 1 < rows.end ? row + job.x_stride : row;
    for (int64_t s = 0; s < spans; ++s) {
      const Range tiles{s * span_tiles, least((s + 1) * span_tiles, all_tiles)};
      const float* ahead = next + tiles.begin * kTileK;
      const float top = max_magnitude<S>(row, tiles, w.k, ahead);
      quantize_span<S, 2>(job, m, s, row, tiles, top, ahead + tiles.size() * kTileK / 2);
    }
  }
}

}  // namespace
}  // namespace lowbit
