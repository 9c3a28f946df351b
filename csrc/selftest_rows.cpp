// Rows between matrix products and attention, on every available instruction set, against fp64.
#include "selftest_rows.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "cpu/forward_ops.h"
#include "cpu/isa.h"
#include "selftest_memory.h"

namespace lowbit {
namespace {

using Row = Fenced<float>;

std::mt19937 g_random(7);

void fill(const Row& row, int64_t count, double scale) {
  for (int64_t i = 0; i < count; ++i)
    row[i] = static_cast<float>((static_cast<int>(g_random() % 2001) - 1000) * scale / 1000);
}

// Largest error of a row, in units of the tolerance.
struct Errors {
  double worst = 0;
  void add(double found, double expected, double tolerance) {
    const double error = std::fabs(found - expected) / tolerance;
    if (!(error <= worst)) worst = error;  // a NaN counts
  }
};

float greatest_magnitude(const float* x, int64_t n) {
  float top = 0;
  for (int64_t i = 0; i < n; ++i) top = std::max(top, std::fabs(x[i]));
  return top;
}

void test_elementwise(const RowOps& ops, int64_t n, Errors& errors) {
  const Row x(n, false), y(n, false), weight(n, false), bias(n, false), out(n, false);
  fill(x, n, 6);
  fill(y, n, 2);
  fill(weight, n, 1);
  fill(bias, n, 1);
  double mean = 0, variance = 0;
  for (int64_t i = 0; i < n; ++i) mean += double{x[i]} / n;
  for (int64_t i = 0; i < n; ++i) variance += (x[i] - mean) * (x[i] - mean) / n;
  const float top = ops.layer_norm(x.data(), {weight.data(), bias.data(), 1e-5f}, n, out.data());
  errors.add(top, greatest_magnitude(out.data(), n), 1e-9);
  // Values of up to 6 carry roundings of 4e-7, which a small deviation magnifies.
  const double deviation = std::sqrt(variance + 1e-5);
  for (int64_t i = 0; i < n; ++i)
    errors.add(out[i], (x[i] - mean) / deviation * weight[i] + bias[i], 2e-6 + 2e-6 / deviation);
  const float rectified = ops.activation[kRelu](x.data(), n, out.data());
  errors.add(rectified, greatest_magnitude(out.data(), n), 1e-9);
  for (int64_t i = 0; i < n; ++i) errors.add(out[i], std::max(x[i], 0.0f), 1e-9);
  errors.add(ops.magnitude(x.data(), n), greatest_magnitude(x.data(), n), 1e-9);
  const float gated = ops.activation[kGelu](x.data(), n, out.data());
  errors.add(gated, greatest_magnitude(out.data(), n), 1e-9);
  for (int64_t i = 0; i < n; ++i) errors.add(out[i], x[i] * 0.5 * std::erfc(-x[i] * std::sqrt(0.5)), 2.5e-6);
  ops.subtract(x.data(), 0.3f, n, out.data());
  for (int64_t i = 0; i < n; ++i) errors.add(out[i], double{x[i]} - double{0.3f}, 5e-7);
  const std::vector<float> before(x.data(), x.data() + n);
  ops.scale_add(x.data(), 1.5f, y.data(), n);
  std::vector<float> sum(x.data(), x.data() + n), normalized(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) sum[static_cast<size_t>(i)] += y[i];
  const NormWeights norm{weight.data(), bias.data(), 1e-5f};
  ops.layer_norm(sum.data(), norm, n, normalized.data());
  ops.add_norm(x.data(), y.data(), norm, n, out.data());
  for (int64_t i = 0; i < n; ++i) errors.add(out[i], normalized[static_cast<size_t>(i)], 1e-9);
  for (int64_t i = 0; i < n; ++i) errors.add(x[i], 1.5 * before[static_cast<size_t>(i)] + 2.0 * y[i], 3e-6);
}

void test_rotate(const RowOps& ops, int64_t half, Errors& errors) {
  const Row x(2 * half, false), cos(half, false), sin(half, false);
  fill(x, 2 * half, 2);
  fill(cos, half, 1);
  fill(sin, half, 1);
  const std::vector<float> before(x.data(), x.data() + 2 * half);
  ops.rotate(x.data(), cos.data(), sin.data(), half, x.data());
  for (int64_t i = 0; i < half; ++i) {
    const double a = before[static_cast<size_t>(i)], b = before[static_cast<size_t>(i + half)];
    errors.add(x[i], a * cos[i] - b * sin[i], 1e-6);
    errors.add(x[i + half], b * cos[i] + a * sin[i], 1e-6);
  }
}

void test_attention(const RowOps& ops, int64_t dim, int64_t count, Errors& errors) {
  const Row q(dim, false), cache(2 * dim * count, false), scores((count + 15) / 16 * 16, false),
      out(dim, false);
  fill(q, dim, 1);
  fill(cache, 2 * dim * count, 1);
  std::vector<const float*> slots;
  for (int64_t j = 0; j < count; ++j) slots.push_back(cache.data() + 2 * dim * ((j * 7) % count));
  std::vector<double> weight(static_cast<size_t>(count)), expected(static_cast<size_t>(dim));
  double sum = 0;
  for (int64_t j = 0; j < count; ++j) {
    double dot = 0;
    for (int64_t d = 0; d < dim; ++d) dot += double{q[d]} * slots[static_cast<size_t>(j)][d];
    sum += weight[static_cast<size_t>(j)] = std::exp(dot);
  }
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t d = 0; d < dim; ++d)
      expected[static_cast<size_t>(d)] +=
          weight[static_cast<size_t>(j)] / sum * slots[static_cast<size_t>(j)][dim + d];
  }
  ops.attend({q.data(), slots.data(), count, dim, 0, dim}, scores.data(), out.data());
  // Scores of up to sqrt(dim) lose 1e-6 or so to rounding, and weights as much.
  for (int64_t d = 0; d < dim; ++d) errors.add(out[d], expected[static_cast<size_t>(d)], 1e-5);
}

