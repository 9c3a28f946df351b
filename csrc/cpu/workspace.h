// Memory that is laid out once for the largest call so far and reused.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "../layout.h"

namespace lowbit {

// Hands out 64-byte aligned pieces of a block; over a null base it only counts.
struct Bump {
  uint8_t* base = nullptr;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    const int64_t at = used;
    used += ceil_div(count * static_cast<int64_t>(sizeof(T)), kAlign) * kAlign;
    return base == nullptr ? nullptr : reinterpret_cast<T*>(base + at);
  }
};

// A block that grows and never shrinks.
class Block {
 public:
  uint8_t* reserve(int64_t bytes) {
    if (bytes > capacity_) {
      const int64_t size = ceil_div(bytes, kAlign) * kAlign;
      memory_.reset();
      capacity_ = 0;
      memory_.reset(static_cast<uint8_t*>(std::aligned_alloc(kAlign, static_cast<size_t>(size))));
      if (memory_ == nullptr) throw std::bad_alloc();
      capacity_ = size;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  std::unique_ptr<uint8_t, Free> memory_;
  int64_t capacity_ = 0;
};

}  // namespace lowbit
