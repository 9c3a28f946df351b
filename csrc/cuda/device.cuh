// What kernels ask of the machine, on a GPU: memory, other lanes, barriers. simt.h has the same names for a CPU.
#pragma once

#include "ptx.cuh"

namespace lowbit::gpu {

LOWBIT_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
LOWBIT_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
LOWBIT_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
LOWBIT_DEVICE int grid_x() { return static_cast<int>(gridDim.x); }
LOWBIT_DEVICE int grid_y() { return static_cast<int>(gridDim.y); }
LOWBIT_DEVICE void barrier() { __syncthreads(); }
LOWBIT_DEVICE void fence() { __threadfence(); }

LOWBIT_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// Programmatic dependent launch (CUDA programming guide): from sm_90 on a kernel may start while the one before it in
// its stream still runs, once all blocks of that one have called let_next_start(). Until wait_for_previous() returns,
// nothing that it writes may be read, and nothing that it reads written; prefetching to L2 does neither.
LOWBIT_DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
LOWBIT_DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
LOWBIT_DEVICE void prefetch_l2(const Vec4* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// None of these takes the read-only path (ld.global.nc), whose loads ptxas moves before wait_for_previous().
// Weights: read once, so they should not push activations out of L1.
LOWBIT_DEVICE Vec4 load_stream(const Vec4* p) {
  Vec4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x[0]), "=r"(v.x[1]), "=r"(v.x[2]), "=r"(v.x[3])
               : "l"(p));
  return v;
}
template <class V>
LOWBIT_DEVICE V load_global(const V* p) {
  return *p;
}
LOWBIT_DEVICE Vec4 load_global(const Vec4* p) {
  const uint4 v = *reinterpret_cast<const uint4*>(p);
  return {v.x, v.y, v.z, v.w};
}

// Through L2: what other blocks of this launch wrote, or what this thread overwrites.
LOWBIT_DEVICE float load_coherent(const float* p) { return __ldcg(p); }
LOWBIT_DEVICE uint16_t load_coherent(const uint16_t* p) { return __ldcg(p); }

template <class V>
LOWBIT_DEVICE void store_global(V* p, V value) {
  *p = value;
}
LOWBIT_DEVICE void store_global(Vec4* p, Vec4 value) {
  *reinterpret_cast<uint4*>(p) = make_uint4(value.x[0], value.x[1], value.x[2], value.x[3]);
}

LOWBIT_DEVICE int add_atomic(int* p, int value) { return atomicAdd(p, value); }

LOWBIT_DEVICE Vec4 load_shared(const Vec4* p) {
  const uint4 v = *reinterpret_cast<const uint4*>(p);
  return {v.x, v.y, v.z, v.w};
}
template <class V>
LOWBIT_DEVICE V load_shared(const V* p) {
  return *p;
}
template <class V>
LOWBIT_DEVICE void store_shared(V* p, V value) {
  *p = value;
}

// 16 bytes from global to shared memory in the background; the last 16 - bytes are zeros.
LOWBIT_DEVICE void copy_async(void* shared, const void* global, int bytes) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
LOWBIT_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
LOWBIT_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// d[16, 8] += a[16, 16] b[16, 8], fp32 sums. Lane 4g + t holds a: rows g, g + 8 x columns 2t.., 2t + 8..; b: rows 2t..,
// 2t + 8.. of column g; d: rows g (0, 1), g + 8 (2, 3) x columns 2t, 2t + 1 (PTX ISA, mma.m16n8k16).
#define LOWBIT_MMA(type)                                                     \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
template <class T>
LOWBIT_DEVICE void mma(T, float (&d)[4], const uint32_t* a, const uint32_t* b) {
  if constexpr (std::is_same_v<T, Fp16>) {
    LOWBIT_MMA("f16");
  } else {
    LOWBIT_MMA("bf16");
  }
}
#undef LOWBIT_MMA

}  // namespace lowbit::gpu
