// The products of a linear layer on bf16 tiles. B, the operand that all rows share, is packed once by all threads; A is
// read as it lies, or transposed by the thread that multiplies it. Two A and two B tiles feed four accumulators.
#include "../cpu/parallel.h"
#include "bf16_pack-inl.h"
#include "linear.h"

namespace lowbit {
namespace {

constexpr int64_t kBytesInL2 = 512 << 10;  // of B, while all rows of A pass by
constexpr int64_t kSumSteps = 16;  // steps that sums of long products stay in tiles: A and B stay near
constexpr int64_t kSumGroups = 16, kSumPanels = 16;
constexpr int64_t kSumBytes = kSumGroups * kSumPanels * kTileBytes;
constexpr int64_t kLong = 64;  // steps

template <int kTile>
LOWBIT_INLINE void tile_load_rows(const uint8_t* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
}
template <int kC, int kA, int kB>
LOWBIT_INLINE void tile_dot_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

// Groups of 16 rows as A tiles: tile t of group g.
struct ATiles {
  const uint8_t* base;
  int64_t group, step, row;  // strides in bytes
  int64_t last = -1;         // the group that lies at tail instead: its rows end early
  const uint8_t* tail = nullptr;
  const uint8_t* at(int64_t g) const { return g == last ? tail : base + g * group; }
};

// kA groups x kB panels, over `steps` steps of 32 values: c[kB * i + j] (+)= 16 x 16 sums
template <int kA, int kB>
LOWBIT_INLINE void multiply(const ATiles& a, int64_t g, const uint8_t* const (&b)[2], int64_t steps, bool add,
                            float* c) {
  unroll<kA * kB>([&](auto i) LOWBIT_LAMBDA {
    if (add) {
      tile_load<i>(c + 256 * i);
    } else {
      tile_zero<i>();
    }
  });
  const uint8_t* rows[2] = {a.at(g), a.at(g + kA - 1)};
  const int64_t a_step = a.step, a_row = a.row;
  for (int64_t t = 0; t < steps; ++t) {
    unroll<kB>([&](auto j) LOWBIT_LAMBDA { tile_load_rows<6 + j>(b[j] + t * kTileBytes, 64); });
    unroll<kA>([&](auto i) LOWBIT_LAMBDA {
      tile_load_rows<4 + i>(rows[i] + t * a_step, a_row);
      unroll<kB>([&](auto j) LOWBIT_LAMBDA { tile_dot_bf16<kB * i + j, 4 + i, 6 + j>(); });
    });
  }
  unroll<kA * kB>([&](auto i) LOWBIT_LAMBDA { tile_store<i>(c + 256 * i); });
}

// f(groups, panels) as constants, 1 or 2: what is left of both.
template <class F>
LOWBIT_INLINE void by_pairs(int64_t groups, int64_t panels, const F& f) {
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  if (groups >= 2 && panels >= 2) {
    f(Two(), Two());
  } else if (groups >= 2) {
    f(Two(), One());
  } else if (panels >= 2) {
    f(One(), Two());
  } else {
    f(One(), One());
  }
}

// store(group, panel, sums, groups, panels) for the groups first .. last - 1 and all panels of B. A pair of groups
// stays in L1 while panels pass by, so that rows of the result are written from left to right.
template <class F>
LOWBIT_INLINE void product(const ATiles& a, int64_t first, int64_t last, const uint8_t* b, int64_t panels,
                           int64_t steps, const F& store) {
  alignas(64) float c[4 * 256];
  const int64_t panel_bytes = steps * kTileBytes, together = least(panels, kBytesInL2 / panel_bytes / 2 * 2);
  for (int64_t from = 0; from < panels; from += together) {
    const int64_t to = least(from + together, panels);
    for (int64_t g = first; g < last; g += 2) {
      for (int64_t p = from; p < to; p += 2) {
        by_pairs(last - g, to - p, [&](auto tall, auto wide) LOWBIT_LAMBDA {
          const uint8_t* const at[2] = {b + p * panel_bytes, b + (p + wide - 1) * panel_bytes};
          multiply<tall, wide>(a, g, at, steps, false, c);
          store(g, p, c, tall, wide);
        });
      }
    }
  }
}

// The same for long rows: some groups and panels take kSumSteps steps at a time, their sums waiting in scratch, so
// that A is read once.
template <class F>
LOWBIT_INLINE void long_product(const ATiles& a, int64_t first, int64_t last, const uint8_t* b,
                                int64_t panels, int64_t steps, float* sums, const F& store) {
  const int64_t panel_bytes = steps * kTileBytes;
  for (int64_t from = 0; from < panels; from += kSumPanels) {
    const int64_t to = least(from + kSumPanels, panels);
    for (int64_t top = first; top < last; top += kSumGroups) {
      const int64_t bottom = least(top + kSumGroups, last);
      for (int64_t t = 0; t < steps; t += kSumSteps) {
        const int64_t length = least(kSumSteps, steps - t);
        ATiles here = a;
        here.base += t * a.step;
        if (here.tail != nullptr) here.tail += t * a.step;
        for (int64_t g = top; g < bottom; g += 2) {
          for (int64_t p = from; p < to; p += 2) {
            by_pairs(bottom - g, to - p, [&](auto tall, auto wide) LOWBIT_LAMBDA {
              float* c = sums + ((g - top) * kSumPanels + 2 * (p - from)) * 256;
              const uint8_t* const at[2] = {b + p * panel_bytes + t * kTileBytes,
                                            b + (p + wide - 1) * panel_bytes + t * kTileBytes};
              multiply<tall, wide>(here, g, at, length, t > 0, c);
              if (t + length == steps) store(g, p, c, tall, wide);
            });
          }
        }
      }
    }
  }
}

struct StoreBf16 {
  Rows<uint16_t> y;
  int64_t m, n;
  const float* bias;

