// Arrays with nothing around them, so that a kernel which touches one byte too many fails the self-test.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "layout.h"

#if !defined(__SANITIZE_ADDRESS__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace lowbit {

// `count` elements that end where the block ends. AddressSanitizer puts red zones around an exact heap block; other
// builds put a page without access behind it, which also stops what no sanitizer sees: AMX tile loads, assembly,
// and the code that the optimizer made.
// aligned: the array starts at a multiple of kAlign (its size must then be one of half of that); otherwise anywhere.
template <class T>
class Fenced {
 public:
  Fenced(int64_t count, bool aligned) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
#if defined(__SANITIZE_ADDRESS__)
    const size_t offset = aligned ? 0 : sizeof(T);
    if (posix_memalign(&block_, kAlign, bytes + offset) != 0) std::abort();
    data_ = reinterpret_cast<T*>(static_cast<char*>(block_) + offset);
#else
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), used = (bytes + page) / page * page;
    length_ = used + page;
    block_ = mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (block_ == MAP_FAILED) std::abort();
    char* end = static_cast<char*>(block_) + used;
    if (mprotect(end, page, PROT_NONE) != 0) std::abort();
    data_ = reinterpret_cast<T*>(end - (aligned ? (bytes + kAlign - 1) / kAlign * kAlign : bytes));
#endif
  }
#if defined(__SANITIZE_ADDRESS__)
  ~Fenced() { std::free(block_); }
#else
  ~Fenced() { munmap(block_, length_); }
#endif
  Fenced(const Fenced&) = delete;
  Fenced& operator=(const Fenced&) = delete;

  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  void* block_ = nullptr;
  T* data_ = nullptr;
#if !defined(__SANITIZE_ADDRESS__)
  size_t length_ = 0;
#endif
};

}  // namespace lowbit
