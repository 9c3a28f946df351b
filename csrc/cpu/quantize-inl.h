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

// The 64 inputs of a tile; a ragged last tile is copied and zero-padded.
LOWBIT_INLINE const float* tile_inputs(const float* row, int64_t tile, int64_t k, float (&buffer)[kTileK]) {
  const int64_t first = tile * kTileK, left = k - first;
  if (left >= kTileK) return row + first;
  for (int64_t i = 0; i < kTileK; ++i) buffer[i] = i < left ? row[first + i] : 0.0f;
  return buffer;
}

template <class S>
LOWBIT_INLINE float max_magnitude(const float* row, Range tiles, int64_t k) {
  typename S::I32 top = S::zero_i32();
  for (int64_t t = tiles.begin; t < tiles.end; ++t) {
    alignas(kAlign) float buffer[kTileK];
    const float* x = tile_inputs(row, t, k, buffer);
    unroll<4>([&](auto i) LOWBIT_LAMBDA { top = S::magnitude_max(top, S::load_f32(x + 16 * i)); });
  }
  return bits_to_float(static_cast<uint32_t>(S::reduce_max(top)));  // NaN or infinity if the span holds any
}

// Span s of row m, whose greatest magnitude is known: NaN or infinity where it holds any. The row is in L1 by then;
// the next one is asked for meanwhile.
template <class S>
LOWBIT_INLINE void quantize_span(const Job& job, int64_t m, int64_t s, const float* row, Range tiles,
                                 float top) {
  const int64_t at = m * job.w.spans() + s;
  const bool finite = top - top == 0.0f;
  const typename S::F32 inverse = S::set1(finite && top > kSmallestMax ? 127.0f / top : 0.0f);
  const float* next = row + (m + 1 < job.m ? job.x_stride : 0);
  typename S::I32 sum = S::zero_i32();
  for (int64_t t = tiles.begin; t < tiles.end; ++t) {
    alignas(kAlign) float buffer[kTileK];
    for (int64_t k = t * kTileK; k < (t + 1) * kTileK; k += 16) __builtin_prefetch(next + k);
    sum = S::add(sum, S::round_store_tile(tile_inputs(row, t, job.w.k, buffer), inverse, job.act.at(m, t)));
  }
  job.act.scale[at] = finite ? top / 127.0f : bits_to_float(0x7FC00000u);
  job.act.sum[at] = finite ? S::reduce_add(sum) : 0;
}

template <class S>
void quantize_rows(const Job& job, Range rows) {
  const Matrix& w = job.w;
  const int64_t spans = w.spans(), span_tiles = w.span_tiles(), all_tiles = w.tiles_k();
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    const float* row = job.x + m * job.x_stride;
    for (int64_t s = 0; s < spans; ++s) {
      const Range tiles{s * span_tiles, least((s + 1) * span_tiles, all_tiles)};
      quantize_span<S>(job, m, s, row, tiles, max_magnitude<S>(row, tiles, w.k));
    }
  }
}

}  // namespace
}  // namespace lowbit
