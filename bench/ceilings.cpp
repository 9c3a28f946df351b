// What this machine can do at most, for the percentages of the benchmark report: one JSON object on stdout.
//
//   ceilings SECONDS THREADS      seconds a figure; compile with -O3 -march=native -fopenmp
//
// "read": bytes a second that THREADS cores read together, by working set (bytes of all cores together, cut into
// one contiguous part a core), by the fastest way known here; "one_stream": the same by one stream a core. "peak":
// operations a second, a multiply-add counting two, of each instruction that kernels here live on, on registers or
// tiles only. Every figure is the best of several runs: a ceiling.
//
// As a shared library (-shared -fPIC): read_memory(), to be timed in turn with what reads weights, because the bandwidth
// of a shared host may change within a run.
#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;
typedef int64_t Vector __attribute__((vector_size(64), may_alias));

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// `work(rank)` on all threads, again and again for `seconds`: the shortest time of one run.
template <class F>
double best(double seconds, int threads, int repeats, const F& work) {
  double shortest = 1e30;
#pragma omp parallel num_threads(threads)
  {
    const int rank = omp_get_thread_num();
    work(rank);
#pragma omp barrier
    const auto begin = Clock::now();
    bool more = true;
    while (more) {
#pragma omp barrier
      const auto start = Clock::now();
      for (int i = 0; i < repeats; ++i) work(rank);
#pragma omp barrier
#pragma omp single copyprivate(more)
      {
        shortest = std::min(shortest, since(start) / repeats);
        more = since(begin) < seconds;
      }
    }
  }
  return shortest;
}

// kAhead: bytes that software prefetch runs ahead, 0 for none.
template <int kAhead>
void read(const char* from, int64_t bytes) {
  Vector sum[8] = {};
  for (const char *p = from, *end = from + bytes; p < end; p += 512) {
    for (int i = 0; i < 8; ++i) {
      if (kAhead) __builtin_prefetch(p + 64 * i + kAhead);
      sum[i] ^= *reinterpret_cast<const Vector*>(p + 64 * i);
    }
  }
  for (int i = 0; i < 8; ++i) asm volatile("" : : "x"(sum[i][0]));
}

// Four streams side by side, asked for twice: into L2, which holds no fill buffer of L1 while memory answers, then into
// L1. From DRAM the fastest way known here.
void read_streams(const char* from, int64_t bytes) {
  constexpr int kStreams = 4;
  constexpr int64_t kRun = 1 << 16;
  Vector sum[kStreams] = {};
  for (int64_t group = 0; group < bytes; group += kStreams * kRun) {
    const int64_t run = std::min(kRun, (bytes - group) / kStreams);
    for (int64_t at = 0; at < run; at += 64) {
      for (int i = 0; i < kStreams; ++i) {
        const char* p = from + group + i * run + at;
        __builtin_prefetch(p + 3072 + (at + 3072 < run ? 0 : (kStreams - 1) * run), 0, 2);
        __builtin_prefetch(p + 2048 + (at + 2048 < run ? 0 : (kStreams - 1) * run));
        sum[i] ^= *reinterpret_cast<const Vector*>(p);
      }
    }
  }
  for (int i = 0; i < kStreams; ++i) asm volatile("" : : "x"(sum[i][0]));
}

constexpr decltype(&read_streams) kWays[] = {read<0>, read<4096>, read_streams};
constexpr int kOneStream = 2;  // ways in which a core reads one stream: the first ones

// On huge pages; nullptr where there is not so much memory.
char* written_memory(int64_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  madvise(memory, bytes, MADV_HUGEPAGE);
  return static_cast<char*>(std::memset(memory, 1, bytes));
}

int64_t share_of(int64_t bytes, int threads) { return bytes / threads / 512 * 512; }

void reads(double seconds, int threads) {
  const int64_t smallest = 1 << 15, largest = int64_t{1} << 30;
  char* data = written_memory(largest);
  if (data == nullptr) std::exit(1);
  std::vector<double> one, all;
  for (int64_t set = smallest; set <= largest; set *= 2) {
    const int64_t share = share_of(set, threads);
    const int repeats = static_cast<int>(std::max<int64_t>(1, (4 << 20) / set));
    double by_one = 1e30, by_any = 1e30;
    for (const auto& way : kWays) {
      const double time = best(seconds / 3, threads, repeats, [&](int rank) { way(data + rank * share, share); });
      by_any = std::min(by_any, time);
      if (&way < kWays + kOneStream) by_one = std::min(by_one, time);
    }
    one.push_back(share * threads / by_one);
    all.push_back(share * threads / by_any);
  }
  const auto print = [&](const char* name, const std::vector<double>& rates) {
    std::printf("\"%s\": {", name);
    for (size_t i = 0; i < rates.size(); ++i) {
      std::printf("%s\"%lld\": %.4g", i == 0 ? "" : ", ", static_cast<long long>(smallest << i), rates[i]);
    }
    std::printf("}");
  };
  print("read", all);
  std::printf(", ");
  print("one_stream", one);
  munmap(data, largest);
}

