// The CUDA kernels on a CPU, for tests: their own source over simt.h, behind a C interface for Python's ctypes.
#include <cstdio>
#include <string>

#include "dispatch.cuh"

namespace lowbit::gpu {
namespace {

thread_local std::string g_error;
int64_t g_counts[3];  // wavefronts, without bank conflicts, mma

template <class F>
const char* guarded(const F& f) {
  try {
    f();
    return nullptr;
  } catch (const std::exception& error) {
    g_error = error.what();
    return g_error.c_str();
  }
}

struct Array {
  const void* begin;
  int64_t bytes;
};

simt::Machine machine_of(const Array* arrays, int count, unsigned seed) {
  std::vector<simt::Range> ranges;
  for (int i = 0; i < count; ++i) {
    const char* begin = static_cast<const char*>(arrays[i].begin);
    ranges.push_back({begin, begin + arrays[i].bytes});
  }
  return {std::move(ranges), seed};
}

void keep_counts(const simt::Machine& m) {
  g_counts[0] = m.wavefronts, g_counts[1] = m.ideal_wavefronts, g_counts[2] = m.mma_count;
}

template <class T>
void run_linear(simt::Machine& machine, const Linear& call) {
  const Args p = args_of<T>(call);
  if (call.packed_x) {
    const PackArgs pack = pack_args(call);
    machine.launch(pack_blocks(pack), 1, kPackThreads, 0, [&] { pack_x_kernel<kPackThreads>(pack); });
    machine.early = true;
    const WgmmaArgs both = wgmma_args<T>(call);
    return with_wgmma_shape<T>(call, [&](auto shape) {
      using S = decltype(shape);
      machine.launch(gemm_blocks<S>(p), call.splits, S::kThreads, S::kSharedBytes,
                     [&] { qwgmma_kernel<S>(both); });
    });
  }
  machine.early = true;
  if (call.tile_m <= 16) {
    with_gemv_shape<T>(call, [&](auto shape) {
      using S = decltype(shape);
      machine.launch(gemv_blocks<S>(p), call.splits, S::kThreads, S::kSharedBytes,
                     [&] { qgemv_kernel<S>(p); });
    });
  } else {
    with_gemm_shape<T>(call, [&](auto shape) {
      using S = decltype(shape);
      machine.launch(gemm_blocks<S>(p), call.splits, S::kThreads, S::kSharedBytes,
                     [&] { qgemm_kernel<S>(p); });
    });
  }
}

template <class T>
void run_panel(simt::Machine& machine, const Weight& w, int first_row, int rows, void* out) {
  const PanelArgs p = panel_args<T>(w, first_row, rows, out);
  with_format(w, [&](auto bits, auto lookup) {
    machine.launch(ceil_div(p.units, kPanelThreads / 32), 1, kPanelThreads, 0,
                   [&] { panel_kernel<bits, lookup, T>(p); });
  });
}

template <class T>
void unpack(const Weight& w, const uint32_t* words, int half, uint32_t* out) {
  const Codebook book = codebook(T{}, w.bits, w.levels);
  with_format(w, [&](auto bits, auto lookup) { unpack_half<bits, lookup, T>(words, half, book, out); });
}

}  // namespace
}  // namespace lowbit::gpu

using namespace lowbit::gpu;

extern "C" {

void host_place(int bits, int64_t n, int64_t k, int64_t chunks, int64_t* word, int* bit) {
  const Place place = place_of(bits, n, k, chunks);
  *word = place.word, *bit = place.bit;
}

const char* host_unpack(const Weight* w, bool bf16, const uint32_t* words, int half, uint32_t* out) {
  return guarded([&] { bf16 ? unpack<Bf16>(*w, words, half, out) : unpack<Fp16>(*w, words, half, out); });
}

const char* host_linear(const Linear* call, const Array* arrays, int count, unsigned seed) {
  return guarded([&] {
    simt::Machine machine = machine_of(arrays, count, seed);
    call->bf16 ? run_linear<Bf16>(machine, *call) : run_linear<Fp16>(machine, *call);
    keep_counts(machine);
  });
}

const char* host_rows(const Weight* w, const void* ids, int64_t n, void* out, const Array* arrays,
                      int count) {
  return guarded([&] {
    simt::Machine machine = machine_of(arrays, count, 0);
    const RowsArgs p = rows_args(*w, ids, n, out);
    machine.launch(static_cast<int>(n), 1, kRowsThreads, 0, [&] { rows_kernel<kRowsThreads>(p); });
  });
}

const char* host_panel(const Weight* w, bool bf16, int first_row, int rows, void* out, const Array* arrays,
                       int count) {
  return guarded([&] {
    simt::Machine machine = machine_of(arrays, count, 0);
    bf16 ? run_panel<Bf16>(machine, *w, first_row, rows, out)
         : run_panel<Fp16>(machine, *w, first_row, rows, out);
  });
}

void host_counts(int64_t* out) { std::copy(g_counts, g_counts + 3, out); }

}  // extern "C"