  LOWBIT_INLINE __m512 shift(int64_t p) const {
    return bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(first_of(n - 16 * p), bias + 16 * p);
  }
  template <class A, class B>
  LOWBIT_INLINE void operator()(int64_t g, int64_t p, const float* c, A tall, B wide) const {
    const int64_t rows = least(16 * tall, m - 16 * g);
    uint16_t* out = y.data + 16 * g * y.stride + 16 * p;
    const __m512 shift0 = shift(p), shift1 = shift(p + wide - 1);
    if (wide == 2 && 16 * p + 32 <= n) {  // whole cache lines
      for (int64_t i = 0; i < rows; ++i) {
        const float* from = c + 512 * (i / 16) + 16 * (i % 16);
        const __m512 x0 = _mm512_add_ps(_mm512_load_ps(from), shift0);
        const __m512 x1 = _mm512_add_ps(_mm512_load_ps(from + 256), shift1);
        _mm512_storeu_si512(out + i * y.stride, (__m512i)_mm512_cvtne2ps_pbh(x1, x0));
      }
      return;
    }
    for (int64_t i = 0; i < rows; ++i) {
      const float* from = c + 256 * wide * (i / 16) + 16 * (i % 16);
      store_some(out + i * y.stride, _mm512_add_ps(_mm512_load_ps(from), shift0), n - 16 * p);
      if (wide == 2) {
        store_some(out + i * y.stride + 16, _mm512_add_ps(_mm512_load_ps(from + 256), shift1),
                   n - 16 * p - 16);
      }
    }
  }
  static LOWBIT_INLINE void store_some(uint16_t* out, __m512 x, int64_t count) {
    _mm256_mask_storeu_epi16(out, first_of(count), (__m256i)_mm512_cvtneps_pbh(x));
  }
};

struct Range {
  int64_t first, last;
};

LOWBIT_INLINE Range share(const Team& team, int64_t count) {
  return {count * team.rank / team.size, count * (team.rank + 1) / team.size};
}

LOWBIT_INLINE Range share_pairs(const Team& team, int64_t groups) {  // two groups together, but for the last
  const Range pairs = share(team, ceil_div(groups, 2));
  return {2 * pairs.first, least(2 * pairs.last, groups)};
}

void configure_tiles() {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = 64;
    config.rows[i] = kTileRows;
  }
  load_config(config);
}

// The rows of x [m, k] as A tiles; where m is no multiple of 16, the last rows are copied to tail [16, stride], which
// ends with zeros.
ATiles rows_as_tiles(Rows<const uint16_t> x, int64_t m, uint16_t* tail) {
  const int64_t row = 2 * x.stride, whole = m / kTileRows, left = m - whole * kTileRows;
  ATiles a{reinterpret_cast<const uint8_t*>(x.data), kTileRows * row, 2 * kTileDepth, row};
  if (left != 0) {
    std::memset(tail, 0, static_cast<size_t>(kTileRows * row));
    std::memcpy(tail, x.data + whole * kTileRows * x.stride, static_cast<size_t>(left * row));
    a.last = whole;
    a.tail = reinterpret_cast<const uint8_t*>(tail);
  }
  return a;
}

int64_t tiles_bytes(int64_t outer, int64_t k) {
  return ceil_div(outer, 16) * ceil_div(k, kTileDepth) * kTileBytes;
}

// y [m, n] = a B, B's panels packed by pack(panel, tiles)
template <class F>
void rows_times(Rows<const uint16_t> x, int64_t m, int64_t n, int64_t k, const StoreBf16& store,
                const F& pack) {
  const int64_t b_bytes = tiles_bytes(n, k);
  const int threads = max_threads();
  uint8_t* const tiles = train_workspace(b_bytes + threads * kSumBytes + 2 * kTileRows * x.stride);
  uint16_t* const tail = reinterpret_cast<uint16_t*>(tiles + b_bytes + threads * kSumBytes);
  const ATiles a = rows_as_tiles(x, m, tail);
  const int64_t steps = ceil_div(k, kTileDepth), panels = ceil_div(n, 16);
  parallel(threads, [&](const Team& team) {
    const Range mine = share(team, panels);
    for (int64_t p = mine.first; p < mine.last; ++p) pack(16 * p, tiles + p * steps * kTileBytes);
    team.barrier();
    configure_tiles();
    const Range groups = share_pairs(team, ceil_div(m, kTileRows));
    if (steps < kLong) {
      product(a, groups.first, groups.last, tiles, panels, steps, store);
    } else {
      float* sums = reinterpret_cast<float*>(tiles + b_bytes + team.rank * kSumBytes);
      long_product(a, groups.first, groups.last, tiles, panels, steps, sums, store);
    }
    release_tiles();
  });
}

// dw [n, k] = dy^T x. Sums are kept in scratch, tile by tile, while pieces of A and B short enough to stay near the
// tile unit pass by.
struct GradientTask {
  LinearShape shape;
  Rows<const uint16_t> dy;
  const uint8_t* b;  // x, packed: [panels][steps] tiles
  float *dw, *db;
  int64_t steps, panels;