// Queries in lanes, each of which sees tokens of its own, give the bits that they give alone.
void test_attention_together(const RowOps& ops, int64_t dim, int queries, int64_t count, Errors& errors) {
  const int64_t padded = (dim + 15) / 16 * 16;
  const Row q(queries * dim, false), cache(2 * dim * count, false), out(queries * dim, false);
  const Row room((padded + count) * 16, true), scores((count + 15) / 16 * 16, false), alone(dim, false);
  fill(q, queries * dim, 1);
  fill(cache, 2 * dim * count, 1);
  std::vector<const float*> slots;
  std::vector<uint16_t> lanes;
  for (int64_t j = 0; j < count; ++j) {
    slots.push_back(cache.data() + 2 * dim * ((j * 7) % count));
    lanes.push_back(static_cast<uint16_t>(j == 0 ? 0xFFFF : g_random() | 0xFFFFu << queries));
  }
  ops.attend_together({q.data(), dim, queries, 0xFFFF, 1, slots.data(), lanes.data(), count, dim, 0, dim},
                      room.data(), out.data());
  for (int i = 0; i < queries; ++i) {
    std::vector<const float*> seen;
    for (int64_t j = 0; j < count; ++j)
      if (lanes[static_cast<size_t>(j)] >> i & 1) seen.push_back(slots[static_cast<size_t>(j)]);
    ops.attend({q.data() + i * dim, seen.data(), static_cast<int64_t>(seen.size()), dim, 0, dim},
               scores.data(), alone.data());
    for (int64_t d = 0; d < dim; ++d) errors.add(out[i * dim + d], alone[d], 1e-12);
  }
}

void test_softmax(const RowOps& ops, int64_t n, Errors& errors) {
  const int64_t padded = (n + 15) / 16 * 16;
  const Row x(padded, false), max(padded, false), sum(padded, false);
  fill(x, n, 20);
  double top = -1e30, total = 0, all = 0;
  for (int64_t i = 0; i < n; ++i) top = std::max(top, double{x[i]});
  for (int64_t i = 0; i < n; ++i) total += std::exp(x[i] - top);
  float found_max, found_sum;
  ops.softmax_part(x.data(), n, &found_max, &found_sum);
  errors.add(found_max, top, 1e-9);
  errors.add(found_sum, total, 5e-6 * total);
  fill(max, n, 20);
  for (int64_t i = 0; i < n; ++i) {
    sum[i] = 1.0f + static_cast<float>(i % 5);
    all += sum[i] * std::exp(double{max[i]});
  }
  errors.add(ops.log_sum_exp(max.data(), sum.data(), n), std::log(all), 1e-5);
}

}  // namespace

bool test_rows() {
  bool good = true;
  for (const Isa isa : {Isa::kScalar, Isa::kNeon, Isa::kAvx2, Isa::kAvx512}) {
    if (!isa_available(isa)) continue;
    const RowOps& ops = row_ops(isa);
    Errors errors;
    for (const int64_t n : {1, 7, 16, 36, 64, 130, 512}) {
      test_elementwise(ops, n, errors);
      test_rotate(ops, n, errors);
      test_softmax(ops, n, errors);
      for (const int64_t count : {1, 3, 4, 5, 16, 17, 50}) test_attention(ops, n, count, errors);
      for (const int queries : {1, 5, 16}) test_attention_together(ops, n, queries, 3 * queries + 2, errors);
    }
    std::printf("%s rows: worst error %.2f of the tolerance\n", isa_name(isa), errors.worst);
    good = good && errors.worst <= 1;
  }
  return good;
}

}  // namespace lowbit
