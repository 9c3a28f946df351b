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
Member::RowInput Member::go_on(int64_t node, const NormWeights& before, const NormWeights& after,
                               float* room) {
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
  const Range nodes = share(n, batch_.together() ? kTogether : 1, {team_.rank / columns, groups});
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

void Member::mlp(size_t layer) {
  const Layer& l = model_.layers[layer];
  const int64_t n = batch_.nodes;
  Product fc1 = product(l.fc1, n, frame_.h);
  const bool activated = fc1.plan.activates;
  if (activated) fc1.job.activation = model_.activation;
  prepare_rows(&fc1, 1, n, [&](int64_t m, float* room) { return go_on(m, l.norm2, l.norm1, room); });
  run(fc1);
  mark(kProducts);
  wait();

  Product fc2 = product(l.fc2, n, frame_.branch);
  prepare_rows(&fc2, 1, n, [&](int64_t m, float* room) {
    const float* h = frame_.h + m * model_.ffn;
    if (activated) return RowInput{h, ops_.magnitude(h, model_.ffn)};
    return RowInput{room, ops_.activation[model_.activation](h, model_.ffn, room)};
  });
  run(fc2);
  mark(kProducts);
  wait();
}

}  // namespace lowbit
