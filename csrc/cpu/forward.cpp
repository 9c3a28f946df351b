#include "forward.h"

#include <cmath>
#include <cstring>

#include "../prepack.h"
#include "forward_member.h"
#include "parallel.h"

namespace lowbit {
namespace {

constexpr int64_t kRedundantRows = 2;
constexpr int64_t kWorkPerThread = 1 << 16;  // multiply-adds between two barriers
constexpr int64_t kStripeFloats = 1 << 16;   // of logits: a part of L2

int64_t round_up(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }

// What the products of a forward need at most.
struct Needs {
  int64_t activations[3] = {}, scratch = 0;

  void add(const Linear& linear, int64_t rows, Compute compute, int form) {
    if (rows == 0) return;
    const LinearPlan plan = plan_linear(linear.w, rows, compute);
    const int64_t bytes = activation_bytes(plan);
    if (bytes > activations[form]) activations[form] = bytes;
    if (plan.scratch > scratch) scratch = plan.scratch;
  }
};

Needs needs(const Model& m, int64_t nodes, int64_t rows) {
  Needs all;
  for (const Layer& l : m.layers) {
    all.add(l.q, nodes, m.compute, 0);
    all.add(l.k, nodes, m.compute, 1);
    all.add(l.v, nodes, m.compute, 2);
    for (const Linear* w : {&l.o, &l.fc1, &l.fc2}) all.add(*w, nodes, m.compute, 0);
  }
  all.add(m.head, rows, m.compute, 0);
  return all;
}

// One piece a member, each on cache lines of its own.
template <class T>
void each(Bump& memory, int64_t& share, int64_t count, int64_t pieces, T*& pointer) {
  share = round_up(count, kAlign / static_cast<int64_t>(sizeof(T)));
  pointer = memory.take<T>(share * pieces);
}

void lay_out_reduction(const Model& m, const Batch& batch, Frame& f, Bump& memory) {
  f.parts = ceil_div(m.vocab, kPart);
  const int64_t room = round_up(f.parts, 16), fit = kStripeFloats / kPart / batch.rows;
  f.stripe = fit < 1 ? 1 : fit < f.parts ? fit : f.parts;
  f.part_max = memory.take<float>(batch.rows * room);
  f.part_sum = memory.take<float>(batch.rows * room);
  f.lse = memory.take<float>(batch.rows);
  f.target_logits = memory.take<float>(batch.target_count);
}

// Products take turns in the same memory, so that more of a forward stays in L2: q, k and v; then h; at last logits.
// Between the last reader of one and the first writer of the next lies a barrier.
void lay_out_products(const Model& m, const Batch& batch, Frame& f, Bump& memory) {
  const int64_t begin = memory.used;
  f.q = memory.take<float>(batch.nodes * m.d);
  for (float** p : {&f.k, &f.v}) *p = memory.take<float>(batch.nodes * f.kv_stride);
  const bool records = batch.key_first != nullptr && batch.layer_stride == 0;
  f.records = memory.take<uint8_t>(records ? batch.nodes * m.record().bytes() : 0);
  int64_t end = memory.used;
  memory.used = begin;
  f.h = memory.take<float>(batch.nodes * m.ffn);
  end = memory.used > end ? memory.used : end;
  memory.used = begin;
  if (batch.all != nullptr) {
    each(memory, f.logits_share, f.parts * kPart, 1, f.each_logits);
  } else if (batch.wants_logits()) {
    each(memory, f.logits_share, batch.rows * f.stripe * kPart, f.threads, f.each_logits);
  }
  memory.used = memory.used > end ? memory.used : end;
}

// Floats that attention of a query alone needs, and with digits of any.
int64_t attention_room(const Model& m, const Batch& batch) {
  if (m.digits == nullptr || m.max_len <= kDeep) return round_up(m.max_len, 16);
  DigitHead head;
  head.record = m.record();
  head.tokens = m.max_len > batch.keys ? m.max_len : batch.keys;
  head.most_blocks = batch.most_key_blocks;
  return ceil_div(m.digits->room(head), static_cast<int64_t>(sizeof(float)));
}

}  // namespace

int threads_for(const Model& m, int64_t nodes) {
  const int64_t useful = nodes * m.d * m.d / kWorkPerThread + 1, available = max_threads();
  return static_cast<int>(useful < available ? useful : available);
}

Frame lay_out(const Model& m, const Batch& batch, int threads, Bump& memory) {
  const int64_t nodes = batch.nodes, rows = batch.rows, most = nodes > rows ? nodes : rows;
  Frame f{};
  f.threads = threads;
  f.redundant = most <= kRedundantRows;
  f.kv_stride = m.d + kTileN;
  const int64_t copies = f.redundant ? f.threads : 1, wide = round_up(m.d > m.ffn ? m.d : m.ffn, kTileK);
  each(memory, f.x_share, nodes * m.d, copies, f.x);
  f.branch = memory.take<float>(nodes * m.d);
  each(memory, f.row_share, wide, f.threads, f.each_row);
  each(memory, f.dense_share, m.compute == Compute::kExact ? most * wide : 0, copies, f.each_dense);
  const Needs need = needs(m, nodes, batch.wants_logits() ? rows : 0);
  for (int i = 0; i < 3; ++i)
    each(memory, f.activations_share[i], need.activations[i], copies, f.each_activations[i]);
  each(memory, f.scratch_share, need.scratch, f.threads, f.each_scratch);
  if (batch.wants_logits()) lay_out_reduction(m, batch, f, memory);
  int64_t room = 2 * round_up(f.parts, 16);
  for (const int64_t n : {attention_room(m, batch), HeadBlock::room(batch.most_seen, m.head_dim())})
    room = n > room ? n : room;
  each(memory, f.scores_share, room, f.threads, f.each_scores);
  lay_out_products(m, batch, f, memory);
  return f;
}

void forward(const Model& model, const Batch& batch, const Frame& frame) {
  parallel(frame.threads, [&](const Team& team) {
    Member member(model, batch, frame, team);
    if (batch.nodes > 0) {
      for (size_t l = 0; l < model.layers.size(); ++l) {
        member.attention(l);
        member.mlp(l);
      }
    }
    member.output();
  });
}

}  // namespace lowbit
