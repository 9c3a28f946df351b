#include "api.h"

#include "launch.cuh"

namespace lowbit::gpu {

void linear(const Linear& call, Queue queue) {
  if (call.packed_x != nullptr) {
    call.bf16 ? launch_wgmma<Bf16>(call, queue) : launch_wgmma<Fp16>(call, queue);
  } else if (call.tile_m <= 16) {
    call.bf16 ? launch_gemv<Bf16>(call, queue) : launch_gemv<Fp16>(call, queue);
  } else {
    call.bf16 ? launch_gemm<Bf16>(call, queue) : launch_gemm<Fp16>(call, queue);
  }
}

void rows(const Weight& w, const void* ids, int64_t count, void* out, Queue queue) {
  const RowsArgs p = rows_args(w, ids, count, out);
  launch<&rows_kernel<kRowsThreads>>(dim3(static_cast<unsigned>(count)), kRowsThreads, 0, queue, p, false,
                                     "rows");
}

template <class T>
void launch_panel(const Weight& w, int first_row, int count, void* out, Queue queue) {
  const PanelArgs p = panel_args<T>(w, first_row, count, out);
  with_format(w, [&](auto bits, auto lookup) {
    constexpr int kBits = decltype(bits)::value;
    constexpr bool kLookup = decltype(lookup)::value;
    launch<&panel_kernel<kBits, kLookup, T>>(dim3(ceil_div(p.units, kPanelThreads / 32)), kPanelThreads, 0,
                                             queue, p, false, "panel");
  });
}

void panel(const Weight& w, bool bf16, int first_row, int count, void* out, Queue queue) {
  bf16 ? launch_panel<Bf16>(w, first_row, count, out, queue)
       : launch_panel<Fp16>(w, first_row, count, out, queue);
}

bool built_for_wgmma() {
#ifdef LOWBIT_BUILT_FOR_WGMMA
  return true;
#else
  return false;
#endif
}

bool has_wgmma(int device) {
  if (!built_for_wgmma()) return false;
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "compute capability");
  return major == 9 && minor == 0;
}

uint64_t recording(Queue queue) {
  const DeviceGuard guard(queue.device);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  check(cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(queue.stream), &status, &id),
        "cudaStreamGetCaptureInfo");
  return status == cudaStreamCaptureStatusNone ? 0 : id;
}

}  // namespace lowbit::gpu
