#include "engine.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <numeric>

#include "parallel.h"

namespace lowbit {
namespace {

constexpr int64_t kWorthAForward = 32;  // nodes: fewer would leave the matrix kernels' panels empty
constexpr int64_t kWorthTogether = 4;   // nodes: fewer would leave most lanes of attention empty

// One team at a time: forwards of several callers that share the cores would only wait at each other's barriers.
std::mutex g_team;

// The instruction set of this moment decides: states must keep one form of keys and values.
Model with_digits(Model model) {
  if (model.compute == Compute::kInt8) model.digits = digit_ops(selected_isa());
  return model;
}

int64_t layer_floats(const Model& m) {
  const bool digits = m.digits != nullptr && m.max_len > kDeep;
  return 2 * m.d + (digits ? m.record().bytes() / static_cast<int64_t>(sizeof(float)) : 0);
}

}  // namespace

class Engine::Lease {
 public:
  explicit Lease(Engine& engine) : engine_(engine) {
    const std::lock_guard<std::mutex> lock(engine.mutex_);
    if (engine.idle_.empty()) {
      workspace_ = std::make_unique<Workspace>();
      engine.idle_.reserve(++engine.workspaces_);
    } else {
      workspace_ = std::move(engine.idle_.back());
      engine.idle_.pop_back();
    }
  }
  ~Lease() {
    const std::lock_guard<std::mutex> lock(engine_.mutex_);
    engine_.idle_.push_back(std::move(workspace_));
  }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  Workspace& operator*() const { return *workspace_; }

