#include "kv_cache.h"

namespace lowbit {

// 16 floats more than the data: slots a multiple of 4096 bytes apart would all fall into the same sets of the
// L1 cache.
KvCache::KvCache(int64_t layers, int64_t layer_floats)
    : layer_floats_(layer_floats), slot_floats_(ceil_div(layers * layer_floats, 16) * 16 + 16) {}

void KvCache::allocate(int64_t count, std::vector<float*>& slots) {
  slots.reserve(slots.size() + static_cast<size_t>(count));
  const std::lock_guard<std::mutex> lock(mutex_);
  while (static_cast<int64_t>(free_.size()) < count) {
    auto page = std::make_unique<Block>();
    auto* first = reinterpret_cast<float*>(
        page->reserve(kPageSlots * slot_floats_ * static_cast<int64_t>(sizeof(float))));
    // Room for every slot: release() never allocates.
    free_.reserve((pages_.size() + 1) * static_cast<size_t>(kPageSlots));
    pages_.push_back(std::move(page));
    for (int64_t i = kPageSlots - 1; i >= 0; --i) free_.push_back(first + i * slot_floats_);
  }
  slots.insert(slots.end(), free_.rbegin(), free_.rbegin() + count);
  free_.resize(free_.size() - static_cast<size_t>(count));
}

void KvCache::release(const std::vector<float*>& slots) {
  const std::lock_guard<std::mutex> lock(mutex_);
  free_.insert(free_.end(), slots.rbegin(), slots.rend());
}

int64_t KvCache::used() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<int64_t>(pages_.size()) * kPageSlots - static_cast<int64_t>(free_.size());
}

int64_t KvCache::bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<int64_t>(pages_.size()) * kPageSlots * slot_floats_ *
         static_cast<int64_t>(sizeof(float));
}

KvNode::KvNode(std::shared_ptr<KvCache> cache_, std::shared_ptr<const KvNode> parent_, int64_t count,
               int64_t d)
    : cache(std::move(cache_)), parent(std::move(parent_)), hidden(static_cast<size_t>(d)) {
  end = (parent ? parent->end : 0) + count;
  cache->allocate(count, slots);
}

// A long path dies from its end to its beginning in a loop: recursion through the parents could exhaust the stack.
KvNode::~KvNode() {
  cache->release(slots);
  auto up = std::move(parent);
  while (up && up.use_count() == 1) {
    auto next = std::const_pointer_cast<KvNode>(up)->parent;
    std::const_pointer_cast<KvNode>(up)->parent.reset();
    up = std::move(next);
  }
}

}  // namespace lowbit
