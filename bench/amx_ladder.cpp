// Where the cycles of the tile kernel go: one core, from bare products to the whole kernel, one cost at a time.
//
//   cmake -S . -B build/ladder -DLOWBIT_PYTHON=OFF -DLOWBIT_SELFTEST=ON
//   cmake --build build/ladder --target lowbit_amx_ladder
//   build/ladder/lowbit_amx_ladder > docs/results/amx-ladder.json
//
// A step is four tile products, 32 rows x 32 outputs x 64 inputs, 131072 operations; the unit of TDPBSSD takes 16
// cycles a product, 64 a step. Every figure is the shortest of many runs. Cycles are those of the core at the moment,
// counted by a chain of multiplications (3 cycles each).
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../csrc/cpu/amx-inl.h"
#include "../csrc/cpu/dispatch.h"
#include "../csrc/cpu/isa.h"
#include "../csrc/prepack.h"

namespace lowbit {
namespace {

using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

template <class F>
double shortest(const F& work) {
  double best = 1e30;
  for (const auto begin = Clock::now(); since(begin) < 0.15;) {
    const auto start = Clock::now();
    work();
    best = since(start) < best ? since(start) : best;
  }
  return best;
}

double cycles_a_second() {
  const double seconds = shortest([] {
    long x = 3;
    for (int i = 0; i < 10000; ++i) __asm__ volatile("imul %0, %0\n imul %0, %0\n imul %0, %0" : "+r"(x));
  });
  return 90000 / seconds;
}

void report(const char* name, double steps, double seconds, bool last = false) {
  std::printf("  {\"step\": \"%s\", \"cycles\": %.1f, \"tops\": %.2f}%s\n", name,
              seconds * cycles_a_second() / steps, steps * 131072 / seconds / 1e12, last ? "" : ",");
}

uint8_t* memory(int64_t bytes) {
  auto* p =
      static_cast<uint8_t*>(std::aligned_alloc(4096, static_cast<size_t>(ceil_div(bytes, 4096) * 4096)));
  if (p == nullptr) std::abort();
  std::memset(p, 0, static_cast<size_t>(bytes));
  return p;
}

uint8_t* noise(int64_t bytes) {  // operands: products of zeros take less power, so the clock is faster
  auto* p = memory(bytes);
  uint32_t state = 1;
  for (int64_t i = 0; i < bytes; ++i) {
    state = state * 1664525u + 1013904223u;
    p[i] = static_cast<uint8_t>(state >> 24);
  }
  return p;
}

LOWBIT_INLINE void products() {
  tile_dot<0, 4, 6>();
  tile_dot<1, 4, 7>();
  tile_dot<2, 5, 6>();
  tile_dot<3, 5, 7>();
}

LOWBIT_INLINE void vector_work() {  // 64 instructions; the compiler, told of no AVX-512, uses none of these
  for (int i = 0; i < 8; ++i) {
    __asm__ volatile(
        "vpaddd %%zmm16, %%zmm16, %%zmm16\n vpaddd %%zmm17, %%zmm17, %%zmm17\n"
        "vpaddd %%zmm18, %%zmm18, %%zmm18\n vpaddd %%zmm19, %%zmm19, %%zmm19\n"
        "vpaddd %%zmm20, %%zmm20, %%zmm20\n vpaddd %%zmm21, %%zmm21, %%zmm21\n"
        "vpaddd %%zmm22, %%zmm22, %%zmm22\n vpaddd %%zmm23, %%zmm23, %%zmm23\n" ::);
  }
}

constexpr int64_t kGroups = 16, kTiles = 64,
                  kChunk = 8;  // 256 rows x 4096 inputs: 1 MiB of A; a chunk of B is 16 KiB

enum class Store { kNone, kTogether, kBetween };

// All steps of the kernel's loops over A (a_tiles, a power of two) and one chunk of B. kStream: A past L1. kStore:
// fresh accumulators for every chunk; the old ones are stored together, or one by one between the next products.
template <bool kStream, Store kStore, bool kVector>
void sweep(const uint8_t* a, const uint8_t* b, uint8_t* c, int64_t a_tiles) {
  for (int64_t chunk = 0; chunk < kTiles; chunk += kChunk) {
    for (int64_t group = 0; group < kGroups; group += 2) {
      if (kStore == Store::kTogether) {
        tile_store<0>(c), tile_store<1>(c + kTileBytes);
        tile_store<2>(c + 2 * kTileBytes), tile_store<3>(c + 3 * kTileBytes);
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
      }
      for (int64_t t = chunk; t < chunk + kChunk; ++t) {
        const bool renew = kStore == Store::kBetween && t == chunk;
        const uint8_t* a0 = a + ((group * kTiles + t) & (a_tiles - 1)) * kTileBytes;
        const uint8_t* a1 = a + (((group + 1) * kTiles + t + a_tiles / 2) & (a_tiles - 1)) * kTileBytes;
        const uint8_t *b0 = b + t % kChunk * kTileBytes, *b1 = b0 + kChunk * kTileBytes;
        kStream ? tile_stream<4>(a0) : tile_load<4>(a0);
        tile_load<6>(b0);
        if (renew) tile_store<0>(c), tile_zero<0>();
        tile_dot<0, 4, 6>();
        tile_load<7>(b1);
        if (renew) tile_store<1>(c + kTileBytes), tile_zero<1>();
        tile_dot<1, 4, 7>();
        kStream ? tile_stream<5>(a1) : tile_load<5>(a1);
        if (renew) tile_store<2>(c + 2 * kTileBytes), tile_zero<2>();
        tile_dot<2, 5, 6>();
        if (renew) tile_store<3>(c + 3 * kTileBytes), tile_zero<3>();
        tile_dot<3, 5, 7>();
        if (kVector) vector_work();
      }
    }
  }
}

// The kernel of the library on activations that are quantized already, everything hot.
void kernel(const char* name, int bits, int64_t m, int64_t n, int64_t k, int64_t group, bool last = false) {
  Job job;
  alignas(64) static int8_t levels[16] = {-15, -13, -11, -9, -7, -5, -3, -1, 1, 3, 5, 7, 9, 11, 13, 15};
  const int64_t blocks = ceil_div(n, kTileN), tiles = ceil_div(k, kTileK), span = span_of(k, group);
  const int64_t spans = ceil_div(k, span);
  auto* packed = noise(blocks * tiles * tile_bytes(bits));
  auto* scales = memory(blocks * spans * kTileN * 2);
  auto *y = memory(m * n * 4), *q = noise(m * tiles * kTileK), *sx = memory(m * spans * 4),
       *sum = memory(m * spans * 4);
  job.w = Matrix{packed, reinterpret_cast<uint16_t*>(scales), levels, n, k, span, bits, false, 1, 0};
  job.m = m;
  job.y = reinterpret_cast<float*>(y);
  job.y_stride = n;
  job.act.q = reinterpret_cast<int8_t*>(q);
  job.act.scale = reinterpret_cast<float*>(sx);
  job.act.sum = reinterpret_cast<int32_t*>(sum);
  job.act.row_stride = kTileK;
  job.act.tile_stride = 16 * kTileK;
  job.act.group_stride = 16 * tiles * kTileK;
  for (int64_t i = 0; i < blocks * spans * kTileN; ++i)
    reinterpret_cast<uint16_t*>(scales)[i] = 0x3C00;  // 1.0
  for (int64_t i = 0; i < m * spans; ++i) job.act.scale[i] = 0.01f;
  const Panel& panel = kernels(Isa::kAmx, bits).large;
  auto* scratch = memory(panel.scratch_bytes(job));
  const double seconds = shortest([&] { panel.affine(job, {0, blocks}, {0, m}, scratch); });
  report(name, static_cast<double>(m / 32 * (n / 32) * tiles), seconds, last);
  for (auto* p : {packed, scales, y, q, sx, sum, scratch}) std::free(p);
}

void ladder() {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = 64;
    config.rows[i] = kTileRows;
  }
  load_config(config);
  auto *a = noise(kGroups * kTiles * kTileBytes), *b = noise(2 * kChunk * kTileBytes),
       *c = memory(4 * kTileBytes);
  const double steps = static_cast<double>(kGroups / 2 * kTiles);
  const int64_t in_l1 = 8, in_l2 = kGroups * kTiles;
  const auto time = [&](const char* name, auto loop, int64_t a_tiles) {
    report(name, steps, shortest([&] { loop(a, b, c, a_tiles); }));
  };
  tile_load<4>(a), tile_load<5>(a + kTileBytes), tile_load<6>(b), tile_load<7>(b + kTileBytes);
  std::printf("[\n");
  report("products alone", steps, shortest([&] {
           for (int i = 0; i < kGroups / 2 * kTiles; ++i) products();
         }));
  time("+ four tile loads from L1", sweep<false, Store::kNone, false>, in_l1);
  time("A (1 MiB) from L2", sweep<false, Store::kNone, false>, in_l2);
  time("A from L2, past L1", sweep<true, Store::kNone, false>, in_l2);
  time("+ accumulators stored and zeroed every 8 steps", sweep<true, Store::kTogether, false>, in_l2);
  time("the same, between the next products", sweep<true, Store::kBetween, false>, in_l2);
  time("+ 64 vector instructions a step", sweep<true, Store::kBetween, true>, in_l2);
  release_tiles();
  for (auto* p : {a, b, c}) std::free(p);
  kernel("kernel, 1 bit, 256 x 1024 x 4096", 1, 256, 1024, 4096, 4096);
  kernel("kernel, 4 bits, 256 x 1024 x 4096", 4, 256, 1024, 4096, 4096);
  kernel("kernel, 8 bits, 256 x 1024 x 4096", 8, 256, 1024, 4096, 4096);
  kernel("kernel, 4 bits, 256 x 1024 x 512", 4, 256, 1024, 512, 512);
  kernel("kernel, 4 bits, 32 x 1024 x 2048", 4, 32, 1024, 2048, 2048);
  kernel("kernel, 4 bits, group 128, 256 x 1024 x 512", 4, 256, 1024, 512, 128, true);
  std::printf("]\n");
}

}  // namespace
}  // namespace lowbit

int main() {
  if (!lowbit::isa_available(lowbit::Isa::kAmx)) {
    std::fprintf(stderr, "this machine has no AMX\n");
    return 1;
  }
  lowbit::ladder();
}
