// The names of device.cuh on a CPU: runs the kernels' own source, one block after the other, threads as fibers.
//
// What it checks while it runs: every global access lies inside a registered array, and follows wait_for_previous(); lanes of a warp meet at the same
// mma; barriers are reached by all threads; asynchronous copies arrive only when they were waited for (until then the
// target holds NaNs, as all shared memory does at the start); threads are resumed in an order that changes with the
// seed, so that a missing barrier changes results. It counts shared-memory wavefronts of 16-byte accesses.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "ptx.cuh"

namespace lowbit::gpu {
namespace simt {

enum class State { kReady, kAtBarrier, kAtMma, kDone };

struct Copy {
  char* to;
  const char* from;
  int bytes;
};

struct Mma {
  float* d;
  const uint32_t *a, *b;
  bool bf16;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state = State::kReady;
  int index = 0;
  bool waited = false;  // for the kernel before
  Mma mma{};
  std::vector<Copy> open;                // not committed
  std::deque<std::vector<Copy>> groups;  // committed, not waited for
  std::vector<int64_t> accesses;         // 16-byte shared accesses, byte offsets
};

struct Range {
  const char *begin, *end;
};

constexpr size_t kStack = 64 * 1024;

// One launch. Errors inside a kernel are kept and thrown when it is over: fibers have no unwinder to cross.
class Machine {
 public:
  static Machine*& current() {
    static Machine* machine = nullptr;
    return machine;
  }

  Machine(std::vector<Range> arrays, unsigned seed) : arrays_(std::move(arrays)), random_(seed) {}

  void launch(int grid_x, int grid_y, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
    current() = this;
    grid[0] = grid_x, grid[1] = grid_y;
    shared_.assign(shared_bytes / 16 + 1, Vec4{});
    std::vector<int> blocks(static_cast<size_t>(grid_x) * grid_y);
    for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<int>(i);
    std::shuffle(blocks.begin(), blocks.end(), random_);
    for (int b : blocks) {
      block[0] = b % grid_x, block[1] = b / grid_x;
      run_block(threads, kernel);
      if (!error_.empty()) break;
    }
    current() = nullptr;
    if (!error_.empty()) throw std::runtime_error(error_);
  }

  // A global access: inside of an array, aligned, and not while the kernel before may still run.
  void check(const void* p, size_t bytes) {
    if (early && !running->waited) return fail("access before the previous kernel's end");
    check_extent(p, bytes);
  }
  void check_extent(const void* p, size_t bytes) {
    const char* at = static_cast<const char*>(p);
    for (const Range& r : arrays_) {
      if (at >= r.begin && at + bytes <= r.end) {
        if (reinterpret_cast<uintptr_t>(at) % bytes != 0 && (bytes & (bytes - 1)) == 0)
          fail("misaligned access");
        return;
      }
    }
    fail("access outside of every array");
  }
  void check_shared(const void* p, size_t bytes) {
    const char *at = static_cast<const char*>(p), *begin = shared();
    if (at < begin || at + bytes > begin + shared_.size() * sizeof(Vec4))
      fail("access outside of shared memory");
    if (bytes == 16) running->accesses.push_back(at - begin);
  }

  void wait(State state) {
    running->state = state;
    swapcontext(&running->context, &scheduler_);
  }
  void fail(const std::string& reason) {
    if (error_.empty()) error_ = reason;
    running->state = State::kDone;
    swapcontext(&running->context, &scheduler_);
  }

  char* shared() { return reinterpret_cast<char*>(shared_.data()); }

  bool early = false;  // the kernel is launched before the previous one has ended
  Thread* running = nullptr;
  int block[2] = {}, grid[2] = {};
  int64_t wavefronts = 0,
          ideal_wavefronts = 0;  // of 16-byte shared accesses: 4 a warp when free of conflicts
  int64_t mma_count = 0;

 private:
  static void enter() {
    Machine* m = current();
    (*m->kernel_)();
    m->running->state = State::kDone;
    swapcontext(&m->running->context, &m->scheduler_);
  }

  void run_block(int threads, const std::function<void()>& kernel) {
    kernel_ = &kernel;
    std::memset(shared_.data(), 0xFF, shared_.size() * sizeof(Vec4));
    threads_.resize(threads);
    for (int i = 0; i < threads; ++i) {
      Thread& t = threads_[i];
      if (!t.stack) t.stack = std::make_unique<char[]>(kStack);
      t.state = State::kReady, t.index = i, t.waited = false;
      t.open.clear(), t.groups.clear(), t.accesses.clear();
      getcontext(&t.context);
      t.context.uc_stack.ss_sp = t.stack.get();
      t.context.uc_stack.ss_size = kStack;
      t.context.uc_link = nullptr;
      makecontext(&t.context, &Machine::enter, 0);
    }
    while (error_.empty() && step(threads)) {
    }
    if (error_.empty()) count_wavefronts(threads);
  }

  // Resumes every ready thread once, then lets those go on whose warp or block is complete.
  bool step(int threads) {
    std::vector<int> order;
    for (int i = 0; i < threads; ++i) {
      if (threads_[i].state == State::kReady) order.push_back(i);
    }
    std::shuffle(order.begin(), order.end(), random_);
    for (int i : order) {
      running = &threads_[i];
      swapcontext(&scheduler_, &running->context);
      if (!error_.empty()) return false;
    }
    int waiting = 0, done = 0;
    for (int w = 0; w < threads; w += 32) multiply(w);
    for (int i = 0; i < threads; ++i) {
      waiting += threads_[i].state == State::kAtBarrier;
      done += threads_[i].state == State::kDone;
    }
    if (waiting == threads) {
      for (int i = 0; i < threads; ++i) threads_[i].state = State::kReady;
    } else if (done == threads) {
      return false;
    } else if (waiting + done == threads || order.empty()) {
      error_ = "threads wait for others that do not come";
    }
    return true;
  }

