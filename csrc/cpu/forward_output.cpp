// The output layer: log P of some tokens after each row, without ever holding a row of logits over the vocabulary.
//
// The vocabulary goes in stripes. A member multiplies all rows by a stripe into a buffer that stays in its L2, takes
// the wanted logits out of it, and reduces each part of kPart outputs to a maximum and a sum of exponentials a row.
// The parts of a row are combined in their order, whoever made them.
#include <cmath>
#include <cstring>

#include "forward_member.h"

namespace lowbit {

// The output of a node: its residual stream, settled and normalized.
Member::RowInput Member::final_row(int64_t row, float* room) {
  if (batch_.nodes == 0) return {batch_.hidden};
  const int64_t node = batch_.row_nodes[row];
  const RowInput y = go_on(node, model_.norm, model_.layers.back().norm2, room);
  const bool keeps = row + 1 == batch_.rows && batch_.hidden != nullptr;
  if (keeps && (!frame_.redundant || team_.rank == 0)) {
    std::memcpy(batch_.hidden, y.at, static_cast<size_t>(model_.d) * sizeof(float));
  }
  return y;
}

void Member::output() {
  if (!batch_.wants_logits()) {
    const Range mine = frame_.redundant ? Range{0, batch_.rows} : share(batch_.rows, 1, team_);
    for (int64_t r = mine.begin; r < mine.end; ++r) final_row(r, row_);
    return;
  }
  Product head = product(model_.head, batch_.rows, nullptr);
  prepare_rows(&head, 1, batch_.rows, [&](int64_t r, float* room) { return final_row(r, room); });
  const Range parts = share(frame_.parts, 1, team_);
  for (int64_t part = parts.begin; part < parts.end; part += frame_.stripe) {
    reduce_stripe(head, part, part + frame_.stripe < parts.end ? part + frame_.stripe : parts.end);
  }
  wait();
  if (batch_.all != nullptr) {
    finish_all();
  } else {
    finish_targets();
  }
  mark(kReduce);
}

void Member::reduce_stripe(Product& p, int64_t first, int64_t last) {
  const int64_t begin = first * kPart, rows = batch_.rows, room = ceil_div(frame_.parts, 16) * 16;
  const int64_t end = last * kPart < model_.vocab ? last * kPart : model_.vocab;
  p.job.w = slice(model_.head.w, {begin / kTileN, ceil_div(end, kTileN)});
  p.job.bias = model_.head.bias == nullptr ? nullptr : model_.head.bias + begin;
  p.job.y = batch_.all != nullptr ? frame_.each_logits + begin
                                  : frame_.each_logits + team_.rank * frame_.logits_share;
  p.job.y_stride = frame_.stripe * kPart;
  p.plan.kernel(p.job, {0, p.job.w.blocks()}, {0, rows}, scratch_);
  mark(kProducts);
  find_targets(begin, end, p.job.y, p.job.y_stride);
  for (int64_t r = 0; r < rows; ++r) {
    float* logits = p.job.y + r * p.job.y_stride;
    for (int64_t part = first; part < last; ++part, logits += kPart) {
      const int64_t left = end - part * kPart, at = r * room + part;
      ops_.softmax_part(logits, left < kPart ? left : kPart, frame_.part_max + at, frame_.part_sum + at);
    }
  }
  mark(kReduce);
}

// Keeps the logits of targets [begin, end). They are sorted: a binary search finds the first.
void Member::find_targets(int64_t begin, int64_t end, const float* logits, int64_t stride) {
  int64_t low = 0, high = batch_.target_count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (batch_.targets[middle].token < begin) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  for (; low < batch_.target_count && batch_.targets[low].token < end; ++low) {
    const Target& t = batch_.targets[low];
    frame_.target_logits[low] = logits[t.row * stride + t.token - begin];
  }
}

void Member::finish_targets() {
  const int64_t room = ceil_div(frame_.parts, 16) * 16;
  const Range rows = share(batch_.rows, 1, team_);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    frame_.lse[r] = ops_.log_sum_exp(frame_.part_max + r * room, frame_.part_sum + r * room, frame_.parts);
  }
  team_.barrier();
  const Range targets = share(batch_.target_count, 1, team_);
  for (int64_t i = targets.begin; i < targets.end; ++i) {
    const Target& t = batch_.targets[i];
    batch_.log_probs[t.out] = frame_.target_logits[i] - frame_.lse[t.row];
  }
}

// Every member combines the one row for itself: a barrier would cost more.
void Member::finish_all() {
  const size_t bytes = static_cast<size_t>(frame_.parts) * sizeof(float);
  float *max = scores_, *sum = scores_ + ceil_div(frame_.parts, 16) * 16;
  std::memcpy(max, frame_.part_max, bytes);
  std::memcpy(sum, frame_.part_sum, bytes);
  const float lse = ops_.log_sum_exp(max, sum, frame_.parts);
  const Range parts = share(frame_.parts, 1, team_);
  const int64_t begin = parts.begin * kPart, last = parts.end * kPart;
  const int64_t end = last < model_.vocab ? last : model_.vocab;
  if (begin < end) ops_.subtract(frame_.each_logits + begin, lse, end - begin, batch_.all + begin);
}

}  // namespace lowbit