  // Two groups of outputs, or the last one; a: their tiles, sums: [panel pairs][groups * panels] tiles.
  LOWBIT_INLINE void run(int64_t g, int64_t count, uint8_t* a, float* sums) const {
    const LinearShape& s = shape;
    __m512 totals[2];
    if (count == 2) {
      pack_transposed<2>(dy.data, dy.stride, s.m, s.n, 16 * g, a, steps * kTileBytes, totals);
    } else {
      pack_transposed<1>(dy.data, dy.stride, s.m, s.n, 16 * g, a, steps * kTileBytes, totals);
    }
    for (int64_t i = 0; i < count && db != nullptr; ++i) {
      const int64_t n = 16 * (g + i);
      _mm512_mask_storeu_ps(db + n, first_of(s.n - n), totals[i]);
    }
    for (int64_t t = 0; t < steps; t += kSumSteps) {
      const int64_t length = least(kSumSteps, steps - t);
      const ATiles tiles{a + t * kTileBytes, steps * kTileBytes, kTileBytes, 64};
      for (int64_t p = 0; p < panels; p += 2) {
        by_pairs(count, panels - p, [&](auto tall, auto wide) LOWBIT_LAMBDA {
          const uint8_t* const at[2] = {b + (p * steps + t) * kTileBytes,
                                        b + ((p + wide - 1) * steps + t) * kTileBytes};
          multiply<tall, wide>(tiles, 0, at, length, t > 0, sums + p * 512);
          if (t + length == steps) store<tall, wide>(g, p, sums + p * 512);
        });
      }
    }
  }
  template <int kA, int kB>
  LOWBIT_INLINE void store(int64_t g, int64_t p, const float* c) const {
    const int64_t rows = least(16 * kA, shape.n - 16 * g);
    float* out = dw + 16 * g * shape.k + 16 * p;
    for (int64_t i = 0; i < rows; ++i) {
      unroll<kB>([&](auto j) LOWBIT_LAMBDA {
        const __m512 x = _mm512_load_ps(c + 256 * (kB * (i / 16) + j) + 16 * (i % 16));
        _mm512_mask_storeu_ps(out + i * shape.k + 16 * j, first_of(shape.k - 16 * (p + j)), x);
      });
    }
  }
};

void weight_gradient(const LinearShape& s, Rows<const uint16_t> dy, Rows<const uint16_t> x, float* dw,
                     float* db) {
  const int64_t steps = ceil_div(s.m, kTileDepth), panels = ceil_div(s.k, 16);
  const int64_t b_bytes = tiles_bytes(s.k, s.m), a_bytes = 2 * steps * kTileBytes;
  const int64_t own_bytes = a_bytes + 2 * (panels + 1) * kTileBytes;
  const int threads = max_threads();
  uint8_t* const b = train_workspace(b_bytes + threads * own_bytes);
  const GradientTask task{s, dy, b, dw, db, steps, panels};
  parallel(threads, [&](const Team& team) {
    const Range mine = share_pairs(team, panels);
    int64_t p = mine.first;
    for (; p + 2 <= mine.last; p += 2) {
      pack_columns<2>(x.data, x.stride, s.m, s.k, 16 * p, b + p * steps * kTileBytes, steps * kTileBytes);
    }
    if (p < mine.last) pack_columns<1>(x.data, x.stride, s.m, s.k, 16 * p, b + p * steps * kTileBytes, 0);
    team.barrier();
    configure_tiles();
    uint8_t* const own = b + b_bytes + team.rank * own_bytes;
    const Range groups = share_pairs(team, ceil_div(s.n, kTileRows));
    for (int64_t g = groups.first; g < groups.last; g += 2) {
      task.run(g, least(2, groups.last - g), own, reinterpret_cast<float*>(own + a_bytes));
    }
    release_tiles();
  });
}

}  // namespace

void linear_forward(const LinearShape& s, Rows<const uint16_t> x, const float* w, const float* bias,
                    Rows<uint16_t> y) {
  rows_times(x, s.m, s.n, s.k, StoreBf16{y, s.m, s.n, bias},
             [&](int64_t n, uint8_t* tiles) { pack_rows(w, s.n, s.k, n, tiles); });
}

void linear_backward(const LinearShape& s, Rows<const uint16_t> dy, Rows<const uint16_t> x, const float* w,
                     Rows<uint16_t> dx, float* dw, float* db) {
  if (dx.data != nullptr) {
    rows_times(dy, s.m, s.k, s.n, StoreBf16{dx, s.m, s.k, nullptr},
               [&](int64_t k, uint8_t* tiles) { pack_columns<1>(w, s.k, s.n, s.k, k, tiles, 0); });
  }
  weight_gradient(s, dy, x, dw, db);
}

}  // namespace lowbit
