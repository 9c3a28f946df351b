// One member of the team that runs a forward: the phases, each between two barriers.
#pragma once

#include <chrono>
#include <cstring>

#include "forward.h"
#include "parallel.h"

namespace lowbit {

class Member {
 public:
  Member(const Model& model, const Batch& batch, const Frame& frame, const Team& team);

  void attention(size_t layer);
  void mlp(size_t layer);
  void output();

 private:
  struct Product {  // y = rows * W^T + bias
    Job job;
    LinearPlan plan;
  };

  // What a product reads of a row, and its greatest magnitude where that is known.
  struct RowInput {
    const float* at;
    float top = kUnknown;
  };
  static constexpr float kUnknown = -1;

  Product product(const Linear& linear, int64_t rows, float* y) const;
  template <class Row>
  void prepare_rows(Product* products, int count, int64_t rows, const Row& row);
  void run(const Product& p) { multiply(p.job, p.plan, team_, scratch_); }
  // The time since the last mark was spent on this.
  void mark(Phase phase);
  void wait();

  void embed(int64_t node);
  RowInput begin(int64_t node, float* room);
  RowInput go_on(int64_t node, const NormWeights& before, const NormWeights& after, float* room);
  void keep_keys(size_t layer, Range nodes, Range heads);
  void attend_heads(size_t layer, Range nodes, Range heads);
  void rotate(int64_t position, float* x) const;
  bool has_digits() const { return model_.digits != nullptr && model_.max_len > kDeep; }
  bool deep(int64_t node) const { return model_.digits != nullptr && batch_.positions[node] >= kDeep; }
  DigitHead digit_head(size_t layer, int64_t head) const;
  void keep_digits(size_t layer, Range nodes, Range heads);
  void attend_deep(size_t layer, int64_t head, int64_t node, float* q);
  void attend_deep_blocks(size_t layer, int64_t head, Range nodes);
  void attend_node(const HeadQuery& head, int64_t node, float* q);
  void attend_block(const HeadQuery& head, int64_t first, float* q);

  RowInput final_row(int64_t row, float* room);
  void reduce_stripe(Product& p, int64_t first, int64_t last);
  void find_targets(int64_t begin, int64_t end, const float* logits, int64_t stride);
  void finish_targets();
  void finish_all();

  const Model& model_;
  const Batch& batch_;
  const Frame& frame_;
  const RowOps& ops_;
  const Team team_;
  float *x_, *row_, *dense_, *scores_;
  uint8_t *activations_[3], *scratch_;
  std::chrono::steady_clock::time_point marked_;
};

// Makes the common input of several products: row(m, room) leaves row m in `room` or says where it lies (a
// RowInput). Products
// whose form is equal share one copy.
template <class Row>
void Member::prepare_rows(Product* products, int count, int64_t rows, const Row& row) {
  const int64_t k = products[0].job.w.k;
  const bool exact = model_.compute == Compute::kExact;
  bool own[3] = {};
  for (int i = 0; i < count; ++i) {
    Job& job = products[i].job;
    int same = 0;
    while (!(products[same].plan.form == products[i].plan.form)) ++same;
    own[i] = same == i;
    job.x = dense_;
    job.x_stride = k;
    place_activations(job, products[i].plan, activations_[same]);
  }
  const Range mine = frame_.redundant ? Range{0, rows} : share(rows, 1, team_);
  for (int64_t m = mine.begin; m < mine.end; ++m) {
    float* room = exact ? dense_ + m * k : row_;
    const RowInput from = row(m, room);
    if (exact && from.at != room) std::memcpy(room, from.at, static_cast<size_t>(k) * sizeof(float));
    for (int i = 0; i < count; ++i) {
      if (!own[i]) continue;
      Job job = products[i].job;
      if (!exact) {
        job.x = from.at;
        job.x_stride = 0;
      }
      if (!exact && !(from.top < 0) && job.w.spans() == 1) {
        ops_.quantize_row(job, m, from.top);
      } else {
        prepare(job, products[i].plan, {m, m + 1});
      }
    }
  }
  mark(kRows);
  if (!frame_.redundant) wait();
}

}  // namespace lowbit
