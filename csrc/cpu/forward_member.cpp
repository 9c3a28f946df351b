#include "forward_member.h"

#include <cmath>
#include <cstring>

#include "../prepack.h"

namespace lowbit {

Member::Member(const Model& model, const Batch& batch, const Frame& frame, const Team& team)
    : model_(model), batch_(batch), frame_(frame), ops_(row_ops(selected_isa())), team_(team) {
  const int64_t copy = frame.redundant ? team.rank : 0;
  x_ = frame.x + copy * frame.x_share;
  dense_ = frame.each_dense + copy * frame.dense_share;
  for (int i = 0; i < 3; ++i) activations_[i] = frame.each_activations[i] + copy * frame.activations_share[i];
  row_ = frame.each_row + team.rank * frame.row_share;
  scores_ = frame.each_scores + team.rank * frame.scores_share;
  scratch_ = frame.each_scratch + team.rank * frame.scratch_share;
  if (batch.seconds != nullptr) marked_ = std::chrono::steady_clock::now();
}

void Member::mark(Phase phase) {
  if (batch_.seconds == nullptr || team_.rank != 0) return;
  const auto now = std::chrono::steady_clock::now();
  batch_.seconds[phase] += std::chrono::duration<double>(now - marked_).count();
  marked_ = now;
}

void Member::wait() {
  team_.barrier();
  mark(kWait);
}

Member::Product Member::product(const Linear& linear, int64_t rows, float* y) const {
  Product p;
  p.plan = plan_linear(linear.w, rows, model_.compute);
  p.job.w = linear.w;
  p.job.bias = linear.bias;
  p.job.m = rows;
  p.job.y = y;
  p.job.y_stride = linear.w.n;
  return p;
}

void Member::embed(int64_t node) {
  const int64_t token = batch_.tokens[node];
  float* x = x_ + node * model_.d;
  dequantize_rows(model_.embed, &token, 1, x);
  const float* position = model_.rotary ? nullptr : model_.positions + batch_.positions[node] * model_.d;
  ops_.scale_add(x, std::sqrt(static_cast<float>(model_.d)), position, model_.d);
}

// The input of the first branch.
Member::RowInput Member::begin(int64_t node, float* room) {
  embed(node);
  const float* x = x_ + node * model_.d;
  if (!model_.pre_norm) return {x};
  return {room, ops_.layer_norm(x, model_.layers[0].norm1, model_.d, room)};
}

// The input of a later branch: the output of the branch before it joins the residual stream. Pre-norm models normalize
// what goes into a branch (`before`), post-norm models the stream `after` a branch.
Member::RowInput Member::go_on(int64_t node, const NormWeights& before, const NormWeights& after, float* room) {
  float* x = x_ + node * model_.d;
  float* out = model_.pre_norm ? room : x;
  const NormWeights& norm = model_.pre_norm ? before : after;
  return {out, ops_.add_norm(x, frame_.branch + node * model_.d, norm, model_.d, out)};
}

void Member::attention(size_t layer) {
  const Layer& l = model_.layers[layer];
  const int64_t n = batch_.nodes;
  Product qkv[3] = {product(l.q, n, frame_.q), product(l.k, n, frame_.k), product(l.v, n, frame_.v)};
  qkv[1].job.y_stride = qkv[2].job.y_stride = frame_.kv_stride;
  prepare_rows(qkv, 3, n, [&](int64_t m, float* room) {
    return layer == 0 ? begin(m, room) : go_on(m, l.norm1, model_.layers[layer - 1].norm2, room);
  });
  // Members share the heads, and where there are more members than heads, the nodes too.
  const int columns = static_cast<int>(team_.size < model_.heads ? team_.size : model_.heads);
  const int groups = team_.size / columns;
  const bool idle = team_.rank >= columns * groups;
  const Range heads = share(model_.heads, 1, {team_.rank % columns, columns});
  if (frame_.redundant && columns == team_.size && model_.head_dim() % kTileN == 0) {
    // Few rows: every member makes what its own heads need, and waits for nobody.
    const int64_t blocks = model_.head_dim() / kTileN;
    for (const Product& p : qkv)
      p.plan.kernel(p.job, {heads.begin * blocks, heads.end * blocks}, {0, n}, scratch_);
    mark(kProducts);
  } else {
    for (const Product& p : qkv) run(p);
    mark(kProducts);
    wait();
  }
  const Range nodes = share(n, batch_.seen_first == nullptr ? 1 : kTogether, {team_.rank / columns, groups});
  if (!idle) keep_keys(layer, nodes, heads);
  if (groups > 1) wait();
  if (!idle) attend_heads(layer, nodes, heads);
  mark(kAttention);
  wait();

  Product o = product(l.o, n, frame_.branch);
  prepare_rows(&o, 1, n, [&](int64_t m, float*) { return RowInput{frame_.q + m * model_.d}; });
  run(o);
  mark(kProducts);
  wait();
}

// Rotates the new keys, and puts keys and values where the slots say.
void Member::keep_keys(size_t layer, Range nodes, Range heads) {
  const int64_t dim = model_.head_dim();
  const size_t bytes = static_cast<size_t>(dim) * sizeof(float);
  for (int64_t m = nodes.begin; m < nodes.end; ++m) {
    const int64_t position = batch_.positions[m];
    float* slot = batch_.slots[batch_.path[m] + position] + static_cast<int64_t>(layer) * batch_.layer_stride;
    for (int64_t h = heads.begin; h < heads.end; ++h) {
      const float *k = frame_.k + m * frame_.kv_stride + h * dim,
                  *v = frame_.v + m * frame_.kv_stride + h * dim;
      float *key = slot + h * dim, *value = key + batch_.value_offset;
      if (model_.rotary) {
        rotate(position, k, key);
      } else if (key != k) {
        std::memcpy(key, k, bytes);
      }
      if (value != v) std::memcpy(value, v, bytes);
    }
  }
}

void Member::attend_heads(size_t layer, Range nodes, Range heads) {
  HeadQuery head;
  head.dim = model_.head_dim();
  const bool together = batch_.seen_first != nullptr;
  for (int64_t h = heads.begin; h < heads.end;
       ++h) {  // outside: a head's keys stay near for all nodes of a tree
    head.key = static_cast<int64_t>(layer) * batch_.layer_stride + h * head.dim;
    head.value = head.key + batch_.value_offset;
    for (int64_t m = nodes.begin; m < nodes.end; m += together ? kTogether : 1) {
      float* q = frame_.q + m * model_.d + h * head.dim;
      together ? attend_block(head, m, q) : attend_node(head, m, q);
    }
  }
}

void Member::attend_node(const HeadQuery& head, int64_t node, float* q) {
  const int64_t position = batch_.positions[node];
  HeadQuery query = head;
  if (model_.rotary) rotate(position, q, q);
  ops_.scale_add(q, 1.0f / std::sqrt(static_cast<float>(head.dim)), nullptr, head.dim);
  query.q = q;
  query.slots = batch_.slots + batch_.path[node];
  query.count = position + 1;
  ops_.attend(query, scores_, q);
}

void Member::attend_block(const HeadQuery& head, int64_t first, float* q) {
  const int64_t left = batch_.nodes - first, at = first / kTogether, begin = batch_.seen_first[at];
  HeadBlock block;
  block.q = q;
  block.q_stride = model_.d;
  block.queries = static_cast<int>(left < kTogether ? left : kTogether);
  block.scale = 1.0f / std::sqrt(static_cast<float>(head.dim));
  block.slots = batch_.seen + begin;
  block.lanes = batch_.seen_by + begin;
  block.count = batch_.seen_first[at + 1] - begin;
  block.dim = head.dim;
  block.key = head.key;
  block.value = head.value;
  for (int i = 0; model_.rotary && i < block.queries; ++i)
    rotate(batch_.positions[first + i], q + i * model_.d, q + i * model_.d);
  ops_.attend_together(block, scores_, q);
}

// One head of a query or key at a position.
void Member::rotate(int64_t position, const float* x, float* out) const {
  const int64_t half = model_.head_dim() / 2;
  const float* cos = model_.positions + position * half;
  ops_.rotate(x, cos, cos + model_.max_len * half, half, out);
}

void Member::mlp(size_t layer) {
  const Layer& l = model_.layers[layer];
  const int64_t n = batch_.nodes;
  Product fc1 = product(l.fc1, n, frame_.h);
  prepare_rows(&fc1, 1, n, [&](int64_t m, float* room) {
    return go_on(m, l.norm2, l.norm1, room);
  });
  run(fc1);
  mark(kProducts);
  wait();

  Product fc2 = product(l.fc2, n, frame_.branch);
  prepare_rows(&fc2, 1, n, [&](int64_t m, float* room) {
    return RowInput{room, ops_.activation[model_.activation](frame_.h + m * model_.ffn, model_.ffn, room)};
  });
  run(fc2);
  mark(kProducts);
  wait();
}

}  // namespace lowbit
