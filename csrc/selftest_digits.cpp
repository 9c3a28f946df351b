// Attention in integers: against fp64, and the same bits for a query alone and among others.
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "cpu/forward_digits.h"
#include "cpu/isa.h"
#include "selftest_memory.h"
#include "selftest_rows.h"

namespace lowbit {
namespace {

std::mt19937 g_random(9);

constexpr float kMost = 2;  // of queries, keys and values

float uniform() { return static_cast<float>(static_cast<int>(g_random() % 2001) - 1000) * kMost / 1000; }

// Some queries over tokens of which each sees a few, and the first.
struct Scene {
  DigitHead head;
  Fenced<float> q, k, v;
  Fenced<uint8_t> records;
  std::vector<float*> slots;
  std::vector<int64_t> first{0};
  std::vector<int32_t> blocks;
  std::vector<uint16_t> masks;
  std::vector<uint8_t> used;
  std::vector<std::vector<int64_t>> seen;

  Scene(int64_t dim, int64_t queries, int64_t tokens)
      : q(queries * dim, false),
        k(tokens * dim, false),
        v(tokens * dim, false),
        records(tokens * DigitRecord{1, dim}.bytes(), true),
        seen(static_cast<size_t>(queries)) {
    head.record = {1, dim};
    head.sum_bits = sum_bits(tokens);
    head.scale = 1.0f / std::sqrt(static_cast<float>(dim));
    head.q = q.data();
    head.q_stride = dim;
    head.queries = queries;
    head.tokens = tokens;
    for (int64_t i = 0; i < queries * dim; ++i) q[i] = uniform();
    for (int64_t i = 0; i < tokens * dim; ++i) {
      k[i] = uniform();
      v[i] = uniform();
    }
    // Nobody sees the last token: its NaN must stay where it is.
    if (tokens > 1) k[tokens * dim - 1] = v[tokens * dim - 1] = std::numeric_limits<float>::quiet_NaN();
    for (int64_t j = 0; j < tokens; ++j)
      slots.push_back(reinterpret_cast<float*>(records.data() + j * head.record.bytes()));
    head.slots = slots.data();
    look();
  }

  void look() {
    const int64_t count = ceil_div(head.tokens, 16);
    used.assign(static_cast<size_t>(count), 0);
    for (int64_t begin = 0; begin < head.queries; begin += 16) {
      for (int64_t t = 0; t < count; ++t) {
        uint16_t some[16] = {};
        for (int64_t i = begin; i < begin + 16 && i < head.queries; ++i) {
          for (int64_t j = 16 * t; j < 16 * t + 16 && (j + 1 < head.tokens || j == 0); ++j) {
            if (j > 0 && (g_random() % 3 != 0 || t % 5 == 1)) continue;
            some[i - begin] = static_cast<uint16_t>(some[i - begin] | 1u << (j - 16 * t));
            seen[static_cast<size_t>(i)].push_back(j);
          }
        }
        bool any = false;
        for (const uint16_t mask : some) any = any || mask != 0;
        if (!any) continue;
        used[static_cast<size_t>(t)] = 1;
        blocks.push_back(static_cast<int32_t>(t));
        masks.insert(masks.end(), some, some + 16);
      }
      const auto end = static_cast<int64_t>(blocks.size());
      head.most_blocks = end - first.back() > head.most_blocks ? end - first.back() : head.most_blocks;
      first.push_back(end);
    }
    head.first = first.data();
    head.blocks = blocks.data();
    head.masks = masks.data();
    head.used = used.data();
  }

  double expected(int64_t query, int64_t d) const {
    const int64_t dim = head.record.dim;
    double sum = 0, total = 0;
    for (const int64_t j : seen[static_cast<size_t>(query)]) {
      double dot = 0;
      for (int64_t i = 0; i < dim; ++i) dot += double{q[query * dim + i]} * k[j * dim + i];
      const double weight = std::exp(dot * double{head.scale});
      sum += weight;
      total += weight * v[j * dim + d];
    }
    return total / sum;
  }
};

// Digits miss queries and keys by up to 2^-15 of their maximum, which moves a score of these rows by 1e-4 or so, and
// every weight and output by as much of itself. Returns the largest error in units of four times that; 2 where a query
// alone differs.
double error_of(const DigitOps& ops, int64_t dim, int64_t queries, int64_t tokens) {
  const Scene scene(dim, queries, tokens);
  const DigitHead& head = scene.head;
  for (int64_t begin = 0; begin < tokens; begin += 16) {
    DigitHead some = head;
    some.slots = head.slots + begin;
    const int64_t left = tokens - begin;
    ops.keep(some, scene.k.data() + begin * dim, scene.v.data() + begin * dim, dim,
             static_cast<int>(left < 16 ? left : 16));
  }
  std::vector<double> expected;
  for (int64_t i = 0; i < queries * dim; ++i) expected.push_back(scene.expected(i / dim, i % dim));
  const Fenced<uint8_t> room(ceil_div(ops.room(head), kAlign) * kAlign, true);
  const std::vector<float> before(head.q, head.q + queries * dim);
  ops.attend_together(head, {0, ceil_div(queries, 16)}, room.data());
  double worst = 0;
  for (int64_t i = 0; i < queries * dim; ++i) {
    const double error = std::fabs(head.q[i] - expected[static_cast<size_t>(i)]) / (4e-4 * double{kMost});
    if (!(error <= worst)) worst = error;
  }
  for (int64_t i = 0; i < queries; ++i) {
    std::vector<float> alone(before.begin() + i * dim, before.begin() + (i + 1) * dim);
    std::vector<float*> slots;
    for (const int64_t j : scene.seen[static_cast<size_t>(i)])
      slots.push_back(scene.slots[static_cast<size_t>(j)]);
    DigitHead one = head;
    one.q = alone.data();
    one.queries = 1;
    one.slots = slots.data();
    one.tokens = static_cast<int64_t>(slots.size());
    ops.attend(one, room.data());
    for (int64_t d = 0; d < dim; ++d)
      if (alone[static_cast<size_t>(d)] != head.q[i * dim + d]) worst = worst > 2 ? worst : 2;
  }
  return worst;
}

}  // namespace

bool test_digits() {
  bool good = true;
  for (const Isa isa : {Isa::kAmx}) {
    if (!isa_available(isa) || digit_ops(isa) == nullptr) continue;
    double worst = 0;
    for (const int64_t dim : {1, 12, 16, 64, 80, 130}) {
      for (const int64_t tokens : {1, 15, 16, 33, 150}) {
        for (const int64_t queries : {1, 16, 21}) {
          const double error = error_of(*digit_ops(isa), dim, queries, tokens);
          if (!(error <= worst)) worst = error;
        }
      }
    }
    std::printf("%s attention in integers: worst error %.2f of the tolerance\n", isa_name(isa), worst);
    good = good && worst <= 1;
  }
  return good;
}

}  // namespace lowbit
