// Stand-alone kernel test without Python: for sanitizers, and for emulators of other machines.
// Every available instruction set x bits x tables x groups x ragged shapes, against fp64.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/qlinear.h"
#include "prepack.h"

namespace lowbit {
namespace {

std::mt19937 g_random(1);

int below(int bound) { return static_cast<int>(g_random() % static_cast<unsigned>(bound)); }

// malloc'ed to the byte, so that a sanitizer sees any access outside.
template <class T>
struct Aligned {
  T* data;
  explicit Aligned(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    data = static_cast<T*>(std::aligned_alloc(kAlign, (bytes + kAlign - 1) / kAlign * kAlign));
    if (data == nullptr) std::abort();
  }
  ~Aligned() { std::free(data); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
};

struct Case {
  int bits, n, k, group, m;
  bool lookup;
};

constexpr uint16_t kHalfScales[4] = {0x3800, 0x3C00, 0x3A00, 0x2E66};  // 0.5, 1, 0.75, about 0.1

// Worst error of both modes relative to what rounding allows; above 1 is a failure.
double run(const Case& c) {
  const int64_t row_bytes = ceil_div(c.k * c.bits, 8), groups = ceil_div(c.k, c.group);
  const int64_t span = span_of(c.k, c.group), blocks = ceil_div(c.n, kTileN);
  std::vector<int8_t> levels(256);
  for (int i = 0; i < 256; ++i)
    levels[i] = static_cast<int8_t>(c.bits == 8 ? i - 128 : 2 * i - (1 << c.bits) + 1);
  if (c.lookup) levels[1] = static_cast<int8_t>(levels[1] + 1);
  std::vector<uint8_t> rows(static_cast<size_t>(c.n * row_bytes));
  std::vector<uint16_t> scale(static_cast<size_t>(c.n * groups));
  std::vector<double> w(static_cast<size_t>(c.n) * c.k);
  for (auto& s : scale) s = kHalfScales[below(4)];
  for (int i = 0; i < c.n; ++i) {
    for (int j = 0; j < c.k; ++j) {
      const int code = below(1 << c.bits);
      rows[i * row_bytes + j * c.bits / 8] |= static_cast<uint8_t>(code << (j * c.bits % 8));
      w[static_cast<size_t>(i) * c.k + j] =
          levels[code] * double{half_to_float(scale[i * groups + j / c.group])};
    }
  }

  Aligned<uint8_t> tiles(blocks * ceil_div(c.k, kTileK) * tile_bytes(c.bits));
  Aligned<uint16_t> scales(blocks * ceil_div(c.k, span) * kTileN);
  prepack_tiles(rows.data(), c.n, c.k, c.bits, tiles.data);
  prepack_scales(scale.data(), c.n, c.k, c.group, span, scales.data);

  int8_t table[16];
  for (int i = 0; i < 16; ++i) table[i] = levels[i & ((1 << c.bits) - 1)];
  Job job;
  job.w = Matrix{tiles.data, scales.data,           table,    c.n, c.k, span, c.bits,
                 c.lookup,   levels[1] - levels[0], levels[0]};
  std::vector<float> x(static_cast<size_t>(c.m) * c.k), bias(static_cast<size_t>(c.n));
  for (auto& v : x) v = static_cast<float>(below(2001) - 1000) / 1000;
  for (auto& v : bias) v = static_cast<float>(below(2001) - 1000) / 1000;
  job.x = x.data();
  job.x_stride = c.k;
  job.bias = bias.data();
  job.m = c.m;
  job.y_stride = c.n;

  std::vector<float> read(static_cast<size_t>(c.k));
  const int64_t last = c.n - 1;
  dequantize_rows(job.w, &last, 1, read.data());
  for (int j = 0; j < c.k; ++j) {
    if (read[j] != w[static_cast<size_t>(last) * c.k + j]) return INFINITY;
  }

  double worst = 0;
  for (const Compute compute : {Compute::kInt8, Compute::kExact}) {
    std::vector<float> y(static_cast<size_t>(c.m) * c.n, NAN);
    job.y = y.data();
    qlinear(job, compute);
    for (int m = 0; m < c.m; ++m) {
      for (int i = 0; i < c.n; ++i) {
        double sum = bias[i], mass = std::fabs(bias[i]), moved = 0;
        for (int j = 0; j < c.k; ++j) {
          const double wij = w[static_cast<size_t>(i) * c.k + j], xj = x[static_cast<size_t>(m) * c.k + j];
          sum += wij * xj;
          mass += std::fabs(wij * xj);
          moved += std::fabs(wij) / 253;  // |x| <= 1: rounding to int8 moves it by at most half a step
        }
        const double allowed = 600 * std::ldexp(mass, -24) + (compute == Compute::kInt8 ? moved : 0);
        const double error = std::fabs(y[static_cast<size_t>(m) * c.n + i] - sum) / allowed;
        worst = error <= worst ? worst : error;  // NaN counts as worst
      }
    }
  }
  return worst;
}

bool test_isa(const std::string& name) {
  set_isa(name);
  double worst = 0;
  int cases = 0;
  for (const int bits : {1, 2, 4, 8}) {
    for (const int k : {1, 63, 64, 130, 256, 1000}) {
      for (const int m : {1, 2, 3, 7, 16, 33}) {
        for (const bool lookup : {false, true}) {
          if (lookup && bits != 2 && bits != 4) continue;
          const Case c{bits, 1 + below(70), k, k > 64 && below(2) ? 64 : k, m, lookup};
          const double error = run(c);
          ++cases;
          if (!(error <= 1)) {
            std::printf("%s: wrong: bits %d N %d K %d group %d M %d lookup %d: %g of the tolerance\n",
                        name.c_str(), c.bits, c.n, c.k, c.group, c.m, c.lookup, error);
            return false;
          }
          worst = error > worst ? error : worst;
        }
      }
    }
  }
  std::printf("%s: %d cases, worst error %.2f of the tolerance\n", name.c_str(), cases, worst);
  return true;
}

}  // namespace
}  // namespace lowbit

int main() {
  bool good = true;
  lowbit::set_max_threads(2);
  for (const auto& name : lowbit::available_isas()) good = lowbit::test_isa(name) && good;
  return good ? 0 : 1;
}
