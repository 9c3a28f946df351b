// Attention as one member of the team sees it: in fp32, and of deep nodes in integers where the model has digits.
#include <cmath>
#include <cstring>

#include "forward_member.h"

namespace lowbit {

// Rotates queries and keys in place, and puts keys and values where the slots say.
void Member::keep_keys(size_t layer, Range nodes, Range heads) {
  const int64_t dim = model_.head_dim();
  const size_t bytes = static_cast<size_t>(dim) * sizeof(float);
  for (int64_t m = nodes.begin; m < nodes.end; ++m) {
    float* slot = batch_.slots[batch_.path[m] + batch_.positions[m]] +
                  static_cast<int64_t>(layer) * batch_.layer_stride;
    for (int64_t h = heads.begin; h < heads.end; ++h) {
      float *k = frame_.k + m * frame_.kv_stride + h * dim, *v = frame_.v + m * frame_.kv_stride + h * dim;
      if (model_.rotary) {
        rotate(batch_.positions[m], frame_.q + m * model_.d + h * dim);
        rotate(batch_.positions[m], k);
      }
      if (deep(m)) continue;  // no other but deep nodes see it
      float *key = slot + h * dim, *value = key + batch_.value_offset;
      if (key != k) std::memcpy(key, k, bytes);
      if (value != v) std::memcpy(value, v, bytes);
    }
  }
  const bool cached = batch_.layer_stride != 0;
  if (cached ? has_digits() : batch_.key_first != nullptr) keep_digits(layer, nodes, heads);
}

void Member::keep_digits(size_t layer, Range nodes, Range heads) {
  float* slots[kTogether];
  for (Range some{nodes.begin, 0}; some.begin < nodes.end; some.begin = some.end) {
    some.end = some.begin + kTogether < nodes.end ? some.begin + kTogether : nodes.end;
    if (batch_.layer_stride == 0 && batch_.key_used[some.begin / kTogether] == 0) continue;
    for (int64_t m = some.begin; m < some.end; ++m) {
      slots[m - some.begin] =
          batch_.layer_stride != 0 ? batch_.slots[batch_.path[m] + batch_.positions[m]] : batch_.key_slots[m];
    }
    for (int64_t h = heads.begin; h < heads.end; ++h) {
      DigitHead to = digit_head(layer, h);
      to.slots = slots;
      const int64_t at = some.begin * frame_.kv_stride + h * to.record.dim;
      model_.digits->keep(to, frame_.k + at, frame_.v + at, frame_.kv_stride, static_cast<int>(some.size()));
    }
  }
}

void Member::attend_heads(size_t layer, Range nodes, Range heads) {
  HeadQuery head;
  head.dim = model_.head_dim();
  for (int64_t h = heads.begin; h < heads.end;
       ++h) {  // outside: a head's keys stay near for all nodes of a tree
    head.key = static_cast<int64_t>(layer) * batch_.layer_stride + h * head.dim;
    head.value = head.key + batch_.value_offset;
    for (int64_t m = nodes.begin; m < nodes.end; m += batch_.together() ? kTogether : 1) {
      float* q = frame_.q + m * model_.d + h * head.dim;
      if (batch_.together()) {
        attend_block(head, m, q);
      } else {
        deep(m) ? attend_deep(layer, h, m, q) : attend_node(head, m, q);
      }
    }
    if (batch_.key_first != nullptr) attend_deep_blocks(layer, h, nodes);
  }
}

void Member::attend_node(const HeadQuery& head, int64_t node, float* q) {
  HeadQuery query = head;
  ops_.scale_add(q, 1.0f / std::sqrt(static_cast<float>(head.dim)), nullptr, head.dim);
  query.q = q;
  query.slots = batch_.slots + batch_.path[node];
  query.count = batch_.positions[node] + 1;
  ops_.attend(query, scores_, q);
}

void Member::attend_block(const HeadQuery& head, int64_t first, float* q) {
  const int64_t left = batch_.nodes - first, at = first / kTogether, begin = batch_.seen_first[at];
  HeadBlock block;
  block.count = batch_.seen_first[at + 1] - begin;
  if (block.count == 0) return;  // all are deep
  block.q = q;
  block.q_stride = model_.d;
  block.queries = static_cast<int>(left < kTogether ? left : kTogether);
  for (int i = 0; i < block.queries; ++i) {
    if (deep(first + i)) block.wanted = static_cast<uint16_t>(block.wanted & ~(1u << i));
  }
  block.scale = 1.0f / std::sqrt(static_cast<float>(head.dim));
  block.slots = batch_.seen + begin;
  block.lanes = batch_.seen_by + begin;
  block.dim = head.dim;
  block.key = head.key;
  block.value = head.value;
  ops_.attend_together(block, scores_, q);
}

void Member::attend_deep(size_t layer, int64_t h, int64_t node, float* q) {
  DigitHead head = digit_head(layer, h);
  head.q = q;
  head.slots = batch_.slots + batch_.path[node];
  head.tokens = batch_.positions[node] + 1;
  model_.digits->attend(head, reinterpret_cast<uint8_t*>(scores_));
}

void Member::attend_deep_blocks(size_t layer, int64_t h, Range nodes) {
  DigitHead head = digit_head(layer, h);
  head.q = frame_.q + h * head.record.dim;
  head.queries = batch_.nodes;
  head.slots = batch_.key_slots;
  head.tokens = batch_.keys;
  const Range blocks{nodes.begin / kTogether, ceil_div(nodes.end, kTogether)};
  model_.digits->attend_together(head, blocks, reinterpret_cast<uint8_t*>(scores_));
}

DigitHead Member::digit_head(size_t layer, int64_t h) const {
  DigitHead head;
  head.record = model_.record();
  head.head = h;
  head.offset = (static_cast<int64_t>(layer) * batch_.layer_stride + batch_.record_offset) *
                static_cast<int64_t>(sizeof(float));
  head.sum_bits = sum_bits(model_.max_len);
  head.scale = 1.0f / std::sqrt(static_cast<float>(head.record.dim));
  head.q_stride = model_.d;
  head.first = batch_.key_first;
  head.blocks = batch_.key_blocks;
  head.masks = batch_.key_masks;
  head.used = batch_.key_used;
  head.most_blocks = batch_.most_key_blocks;
  return head;
}

// One head of a query or key at a position, in place.
void Member::rotate(int64_t position, float* x) const {
  const int64_t half = model_.head_dim() / 2;
  const float* cos = model_.positions + position * half;
  ops_.rotate(x, cos, cos + model_.max_len * half, half, x);
}

}  // namespace lowbit