  // The product of a warp whose 32 lanes have arrived.
  void multiply(int first) {
    for (int i = 0; i < 32; ++i) {
      if (threads_[first + i].state != State::kAtMma) return;
    }
    std::array<float, 16 * 16> a{};
    std::array<float, 16 * 8> b{};
    const bool bf16 = threads_[first].mma.bf16;
    const auto value = [bf16](uint32_t word, int half) {
      const uint32_t bits = word >> (16 * half) & 0xFFFFu;
      return static_cast<float>(bf16 ? value_of(Bf16{}, bits) : value_of(Fp16{}, bits));
    };
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const Mma& mma = threads_[first + lane].mma;
      for (int e = 0; e < 2; ++e) {
        for (int r = 0; r < 4; ++r) a[(g + r % 2 * 8) * 16 + 2 * t + r / 2 * 8 + e] = value(mma.a[r], e);
        for (int r = 0; r < 2; ++r) b[(2 * t + r * 8 + e) * 8 + g] = value(mma.b[r], e);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int r = 0; r < 4; ++r) {
        const int row = g + r / 2 * 8, column = 2 * t + r % 2;
        double sum = threads_[first + lane].mma.d[r];
        for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row * 16 + k]) * b[k * 8 + column];
        threads_[first + lane].mma.d[r] = static_cast<float>(sum);
      }
      threads_[first + lane].state = State::kReady;
    }
    ++mma_count;
  }

  // The i-th access of all lanes is one instruction; a quarter-warp is a wavefront if no bank holds two addresses.
  void count_wavefronts(int threads) {
    for (int w = 0; w < threads; w += 32) {
      size_t common = threads_[w].accesses.size();
      for (int i = 1; i < 32; ++i) common = std::min(common, threads_[w + i].accesses.size());
      for (size_t n = 0; n < common; ++n) {
        for (int quarter = 0; quarter < 32; quarter += 8) {
          std::array<std::vector<int64_t>, 8> banks;  // groups of four
          size_t most = 1;
          for (int i = quarter; i < quarter + 8; ++i) {
            const int64_t at = threads_[w + i].accesses[n] / 16;
            auto& bank = banks[at % 8];
            if (std::find(bank.begin(), bank.end(), at) == bank.end()) bank.push_back(at);
            most = std::max(most, bank.size());
          }
          wavefronts += static_cast<int64_t>(most), ++ideal_wavefronts;
        }
      }
    }
  }

  std::vector<Range> arrays_;
  std::mt19937 random_;
  std::vector<Vec4> shared_;
  std::vector<Thread> threads_;
  ucontext_t scheduler_{};
  const std::function<void()>* kernel_ = nullptr;
  std::string error_;
};

inline Machine& machine() { return *Machine::current(); }

}  // namespace simt

inline int thread_index() { return simt::machine().running->index; }
inline int block_x() { return simt::machine().block[0]; }
inline int block_y() { return simt::machine().block[1]; }
inline int grid_x() { return simt::machine().grid[0]; }
inline int grid_y() { return simt::machine().grid[1]; }
inline void barrier() { simt::machine().wait(simt::State::kAtBarrier); }
inline void fence() {}
inline char* shared_memory() { return simt::machine().shared(); }

template <class V>
V load_global(const V* p) {
  simt::machine().check(p, sizeof(V));
  return *p;
}
inline Vec4 load_stream(const Vec4* p) { return load_global(p); }
inline void prefetch_l2(const Vec4* p) { simt::machine().check_extent(p, sizeof(Vec4)); }
inline void let_next_start() {}
inline void wait_for_previous() { simt::machine().running->waited = true; }
template <class V>
V load_coherent(const V* p) {
  return load_global(p);
}
template <class V>
void store_global(V* p, V value) {
  simt::machine().check(p, sizeof(V));
  *p = value;
}
inline int add_atomic(int* p, int value) {
  simt::machine().check(p, sizeof(int));
  return std::exchange(*p, *p + value);
}
template <class V>
V load_shared(const V* p) {
  simt::machine().check_shared(p, sizeof(V));
  return *p;
}
template <class V>
void store_shared(V* p, V value) {
  simt::machine().check_shared(p, sizeof(V));
  *p = value;
}

inline void copy_async(void* shared, const void* global, int bytes) {
  simt::Machine& m = simt::machine();
  m.check_shared(shared, 16);
  if (bytes < 0 || bytes > 16 || reinterpret_cast<uintptr_t>(global) % 16 != 0)
    m.fail("bad asynchronous copy");
  if (bytes > 0) m.check(global, static_cast<size_t>(bytes));
  std::memset(shared, 0xFF, 16);
  m.running->open.push_back({static_cast<char*>(shared), static_cast<const char*>(global), bytes});
}
inline void commit_copies() {
  simt::Thread& t = *simt::machine().running;
  t.groups.push_back(std::move(t.open));
  t.open.clear();
}
template <int kPending>
void wait_copies() {
  simt::Thread& t = *simt::machine().running;
  while (t.groups.size() > kPending) {
    for (const simt::Copy& c : t.groups.front()) {
      std::memset(c.to, 0, 16);
      std::memcpy(c.to, c.from, static_cast<size_t>(c.bytes));
    }
    t.groups.pop_front();
  }
}

template <class T>
void mma(T, float (&d)[4], const uint32_t* a, const uint32_t* b) {
  simt::Machine& m = simt::machine();
  m.running->mma = {d, a, b, T::kWindow == Bf16::kWindow};
  m.wait(simt::State::kAtMma);
}

}  // namespace lowbit::gpu
