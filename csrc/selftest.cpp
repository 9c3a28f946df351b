// Stand-alone kernel test without Python: for sanitizers, and for emulators of other machines.
//
//   lowbit_selftest [part]     runs one in `part` of the cases (default 1: all)
//
// Every available instruction set x kernel (small, large, exact) x bits x table x group x rows, over ragged,
// strided and unaligned shapes in fenced memory (selftest_memory.h), against fp64. Outputs are poisoned before.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/forward_ops.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/qlinear.h"
#include "prepack.h"
#include "selftest_memory.h"
#include "selftest_rows.h"

namespace lowbit {
namespace {

std::mt19937 g_random(1);

int below(int bound) { return static_cast<int>(g_random() % static_cast<unsigned>(bound)); }
template <size_t kCount>
int one_of(const int (&list)[kCount]) {
  return list[below(static_cast<int>(kCount))];
}
float in_unit() { return static_cast<float>(below(2001) - 1000) / 1000; }

enum class Numbers { kRandom, kLargest, kNotFinite };
enum class Path { kSmall, kLarge, kExact };
constexpr Path kPaths[] = {Path::kSmall, Path::kLarge, Path::kExact};
constexpr const char* kPathNames[] = {"small", "large", "exact"};

struct Case {
  int bits, n, k, group, m;
  bool lookup;
  Numbers numbers;
};

constexpr uint16_t kHalfScales[4] = {0x3800, 0x3C00, 0x3A00, 0x2E66};  // 0.5, 1, 0.75, about 0.1
constexpr float kPoison = -12345.0f;

// One product with its answer in fp64.
struct Problem {
  Case c;
  std::vector<int8_t> levels;
  std::vector<double> w, sum, mass,
      moved;                     // [n][k]; [m][n]: the answer, sum |w x|, and what int8 may move it by
  std::vector<uint8_t> bad_row;  // [m]: holds a NaN or an infinity
  Fenced<uint8_t> tiles;
  Fenced<uint16_t> scales;
  int64_t x_stride, y_stride;
  Fenced<float> x, bias, y;
  int8_t table[16];
  Matrix matrix;

