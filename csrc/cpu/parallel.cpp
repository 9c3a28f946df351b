#include "parallel.h"

#include <pthread.h>

#include <atomic>
#include <climits>
#include <fstream>
#include <string>

namespace lowbit {
namespace {

std::atomic<int> g_requested{0};
std::atomic<bool> g_forked{false};
std::atomic<bool> g_team_taken{false};

// At load, not at the first call: the parent may have used torch's threads only. A child of fork() has none
// of its parent's workers, and libgomp would wait for them for ever.
const int g_fork_handler = pthread_atfork(nullptr, nullptr, [] { g_forked = true; });

// CPUs that the cgroup lets this process use, rounded up; INT_MAX without a quota.
int cgroup_cpus() {
  double quota = -1, period = -1;
  std::string text;
  std::ifstream v2("/sys/fs/cgroup/cpu.max");
  if (v2 >> text >> period) {
    if (text != "max") quota = std::atof(text.c_str());
  } else {
    std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") >> quota;
    std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_period_us") >> period;
  }
  if (quota <= 0 || period <= 0) return INT_MAX;
  const int cpus = static_cast<int>((quota + period - 1) / period);
  return cpus < 1 ? 1 : cpus;
}

}  // namespace

int max_threads() {
  static const int limit = cgroup_cpus();
  if (g_forked) return 1;
  const int requested = g_requested;
  if (requested > 0) return requested;
  const int offered = omp_get_max_threads();
  return offered < limit ? offered : limit;
}

void set_max_threads(int count) { g_requested = count; }

TeamLease::TeamLease() : granted(!g_team_taken.exchange(true, std::memory_order_acquire)) {}

TeamLease::~TeamLease() {
  if (granted) g_team_taken.store(false, std::memory_order_release);
}

}  // namespace lowbit
