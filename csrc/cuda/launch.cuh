// How every kernel is enqueued: on its tensors' device, dynamic shared memory allowed once, errors checked after each
// launch.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <string>

#include "dispatch.cuh"

namespace lowbit::gpu {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Makes a device the current one of this thread, and the former one again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device == before_) return;
    check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// What a device must know of a kernel, told once: how much shared memory it wants. True if the kernel waits for the one
// before it by itself, as it does where it was compiled for sm_90 or later.
template <auto* kKernel>
bool prepare(int device, int shared_bytes) {
  enum : int { kUnknown, kWaits, kDoesNot };
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices] = {};
  if (device < kDevices) {
    if (const int state = known[device].load(std::memory_order_acquire)) return state == kWaits;
  }
  const void* kernel = reinterpret_cast<const void*>(kKernel);
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
          "shared memory of a kernel");
  }
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), "attributes of a kernel");
  const bool waits = attributes.ptxVersion >= 90;
  if (device < kDevices) known[device].store(waits ? kWaits : kDoesNot, std::memory_order_release);
  return waits;
}

// `early`: the kernel may start before the previous one in the stream has ended, if it knows how to wait.
template <auto* kKernel, class Arguments>
void launch(dim3 grid, int threads, int shared_bytes, Queue queue, const Arguments& arguments, bool early,
            const char* what) {
  const DeviceGuard guard(queue.device);
  const bool waits = prepare<kKernel>(queue.device, shared_bytes);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(queue.stream);
  config.attrs = &attribute, config.numAttrs = early && waits ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kKernel, arguments), what);
}

// The least that a block may have on GPUs of sm_80 and later, and what it may have on sm_90.
constexpr int kSharedBytesAnywhere = 99 * 1024, kSharedBytesHopper = 227 * 1024;

template <auto* kKernel, class S, int kMost = kSharedBytesAnywhere, class Arguments>
void launch_product(int blocks, const Linear& call, const Arguments& p, Queue queue, const char* what) {
  static_assert(S::kSharedBytes <= kMost && S::kThreads <= 1024);
  launch<kKernel>(dim3(blocks, call.splits), S::kThreads, S::kSharedBytes, queue, p, call.early, what);
}

template <class T>
void launch_gemv(const Linear& call, Queue queue) {
  with_gemv_shape<T>(call, [&](auto shape) {
    using S = decltype(shape);
    const Args p = args_of<T>(call);
    launch_product<&qgemv_kernel<S>, S>(gemv_blocks<S>(p), call, p, queue, "qgemv");
  });
}

template <class T>
void launch_gemm(const Linear& call, Queue queue) {
  with_gemm_shape<T>(call, [&](auto shape) {
    using S = decltype(shape);
    const Args p = args_of<T>(call);
    launch_product<&qgemm_kernel<S>, S>(gemm_blocks<S>(p), call, p, queue, "qgemm");
  });
}

template <class T>
void launch_wgmma(const Linear& call, Queue queue) {
  const PackArgs pack = pack_args(call);
  launch<&pack_x_kernel<kPackThreads>>(dim3(pack_blocks(pack)), kPackThreads, 0, queue, pack, false,
                                       "pack_x");
  with_wgmma_shape<T>(call, [&](auto shape) {
    using S = decltype(shape);
    const WgmmaArgs p = wgmma_args<T>(call);
    launch_product<&qwgmma_kernel<S>, S, kSharedBytesHopper>(gemm_blocks<S>(p.product), call, p, queue,
                                                             "qwgmma");
  });
}

// One translation unit each, compiled side by side.
extern template void launch_gemv<Fp16>(const Linear&, Queue);
extern template void launch_gemv<Bf16>(const Linear&, Queue);
extern template void launch_gemm<Fp16>(const Linear&, Queue);
extern template void launch_gemm<Bf16>(const Linear&, Queue);
extern template void launch_wgmma<Fp16>(const Linear&, Queue);
extern template void launch_wgmma<Bf16>(const Linear&, Queue);

}  // namespace lowbit::gpu
