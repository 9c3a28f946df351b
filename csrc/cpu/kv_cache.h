// Keys and values of decoding states: slots of one token each, in pages that never move.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "workspace.h"

namespace lowbit {

// A slot is float[slot_floats]: for every layer a key and a value. Freed slots are reused before a page is added.
class KvCache {
 public:
  KvCache(int64_t layers, int64_t layer_floats);

  int64_t layer_stride() const { return layer_floats_; }

  void allocate(int64_t count, std::vector<float*>& slots);  // appends
  void release(const std::vector<float*>& slots);

  int64_t used() const;   // slots
  int64_t bytes() const;  // of all pages

 private:
  static constexpr int64_t kPageSlots = 16;

  const int64_t layer_floats_, slot_floats_;
  mutable std::mutex mutex_;
  std::vector<std::unique_ptr<Block>> pages_;
  std::vector<float*> free_;
};

// Consecutive tokens of a path: what a decoding state owns. It keeps its ancestors alive; the slots of a state that
// nothing refers to any more go back to the cache.
struct KvNode {
  KvNode(std::shared_ptr<KvCache> cache, std::shared_ptr<const KvNode> parent, int64_t count, int64_t d);
  ~KvNode();
  KvNode(const KvNode&) = delete;
  KvNode& operator=(const KvNode&) = delete;

  std::shared_ptr<KvCache> cache;
  std::shared_ptr<const KvNode> parent;
  std::vector<float*> slots;  // of its own tokens
  std::vector<float> hidden;  // [D], output of its last token
  int64_t end;                // tokens from the beginning of the context to its last one
};

}  // namespace lowbit