 private:
  Engine& engine_;
  std::unique_ptr<Workspace> workspace_;
};

Engine::Engine(Model model, int64_t token_budget)
    : model_(with_digits(std::move(model))),
      token_budget_(token_budget),
      cache_(std::make_shared<KvCache>(static_cast<int64_t>(model_.layers.size()), layer_floats(model_))) {}

void Engine::run_team(const Batch& batch, const Frame& frame) const {
  std::unique_lock<std::mutex> lock(g_team, std::defer_lock);
  if (frame.threads > 1) lock.lock();
  forward(model_, batch, frame);
}

Frame Engine::lay_out_in(const Batch& batch, int threads, Workspace& ws) const {
  Bump count;
  lay_out(model_, batch, threads, count);
  Bump memory{ws.memory.reserve(count.used)};
  return lay_out(model_, batch, threads, memory);
}

// Two ways to use several threads. Batches of whole trees side by side, each a forward of one thread, need no
// barriers, and no activation ever crosses from one core to another. A query that is too small for that is one
// forward of a team.
void Engine::score(const ForestQuery& query, float* out) {
  Lease lease(*this);
  Workspace& ws = *lease;
  order_requests(query, ws);
  const int threads = threads_for(model_, query.nodes);
  cut(query, threads, ws.batches);
  if (threads > 1 && ws.batches.size() > 1) {
    score_side_by_side(query, threads, ws, out);
  } else {
    for (const Range& batch : ws.batches) score_batch(query, ws, batch, threads, ws, out);
  }
}

void Engine::profile(const ForestQuery& query, float* out, double* seconds) {
  Lease lease(*this);
  Workspace& ws = *lease;
  order_requests(query, ws);
  cut(query, 1, ws.batches);
  for (const Range& batch : ws.batches) score_batch(query, ws, batch, 1, ws, out, seconds);
}

// Requests in the order of their nodes, by counting.
void Engine::order_requests(const ForestQuery& query, Workspace& ws) {
  ws.first.assign(static_cast<size_t>(query.nodes) + 1, 0);
  for (int64_t r = 0; r < query.requests; ++r) ++ws.first[query.request_nodes[r] + 1];
  for (int64_t i = 0; i < query.nodes; ++i) ws.first[i + 1] += ws.first[i];
  ws.next = ws.first;
  ws.request_order.resize(static_cast<size_t>(query.requests));
  for (int64_t r = 0; r < query.requests; ++r) ws.request_order[ws.next[query.request_nodes[r]]++] = r;
}

// Batches of nearly equal size, a multiple of the threads where they are worth dividing.
void Engine::cut(const ForestQuery& query, int threads, std::vector<Range>& batches) const {
  int64_t count = ceil_div(query.nodes, token_budget_);
  if (query.nodes >= threads * kWorthAForward) count = ceil_div(count, threads) * threads;
  const int64_t size = ceil_div(query.nodes, count);
  batches.clear();
  int64_t begin = 0, last = 0;  // of the batch, and the end of its latest tree
  const auto close = [&](int64_t end) {
    batches.push_back({begin, end});
    begin = last = end;
  };
  for (int64_t end = 1; end <= query.nodes; ++end) {
    if (end < query.nodes && query.parents[end] >= 0) continue;
    if (last > begin && end - begin - size > size - (last - begin)) close(last);  // nearer without this tree
    last = end;
    if (end - begin >= size) close(end);
  }
  if (begin < query.nodes) close(query.nodes);
}

void Engine::score_side_by_side(const ForestQuery& query, int threads, Workspace& ws, float* out) {
  while (ws.members.size() < static_cast<size_t>(threads))
    ws.members.push_back(std::make_unique<Workspace>());
  std::atomic<size_t> next{0};
  std::exception_ptr failure;  // nothing may be thrown out of a parallel region
  std::mutex failure_mutex;
  const std::lock_guard<std::mutex> lock(g_team);
  parallel(threads, [&](const Team& team) {
    try {
      for (size_t i = next++; i < ws.batches.size(); i = next++) {
        score_batch(query, ws, ws.batches[i], 1, *ws.members[static_cast<size_t>(team.rank)], out);
      }
    } catch (...) {
      const std::lock_guard<std::mutex> guard(failure_mutex);
      failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
}

// One forward over whole trees, nodes [begin, end) of the forest.
void Engine::score_batch(const ForestQuery& query, const Workspace& order, Range nodes, int threads,
                         Workspace& ws, float* out, double* seconds) const {
  const int64_t requests = order.first[nodes.end] - order.first[nodes.begin];
  if (requests == 0) return;
  find_paths(query, nodes, ws);
  ws.row_nodes.clear();
  ws.targets.clear();
  for (int64_t i = nodes.begin; i < nodes.end; ++i) {
    if (order.first[i] == order.first[i + 1]) continue;
    const auto row = static_cast<int32_t>(ws.row_nodes.size());
    ws.row_nodes.push_back(static_cast<int32_t>(i - nodes.begin));
    for (int64_t at = order.first[i]; at < order.first[i + 1]; ++at) {
      const int64_t r = order.request_order[at];
      ws.targets.push_back({static_cast<int32_t>(query.request_targets[r]), row, r});
    }
  }
  std::sort(ws.targets.begin(), ws.targets.end(),
            [](const Target& a, const Target& b) { return a.token < b.token; });

  Batch batch;
  batch.nodes = nodes.size();
  batch.tokens = query.tokens + nodes.begin;
  batch.positions = ws.positions.data();
  batch.path = ws.path.data();
  batch.rows = static_cast<int64_t>(ws.row_nodes.size());
  batch.row_nodes = ws.row_nodes.data();
  batch.targets = ws.targets.data();
  batch.target_count = requests;
  batch.log_probs = out;
  batch.seconds = seconds;
  if (batch.nodes >= kWorthTogether) find_together(batch.nodes, ws, batch);
  const Frame frame = lay_out_in(batch, threads, ws);
  // Slots in the very rows that the k and v products write.
  const auto slots_of = [&](const std::vector<int32_t>& rows, std::vector<float*>& slots) {
    slots.resize(rows.size());
    for (size_t i = 0; i < slots.size(); ++i) slots[i] = frame.k + rows[i] * frame.kv_stride;
    return slots.data();
  };
  batch.slots = slots_of(ws.path_nodes, ws.slots);
  batch.seen = slots_of(ws.seen_ids, ws.seen);
  ws.key_slots.resize(static_cast<size_t>(batch.keys));
  for (int64_t i = 0; i < batch.keys; ++i)
    ws.key_slots[i] = reinterpret_cast<float*>(frame.records + i * model_.record().bytes());
  batch.key_slots = ws.key_slots.data();
  batch.value_offset = frame.v - frame.k;
  run_team(batch, frame);
}

std::shared_ptr<KvNode> Engine::extend(std::shared_ptr<const KvNode> parent, const int32_t* tokens,
                                       int64_t count, float* all) {
  Lease lease(*this);
  Workspace& ws = *lease;
  auto node = std::make_shared<KvNode>(cache_, std::move(parent), count, model_.d);
  ws.slots.resize(static_cast<size_t>(node->end));
  for (const KvNode* at = node.get(); at != nullptr; at = at->parent.get()) {
    std::copy(at->slots.begin(), at->slots.end(),
              ws.slots.begin() + (at->end - static_cast<int64_t>(at->slots.size())));
  }
  ws.positions.clear();
  for (int64_t i = node->end - count; i < node->end; ++i) ws.positions.push_back(static_cast<int32_t>(i));
  ws.path.assign(static_cast<size_t>(count), 0);
  ws.row_nodes.assign(1, static_cast<int32_t>(count - 1));

  Batch batch;
  batch.nodes = count;
  batch.tokens = tokens;
  batch.positions = ws.positions.data();
  batch.path = ws.path.data();
  batch.slots = ws.slots.data();
  if (count >= kWorthTogether) {
    ws.path_nodes.resize(static_cast<size_t>(node->end));
    std::iota(ws.path_nodes.begin(), ws.path_nodes.end(), 0);
    find_together(node->end, ws, batch);
    ws.seen.clear();
    for (const int32_t id : ws.seen_ids) ws.seen.push_back(ws.slots[id]);
    batch.seen = ws.seen.data();
    batch.key_slots = ws.slots.data();
  }
  batch.layer_stride = cache_->layer_stride();
  batch.value_offset = model_.d;
  batch.record_offset = 2 * model_.d;
  batch.rows = 1;
  batch.row_nodes = ws.row_nodes.data();
  batch.hidden = node->hidden.data();
  batch.all = all;
  run_team(batch, lay_out_in(batch, threads_for(model_, count), ws));
  return node;
}

void Engine::log_probs(const KvNode& node, float* out) {
  Lease lease(*this);
  Batch batch;
  batch.rows = 1;
  batch.hidden = const_cast<float*>(node.hidden.data());  // only read: the batch has no nodes
  batch.all = out;
  run_team(batch, lay_out_in(batch, threads_for(model_, 1), *lease));
}

}  // namespace lowbit
