// The native engine: a model, and the forwards that score forests, extend decoding states and give distributions.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "forward.h"
#include "kv_cache.h"

namespace lowbit {

// Nodes in an order in which parents come first, trees one after another; and what is asked of them.
struct ForestQuery {
  int64_t nodes = 0;
  const int32_t* tokens = nullptr;   // [nodes], below the vocabulary
  const int32_t* parents = nullptr;  // [nodes], -1 for a root
  int64_t requests = 0;
  const int64_t* request_nodes = nullptr;    // [requests]
  const int64_t* request_targets = nullptr;  // [requests], below the vocabulary
};

// May be called from any thread. Arguments are checked by the caller (lowbit/native.py); paths are no longer
// than the model's context.
class Engine {
 public:
  // token_budget: nodes after which a forward takes no more trees.
  Engine(Model model, int64_t token_budget);

  // out[r] = natural log P(target | path to the node) of every request.
  void score(const ForestQuery& query, float* out);

  // The same on one thread, for profiles: adds to seconds[kPhases].
  void profile(const ForestQuery& query, float* out, double* seconds);

  // Reads tokens after `parent` (null: at the beginning of a context). all: null, or [V] log P of every next token.
  std::shared_ptr<KvNode> extend(std::shared_ptr<const KvNode> parent, const int32_t* tokens, int64_t count,
                                 float* all);

  // out[V]: log P of every token after the node's last.
  void log_probs(const KvNode& node, float* out);

  const KvCache& cache() const { return *cache_; }
  int64_t vocab() const { return model_.vocab; }
  int64_t context() const { return model_.max_len; }

 private:
  // What a call borrows and gives back, so that repeated calls allocate nothing.
  struct Workspace {
    std::vector<int64_t> first, next, request_order;  // of a query: the requests of each node
    std::vector<Range> batches;
    std::vector<std::unique_ptr<Workspace>> members;        // for batches side by side
    std::vector<int32_t> positions, path_nodes, row_nodes;  // of one forward
    std::vector<int64_t> path, seen_first;
    std::vector<int32_t> seen_ids;  // tokens by the numbers that path_nodes has
    std::vector<uint16_t> seen_by, mark;
    std::vector<float*> slots, seen, key_slots;
    std::vector<int64_t> key_first;
    std::vector<int32_t> key_blocks;
    std::vector<uint16_t> key_masks;
    std::vector<uint8_t> key_used;
    std::vector<Target> targets;
    Block memory;
  };
  class Lease;

  static void order_requests(const ForestQuery& query, Workspace& ws);
  void cut(const ForestQuery& query, int threads, std::vector<Range>& batches) const;
  void score_side_by_side(const ForestQuery& query, int threads, Workspace& ws, float* out);
  void score_batch(const ForestQuery& query, const Workspace& order, Range nodes, int threads, Workspace& ws,
                   float* out, double* seconds = nullptr) const;
  static void find_paths(const ForestQuery& query, Range nodes, Workspace& ws);
  static void find_seen(int64_t tokens, int32_t deep, Workspace& ws, Batch& batch);
  static void find_key_blocks(int64_t tokens, Workspace& ws, Batch& batch);
  void find_together(int64_t tokens, Workspace& ws, Batch& batch) const;
  Frame lay_out_in(const Batch& batch, int threads, Workspace& ws) const;
  void run_team(const Batch& batch, const Frame& frame) const;

  const Model model_;
  const int64_t token_budget_;
  const std::shared_ptr<KvCache> cache_;
  std::mutex mutex_;
  size_t workspaces_ = 0;
  std::vector<std::unique_ptr<Workspace>> idle_;
};

}  // namespace lowbit
