// The nearest level to every weight of a row. The arithmetic is that of tools/training/quantized.py, operation by
// operation, so that both give the same bits; plain loops, which compilers vectorize for every instruction set.
#pragma once

#include <cmath>

#include "../cpu/simd_common-inl.h"
#include "train_ops.h"

namespace lowbit {
namespace {

struct AffineLevels {
  float inverse, offset, shift, bottom, top;
  explicit AffineLevels(const LevelTable& t, float scale)
      : inverse(1.0f / (scale * t.a)), offset(-t.b / t.a), shift(t.b / t.a), bottom(t.bottom), top(t.top) {}
  // level / a
  LOWBIT_INLINE float operator()(float v) const {
    float code = std::nearbyint(v * inverse + offset);
    code = code < bottom ? bottom : code;  // a NaN stays one
    code = code > top ? top : code;
    return code + shift;
  }
};

template <int kCount>
struct ListedLevels {
  float scale, level[kCount], boundary[kCount - 1];
  explicit ListedLevels(const LevelTable& t, float s) : scale(s) {
    for (int i = 0; i < kCount; ++i) level[i] = t.level[i < t.count ? i : t.count - 1];
    for (int i = 0; i + 1 < kCount; ++i) boundary[i] = i + 1 < t.count ? t.boundary[i] : __builtin_inff();
  }
  LOWBIT_INLINE float operator()(float v) const {
    const float unit = v / scale;
    float found = level[0];
    unroll<kCount - 1>([&](auto i) LOWBIT_LAMBDA { found = unit > boundary[i] ? level[i + 1] : found; });
    return found;
  }
};

// f(levels, factor): a rounding to the table's levels, and what turns its results into levels.
template <class F>
LOWBIT_INLINE void with_levels(const LevelTable& table, float scale, const F& f) {
  if (table.affine) {
    f(AffineLevels(table, scale), table.a);
  } else if (table.count <= 4) {
    f(ListedLevels<4>(table, scale), 1.0f);
  } else {
    f(ListedLevels<16>(table, scale), 1.0f);
  }
}

void nearest(const LevelTable& table, const float* v, int64_t n, float scale, float* out) {
  with_levels(table, scale, [&](const auto& levels, float factor) LOWBIT_LAMBDA {
    const float step = scale * factor;
    for (int64_t i = 0; i < n; ++i) out[i] = levels(v[i]) * step;
  });
}

void correlate(const LevelTable& table, const float* v, int64_t n, float scale, float* tv, float* tt) {
  with_levels(table, scale, [&](const auto& levels, float factor) LOWBIT_LAMBDA {
    float product[16] = {}, square[16] = {};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
      for (int j = 0; j < 16; ++j) {
        const float t = levels(v[i + j]);
        product[j] += t * v[i + j];
        square[j] += t * t;
      }
    }
    for (; i < n; ++i) {
      const float t = levels(v[i]);
      product[0] += t * v[i];
      square[0] += t * t;
    }
    float a = 0, b = 0;
    for (int j = 0; j < 16; ++j) {
      a += product[j];
      b += square[j];
    }
    *tv = a * factor;
    *tt = b * (factor * factor);
  });
}

}  // namespace
}  // namespace lowbit
