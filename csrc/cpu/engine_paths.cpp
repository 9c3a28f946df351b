// What the nodes of a forward see: paths, and for blocks of nodes the tokens that any of them sees.
#include <algorithm>

#include "engine.h"

namespace lowbit {

// For every node its depth, and where the list of its ancestors and itself begins. A node right after its parent
// prolongs the parent's list; others, where a trie branches, begin with a copy of it.
void Engine::find_paths(const ForestQuery& query, Range nodes, Workspace& ws) {
  ws.positions.clear();
  ws.path.clear();
  ws.path_nodes.clear();
  for (int64_t i = 0; i < nodes.size(); ++i) {
    const int64_t parent = query.parents[nodes.begin + i] - nodes.begin;
    if (query.parents[nodes.begin + i] < 0) {
      ws.positions.push_back(0);
      ws.path.push_back(static_cast<int64_t>(ws.path_nodes.size()));
    } else {
      const int32_t depth = ws.positions[parent] + 1;
      ws.positions.push_back(depth);
      if (parent == i - 1) {
        ws.path.push_back(ws.path[parent]);
      } else {
        const auto begin = static_cast<int64_t>(ws.path_nodes.size());
        ws.path.push_back(begin);
        ws.path_nodes.resize(static_cast<size_t>(begin + depth));
        std::copy_n(ws.path_nodes.begin() + ws.path[parent], depth, ws.path_nodes.begin() + begin);
      }
    }
    ws.path_nodes.push_back(static_cast<int32_t>(i));
  }
}

// For every block of nodes the tokens that those before `deep` see, numbered as in path_nodes, in ascending order: from
// the roots on.
void Engine::find_seen(int64_t tokens, int32_t deep, Workspace& ws, Batch& batch) {
  ws.mark.assign(static_cast<size_t>(tokens), 0);
  ws.seen_first.assign(1, 0);
  ws.seen_ids.clear();
  ws.seen_by.clear();
  for (int64_t begin = 0; begin < batch.nodes; begin += kTogether) {
    const int64_t end = std::min(begin + kTogether, batch.nodes);
    auto nobody = static_cast<uint16_t>(0xFFFFu << (end - begin));
    int32_t low = ws.path_nodes[ws.path[begin]], high = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int32_t* path = ws.path_nodes.data() + ws.path[i];
      const auto lane = static_cast<uint16_t>(1u << (i - begin));
      if (ws.positions[i] >= deep) {
        nobody |= lane;
        continue;
      }
      for (int32_t j = 0; j <= ws.positions[i]; ++j) ws.mark[path[j]] |= lane;
      low = std::min(low, path[0]);
      high = std::max(high, path[ws.positions[i]]);
    }
    for (int32_t id = low; id <= high; ++id) {
      if (ws.mark[id] == 0) continue;
      ws.seen_ids.push_back(id);
      ws.seen_by.push_back(ws.mark[id] | nobody);
      ws.mark[id] = 0;
    }
    const auto count = static_cast<int64_t>(ws.seen_ids.size());
    batch.most_seen = std::max(batch.most_seen, count - ws.seen_first.back());
    ws.seen_first.push_back(count);
  }
  batch.seen_first = ws.seen_first.data();
  batch.seen_by = ws.seen_by.data();
}

// For every block of nodes the blocks of tokens that its deep ones see.
void Engine::find_key_blocks(int64_t tokens, Workspace& ws, Batch& batch) {
  ws.mark.assign(static_cast<size_t>(ceil_div(tokens, kTogether) * kTogether), 0);  // [block of tokens][node]
  ws.key_first.assign(1, 0);
  ws.key_blocks.clear();
  ws.key_masks.clear();
  ws.key_used.assign(static_cast<size_t>(ceil_div(tokens, kTogether)), 0);
  for (int64_t begin = 0; begin < batch.nodes; begin += kTogether) {
    const int64_t end = std::min(begin + kTogether, batch.nodes);
    int32_t low = ws.path_nodes[ws.path[begin]], high = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int32_t *path = ws.path_nodes.data() + ws.path[i], last = ws.positions[i];
      if (last < kDeep) continue;
      for (int32_t j = 0; j <= last; ++j)
        ws.mark[path[j] / kTogether * kTogether + i - begin] |=
            static_cast<uint16_t>(1u << path[j] % kTogether);
      low = std::min(low, path[0]);
      high = std::max(high, path[last]);
    }
    for (int64_t block = low / kTogether; block * kTogether <= high; ++block) {
      const auto masks = ws.mark.begin() + block * kTogether;
      if (std::all_of(masks, masks + kTogether, [](uint16_t mask) { return mask == 0; })) continue;
      ws.key_used[block] = 1;
      ws.key_blocks.push_back(static_cast<int32_t>(block));
      ws.key_masks.insert(ws.key_masks.end(), masks, masks + kTogether);
      std::fill_n(masks, kTogether, uint16_t{0});
    }
    const auto count = static_cast<int64_t>(ws.key_blocks.size());
    batch.most_key_blocks = std::max(batch.most_key_blocks, count - ws.key_first.back());
    ws.key_first.push_back(count);
  }
  batch.keys = tokens;
  batch.key_first = ws.key_first.data();
  batch.key_blocks = ws.key_blocks.data();
  batch.key_masks = ws.key_masks.data();
  batch.key_used = ws.key_used.data();
}

void Engine::find_together(int64_t tokens, Workspace& ws, Batch& batch) const {
  const bool digits = model_.digits != nullptr;
  find_seen(tokens, digits ? kDeep : INT32_MAX, ws, batch);
  const auto deep = [](int32_t position) { return position >= kDeep; };
  if (digits && std::any_of(ws.positions.begin(), ws.positions.end(), deep))
    find_key_blocks(tokens, ws, batch);
}

}  // namespace lowbit