constexpr int kRuns = 20000;  // rounds of independent instructions a measurement

template <class F>
void peak(const char* name, double operations, double seconds, int threads, const F& round) {
  const double time = best(seconds, threads, 1, [&](int) { round(); });
  std::printf(", \"%s\": %.4g", name, operations * kRuns * threads / time);
}

#if defined(__AVX512VNNI__)
void vnni() {
  __m512i acc[16] = {};
  const __m512i a = _mm512_set1_epi32(1), b = _mm512_set1_epi32(2);
  for (int i = 0; i < kRuns; ++i) {
    for (int j = 0; j < 16; ++j) asm volatile("vpdpbusd %2, %1, %0" : "+v"(acc[j]) : "v"(a), "v"(b));
  }
}
#endif
#if defined(__AVX2__)
void avx2() {  // one VPMADDUBSW, VPMADDWD and VPADDD for 32 multiply-adds
  __m256i acc[8] = {};
  const __m256i a = _mm256_set1_epi8(1), b = _mm256_set1_epi8(2), one = _mm256_set1_epi16(1);
  for (int i = 0; i < kRuns; ++i) {
    for (int j = 0; j < 8; ++j) {
      __m256i t;
      asm volatile("vpmaddubsw %3, %2, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"
                   : "+x"(acc[j]), "=&x"(t)
                   : "x"(a), "x"(b), "x"(one));
    }
  }
}
#endif
#if defined(__AVX512F__)
void fp32() {
  __m512 acc[16] = {};
  const __m512 a = _mm512_set1_ps(1), b = _mm512_set1_ps(2);
  for (int i = 0; i < kRuns; ++i) {
    for (int j = 0; j < 16; ++j) asm volatile("vfmadd231ps %2, %1, %0" : "+v"(acc[j]) : "v"(a), "v"(b));
  }
}
#endif
#if defined(__AMX_INT8__)
bool tiles_allowed() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

void amx() {
  struct alignas(64) Config {
    uint8_t palette = 1, rest[15] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  asm volatile("ldtilecfg %0" : : "m"(config));
  for (int i = 0; i < kRuns; ++i) {
    asm volatile(
        "tdpbssd %tmm7, %tmm6, %tmm0\n\ttdpbssd %tmm7, %tmm6, %tmm1\n\t"
        "tdpbssd %tmm7, %tmm6, %tmm2\n\ttdpbssd %tmm7, %tmm6, %tmm3");
  }
  asm volatile("tilerelease");
}
#endif
#if defined(__ARM_FEATURE_DOTPROD)
void sdot() {
  int32x4_t acc[16] = {};
  const int8x16_t a = vdupq_n_s8(1), b = vdupq_n_s8(2);
  for (int i = 0; i < kRuns; ++i) {
    for (int j = 0; j < 16; ++j) asm volatile("sdot %0.4s, %1.16b, %2.16b" : "+w"(acc[j]) : "w"(a), "w"(b));
  }
}
#endif

}  // namespace

extern "C" {

int read_ways() { return sizeof kWays / sizeof kWays[0]; }

int read_ways_of_one_stream() { return kOneStream; }

char* read_buffer(int64_t bytes) { return written_memory(bytes); }

// Reads a part on every thread.
void read_memory(const char* data, int64_t bytes, int threads, int way) {
  const int64_t share = share_of(bytes, threads);
#pragma omp parallel num_threads(threads)
  kWays[way](data + omp_get_thread_num() * share, share);
}

}  // extern "C"

int main(int argc, char** argv) {
  if (argc != 3) return std::fprintf(stderr, "usage: ceilings SECONDS THREADS\n"), 2;
  const double seconds = std::atof(argv[1]);
  const int threads = std::atoi(argv[2]);
  std::printf("{");
  reads(seconds, threads);
  std::printf(", \"peak\": {\"threads\": %d", threads);
#if defined(__AVX512VNNI__)
  peak("vnni", 16 * 128, seconds, threads, vnni);
#endif
#if defined(__AVX2__)
  peak("avx2", 8 * 64, seconds, threads, avx2);
#endif
#if defined(__AVX512F__)
  peak("fp32", 16 * 32, seconds, threads, fp32);
#endif
#if defined(__AMX_INT8__)
  if (tiles_allowed()) peak("amx", 4 * 2 * 16 * 16 * 64, seconds, threads, amx);
#endif
#if defined(__ARM_FEATURE_DOTPROD)
  peak("neon", 16 * 32, seconds, threads, sdot);
#endif
  std::printf("}}\n");
  return 0;
}