  explicit Problem(const Case& given);
  void make_weights();
  void make_inputs();
  void solve();
  Job job() const;
  double worst(Path path) const;
  bool activates() const;
};

std::vector<int8_t> make_levels(const Case& c) {
  std::vector<int8_t> levels(256);
  for (int i = 0; i < 256; ++i)
    levels[i] = static_cast<int8_t>(c.bits == 8 ? i - 128 : 2 * i - (1 << c.bits) + 1);
  if (!c.lookup) return levels;
  for (int i = 0; i < 1 << c.bits; ++i) levels[i] = static_cast<int8_t>(below(256) - 128);
  levels[0] = -128;
  levels[1] = 127;
  levels[2] = 126;  // an affine table would have another one here
  return levels;
}

Problem::Problem(const Case& given)
    : c(given),
      levels(make_levels(given)),
      w(static_cast<size_t>(c.n) * c.k),
      bad_row(static_cast<size_t>(c.m)),
      tiles(ceil_div(c.n, kTileN) * ceil_div(c.k, kTileK) * tile_bytes(c.bits), true),
      scales(ceil_div(c.n, kTileN) * ceil_div(c.k, span_of(c.k, c.group)) * kTileN, true),
      x_stride(c.k + 5 * below(2)),
      y_stride(c.n + 3 * below(2)),
      x((c.m - 1) * x_stride + c.k, false),
      bias(c.n, false),
      y((c.m - 1) * y_stride + c.n, false) {
  make_weights();
  make_inputs();
  solve();
}

void Problem::make_weights() {
  const int64_t row_bytes = ceil_div(c.k * c.bits, 8), groups = ceil_div(c.k, c.group);
  const int64_t span = span_of(c.k, c.group);
  Fenced<uint8_t> rows(c.n * row_bytes, false);
  Fenced<uint16_t> scale(c.n * groups, false);
  std::memset(rows.data(), 0, static_cast<size_t>(c.n * row_bytes));
  for (int64_t i = 0; i < c.n * groups; ++i) scale[i] = kHalfScales[below(4)];
  for (int64_t i = 0; i < c.n; ++i) {
    for (int64_t j = 0; j < c.k; ++j) {
      const int top = (1 << c.bits) - 1, code = c.numbers == Numbers::kLargest ? top : below(top + 1);
      rows[i * row_bytes + j * c.bits / 8] |= static_cast<uint8_t>(code << (j * c.bits % 8));
      w[static_cast<size_t>(i * c.k + j)] =
          levels[code] * double{half_to_float(scale[i * groups + j / c.group])};
    }
  }
  prepack_tiles(rows.data(), c.n, c.k, c.bits, tiles.data());
  prepack_scales(scale.data(), c.n, c.k, c.group, span, scales.data());
  for (int i = 0; i < 16; ++i) table[i] = levels[i & ((1 << c.bits) - 1)];
  matrix = Matrix{tiles.data(), scales.data(),         table,    c.n, c.k, span, c.bits,
                  c.lookup,     levels[1] - levels[0], levels[0]};
}

void Problem::make_inputs() {
  for (int64_t i = 0; i < (c.m - 1) * x_stride + c.k; ++i) x[i] = NAN;  // gaps between rows stay so
  for (int64_t m = 0; m < c.m; ++m) {
    const float size = c.numbers == Numbers::kLargest ? 1 : m % 5 == 4 ? 0 : std::ldexp(1.0f, below(40) - 20);
    for (int64_t j = 0; j < c.k; ++j)
      x[m * x_stride + j] = c.numbers == Numbers::kLargest ? 1.0f : size * in_unit();
  }
  if (c.numbers == Numbers::kNotFinite) {
    for (int64_t m = 0; m < c.m; m += 3) {
      bad_row[m] = true;
      x[m * x_stride + below(c.k)] = m % 2 ? INFINITY : NAN;
    }
  }
  for (int64_t i = 0; i < c.n; ++i) bias[i] = in_unit();
}

void Problem::solve() {
  for (int64_t m = 0; m < c.m; ++m) {
    const float* row = x.data() + m * x_stride;
    double top = 0;
    for (int64_t j = 0; j < c.k; ++j) top = std::fmax(top, std::fabs(row[j]));
    for (int64_t i = 0; i < c.n; ++i) {
      const double* weight = w.data() + i * c.k;
      double total = bias[i], size = std::fabs(bias[i]), weights = 0;
      for (int64_t j = 0; j < c.k; ++j) {
        total += weight[j] * row[j];
        size += std::fabs(weight[j] * row[j]);
        weights += std::fabs(weight[j]);
      }
      sum.push_back(total);
      mass.push_back(size);
      moved.push_back(weights * top /
                      253);  // rounding to int8 moves an activation by at most half a step, max / 254
    }
  }
}

Job Problem::job() const {
  Job job;
  job.w = matrix;
  job.x = x.data();
  job.x_stride = x_stride;
  job.bias = c.n % 3 ? bias.data() : nullptr;
  job.y = y.data();
  job.y_stride = y_stride;
  job.m = c.m;
  return job;
}

// Runs the kernel; the worst error relative to what rounding allows, above 1 if wrong.
double Problem::worst(Path path) const {
  for (int64_t i = 0; i < (c.m - 1) * y_stride + c.n; ++i) y[i] = i % y_stride < c.n ? NAN : kPoison;
  for (int64_t m = 0; m < c.m; ++m) {
    if (bad_row[m]) std::fill_n(y.data() + m * y_stride, c.n, kPoison);
  }
  qlinear(job(), path == Path::kExact ? Compute::kExact : Compute::kInt8);

  double result = 0;
  for (int64_t i = 0; i < (c.m - 1) * y_stride + c.n; ++i) {
    const int64_t m = i / y_stride, n = i % y_stride;
    if (n >= c.n) {
      if (y[i] != kPoison) return INFINITY;  // written between the rows
      continue;
    }
    if (bad_row[m]) {
      if (std::isfinite(y[i])) return INFINITY;
      continue;
    }
    const size_t at = static_cast<size_t>(m * c.n + n);
    const double rounding = std::ldexp((600 + c.k / 64.0) * mass[at], -24) + 1e-35;
    const double allowed = rounding + (path == Path::kExact ? 0 : moved[at]);
    const double error = std::fabs(y[i] - (sum[at] - (c.n % 3 ? 0 : bias[n]))) / allowed;
    result = error <= result ? result : error;  // NaN counts as worst
  }
  return result;
}

// Whether a kernel that applies an activation leaves the bits that the row operation makes of its outputs without one.
bool Problem::activates() const {
  if (!plan_linear(matrix, c.m, Compute::kInt8).activates) return true;
  Job job = this->job();
  qlinear(job, Compute::kInt8);
  const std::vector<float> plain(y.data(), y.data() + (c.m - 1) * y_stride + c.n);
  std::vector<float> expected(static_cast<size_t>(c.n));
  for (const Activation activation : {kRelu, kGelu}) {
    job.activation = activation;
    qlinear(job, Compute::kInt8);
    for (int64_t m = 0; m < c.m; ++m) {
      row_ops(selected_isa()).activation[activation](plain.data() + m * y_stride, c.n, expected.data());
      const size_t bytes = expected.size() * sizeof(float);
      if (!bad_row[m] && std::memcmp(y.data() + m * y_stride, expected.data(), bytes) != 0) return false;
    }
  }
  return true;
}

bool dequantizes(const Problem& p) {
  Fenced<float> row(p.c.k, false);
  const int64_t id = below(p.c.n);
  dequantize_rows(p.matrix, &id, 1, row.data());
  for (int64_t j = 0; j < p.c.k; ++j) {
    if (row[j] != p.w[static_cast<size_t>(id * p.c.k + j)]) return false;
  }
  return true;
}

struct Tally {
  int cases = 0, failed = 0;
  double worst = 0;
};

void test_case(const Case& c, std::vector<Tally>& tallies) {
  const Problem problem(c);
  const std::vector<std::string> isas = available_isas();
  const int threads = 1 + below(3);
  set_max_threads(threads);
  set_traits({has_vbmi() && below(2) == 0, below(2) == 0});
  if (!dequantizes(problem)) {
    std::printf("wrong dequantized row: bits %d N %d K %d group %d\n", c.bits, c.n, c.k, c.group);
    ++tallies[0].failed;
  }
  for (size_t i = 0; i < isas.size(); ++i) {
    set_isa(isas[i]);
    Tally& tally = tallies[i];
    for (const Path path : kPaths) {
      set_crossover(selected_isa(), c.bits, path == Path::kLarge ? 1 : c.m + 1);
      double error = problem.worst(path);
      if (path == Path::kLarge && !problem.activates()) error = INFINITY;
      ++tally.cases;
      tally.worst = error <= tally.worst ? tally.worst : error;
      if (error <= 1) continue;
      ++tally.failed;
      std::printf(
          "%s %s: wrong: bits %d N %d K %d group %d M %d lookup %d numbers %d threads %d: %g of the "
          "tolerance\n",
          isas[i].c_str(), kPathNames[static_cast<int>(path)], c.bits, c.n, c.k, c.group, c.m, c.lookup,
          static_cast<int>(c.numbers), threads, error);
    }
  }
}

constexpr int kRows[] = {1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14,
                         15, 16, 17, 18, 24, 31, 32, 33, 48, 63, 64, 65, 130};
constexpr int kOutputs[] = {1, 3, 15, 16, 17, 31, 33, 48, 70, 100};
constexpr int kGroups[] = {128, 320,
                           832};  // of which a chunk of the tile kernel holds several, two, less than one
constexpr int kInputs[] = {1, 5, 63, 64, 65, 127, 128, 130, 192, 256, 320, 777, 1000, 1088};

// Sums of one span at the edge of int32, and K beyond the longest span.
std::vector<Case> long_rows() {
  std::vector<Case> cases;
  for (const int bits : {1, 2, 4, 8}) {
    for (const int m : {1, 2, 17}) {
      cases.push_back({bits, 17, static_cast<int>(kMaxSpan) + 70, static_cast<int>(kMaxSpan) + 70, m, false,
                       Numbers::kLargest});
    }
  }
  return cases;
}

std::vector<Case> all_cases() {
  std::vector<Case> cases = long_rows();
  for (const int bits : {1, 2, 4, 8}) {
    for (const bool lookup : {false, true}) {
      if (lookup && bits != 2 && bits != 4) continue;
      for (const int m : kRows) {
        for (const int group : {0, 64, one_of(kGroups)}) {  // 0: one scale a row
          const int k = one_of(kInputs), n = one_of(kOutputs);
          const auto numbers = below(8) == 0 ? Numbers::kNotFinite : Numbers::kRandom;
          cases.push_back({bits, n, k, group == 0 || group > k ? k : group, m, lookup, numbers});
        }
      }
    }
  }
  return cases;
}

bool test_empty() {
  Problem p({4, 17, 64, 64, 1, false, Numbers::kRandom});
  Job job;
  job.w = p.matrix;
  job.x_stride = p.x_stride;
  job.y_stride = p.y_stride;
  qlinear(job, Compute::kInt8);  // no rows: null x and y are not touched
  qlinear(job, Compute::kExact);
  return true;
}

}  // namespace
}  // namespace lowbit

int main(int argc, char** argv) {
  using namespace lowbit;
  const int part = argc > 1 ? std::atoi(argv[1]) : 1;
  if (part < 1) {
    std::fprintf(stderr, "usage: lowbit_selftest [part]\n");
    return 2;
  }
  const std::vector<std::string> isas = available_isas();
  const std::vector<Case> cases = all_cases();
  std::vector<Tally> tallies(isas.size());
  for (size_t i = 0; i < cases.size(); i += static_cast<size_t>(part)) test_case(cases[i], tallies);
  bool good = test_empty() && test_rows() && test_digits();
  for (size_t i = 0; i < isas.size(); ++i) {
    std::printf("%s: %d cases, %d wrong, worst error %.2f of the tolerance\n", isas[i].c_str(),
                tallies[i].cases, tallies[i].failed, tallies[i].worst);
    good = good && tallies[i].failed == 0;
  }
  return good ? 0 : 1;
}
