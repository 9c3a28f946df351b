// How every kernel is enqueued: dynamic shared memory allowed once, errors checked after each launch.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "dispatch.cuh"

namespace lowbit::gpu {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// One instance for every kernel: each device is told once that more than 48 KiB of shared memory are wanted.
template <auto* kKernel>
void allow_shared_memory(int bytes) {
  constexpr int kDevices = 64;
  static bool allowed[kDevices] = {};
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  if (device < kDevices && allowed[device]) return;
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "shared memory of a kernel");
  if (device < kDevices) allowed[device] = true;  // twice, by two threads, does no harm
}

template <auto* kKernel, class Arguments>
void launch(dim3 grid, int threads, int shared_bytes, void* stream, const Arguments& arguments,
            const char* what) {
  if (shared_bytes > 48 * 1024) allow_shared_memory<kKernel>(shared_bytes);
  kKernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments);
  check(cudaGetLastError(), what);
}

template <class T>
void launch_gemv(const Linear& call, void* stream) {
  const Args p = args_of<T>(call);
  with_gemv_shape<T>(call, [&](auto shape) {
    using S = decltype(shape);
    launch<&qgemv_kernel<S>>(dim3(gemv_blocks<S>(p), call.splits), S::kThreads, S::kSharedBytes, stream, p,
                             "qgemv");
  });
}

template <class T>
void launch_gemm(const Linear& call, void* stream) {
  const Args p = args_of<T>(call);
  with_gemm_shape<T>(call, [&](auto shape) {
    using S = decltype(shape);
    launch<&qgemm_kernel<S>>(dim3(gemm_blocks<S>(p), call.splits), S::kThreads, S::kSharedBytes, stream, p,
                             "qgemm");
  });
}

// One translation unit each, compiled side by side.
extern template void launch_gemv<Fp16>(const Linear&, void*);
extern template void launch_gemv<Bf16>(const Linear&, void*);
extern template void launch_gemm<Fp16>(const Linear&, void*);
extern template void launch_gemm<Bf16>(const Linear&, void*);

}  // namespace lowbit::gpu
