// The machine of simt.h: runs a kernel's blocks one after the other, its threads as fibers.
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

enum class State { kReady, kAtBarrier, kAtMma, kAtProducts, kDone };

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

struct Product {  // of a warp group
  float (*d)[4];
  const uint32_t* a;
  const char* b;
  int step;
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
  std::vector<Product> begun;            // not committed
  std::deque<std::vector<Product>> products;
  size_t pending = 0;             // groups of products that may stay open
  std::vector<int64_t> accesses;  // 16-byte shared accesses, byte offsets
};

struct Range {
  const char *begin, *end;
};

constexpr size_t kStack = 64 * 1024, kAlignment = 1024;  // of shared memory

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
    shared_bytes_ = (shared_bytes / 16 + 1) * 16;
    shared_.assign(shared_bytes_ / 16 + kAlignment / 16, Vec4{});
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
    if (at < begin || at + bytes > begin + shared_bytes_) fail("access outside of shared memory");
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

  char* shared() {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(shared_.data());
    return reinterpret_cast<char*>((begin + kAlignment - 1) / kAlignment * kAlignment);
  }

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
      t.open.clear(), t.groups.clear(), t.accesses.clear(), t.begun.clear(), t.products.clear();
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
    for (int g = 0; g + 128 <= threads; g += 128) finish_products(g);
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

  // Products of a warp group whose 128 threads wait for them: they read registers and shared memory now, no earlier.
  void finish_products(int first) {
    for (int i = 0; i < 128; ++i) {
      if (threads_[first + i].state != State::kAtProducts) return;
    }
    while (threads_[first].products.size() > threads_[first].pending) {
      for (size_t n = 0; n < threads_[first].products.front().size(); ++n) product(first, n);
      for (int i = 0; i < 128; ++i) threads_[first + i].products.pop_front();
    }
    for (int i = 0; i < 128; ++i) threads_[first + i].state = State::kReady;
  }

  // The n-th product of a warp group's oldest open group.
  void product(int first, size_t n) {
    const Product& head = threads_[first].products.front()[n];
    if ((head.b - shared()) % 1024 != 0) error_ = "a product's operand is not aligned to 1,024 bytes";
    const auto value = [&head](uint32_t bits) {
      return static_cast<float>(head.bf16 ? value_of(Bf16{}, bits) : value_of(Fp16{}, bits));
    };
    std::array<float, 16 * 128> b{};  // [input][row of x]
    for (int row = 0; row < 128; ++row) {
      for (int k = 0; k < 16; ++k) {
        const int at = row * 128 + 32 * head.step + 2 * k;
        uint16_t bits;
        std::memcpy(&bits, head.b + (at ^ (at >> 7 & 7) << 4), 2);
        b[k * 128 + row] = value(bits);
      }
    }
    for (int i = 0; i < 128; ++i) {
      const int warp = first + i / 32 * 32, g = i % 32 / 4, t = i % 4;
      float (*d)[4] = threads_[first + i].products.front()[n].d;
      for (int r = 0; r < 2; ++r) {  // outputs g and g + 8
        float a[16];
        for (int k = 0; k < 16; ++k) {
          const Product& from = threads_[warp + g * 4 + k % 8 / 2].products.front()[n];
          a[k] = value(from.a[r + k / 8 * 2] >> (k % 2 * 16) & 0xFFFFu);
        }
        for (int column = 0; column < 32; ++column) {  // this lane's: 8 j + 2 t + e
          const int row = column / 2 * 8 + 2 * t + column % 2;
          double sum = d[column / 2][2 * r + column % 2];
          for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[k]) * b[k * 128 + row];
          d[column / 2][2 * r + column % 2] = static_cast<float>(sum);
        }
      }
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
  size_t shared_bytes_ = 0;
  std::vector<Thread> threads_;
  ucontext_t scheduler_{};
  const std::function<void()>* kernel_ = nullptr;
  std::string error_;
};

inline Machine& machine() { return *Machine::current(); }

}  // namespace simt
}  // namespace lowbit::gpu
