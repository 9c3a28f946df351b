// The only file that knows OpenMP.
//
// One pool for the process. torch brings its own libgomp; a second OpenMP runtime would keep a second set of
// workers spinning against the first. We link libgomp by its soname (libgomp.so.1) and lowbit/ops.py imports
// torch first: whether torch's copy has that soname or is found through torch's global symbol scope, the
// dynamic linker then binds GOMP_parallel to the copy that torch runs on, so both libraries share the same
// workers. For the same reason a team has, by default, the size torch uses (omp_get_max_threads() of the
// calling thread, which torch sets to the physical cores): libgomp rebuilds its team whenever the size
// changes.
#pragma once

#include <omp.h>

#include <atomic>
#include <cstdint>
#include <thread>

namespace lowbit {

// Threads a parallel region may use: set_threads(), else what OpenMP offers this thread, at most what the
// cgroup quota allows. 1 in a forked child, where libgomp's workers do not exist.
int max_threads();

// 0 restores the default.
void set_max_threads(int count);

// The right to wake the workers. Every calling thread has workers of its own in libgomp, so several callers at
// once would oversubscribe the cores and spin against each other: the first gets its team, the others work
// alone.
class TeamLease {
 public:
  TeamLease();
  ~TeamLease();
  TeamLease(const TeamLease&) = delete;
  TeamLease& operator=(const TeamLease&) = delete;
  const bool granted;
};

// Where a team waits for its last member. libgomp's own barrier ends with a system call every time, which costs more
// than most phases of a forward over one token.
class Barrier {
 public:
  void wait(int members) {
    const uint32_t round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == members) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins < kSpins) {
        relax();
      } else {
        std::this_thread::yield();  // more threads than cores: the last member may need this one
      }
    }
  }

 private:
  static constexpr int kSpins = 1000;

  static void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }

  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
};

// The member of a team that runs the same function on every thread.
struct Team {
  int rank, size;
  Barrier* meeting = nullptr;  // of a team of several

  void barrier() const {
    if (size > 1) meeting->wait(size);
  }
};

// f(Team) on at most `threads` threads, the caller being rank 0. f must not throw, nor call parallel().
template <class F>
void parallel(int threads, const F& f) {
  if (threads <= 1) {
    f(Team{0, 1});
    return;
  }
  const TeamLease lease;
  if (!lease.granted) {
    f(Team{0, 1});
    return;
  }
  Barrier meeting;
#pragma omp parallel num_threads(threads)
  {
    f(Team{omp_get_thread_num(), omp_get_num_threads(), &meeting});
  }
}

}  // namespace lowbit
