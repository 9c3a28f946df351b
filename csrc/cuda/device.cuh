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
  extern __shared__ __align__(1024) char memory[];
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

// Warp-group products (sm_90a): d[64, 128] += a[64, 16] b[16, 128] by 128 threads, fp32 sums, behind the program's back:
// neither d nor a may be touched, nor the shared memory of b overwritten, until wait_products has said so. Warp w has
// outputs 16 w .., lanes as in mma; column tile j of d is d[j]. b lies in shared memory in 128 rows of 64 inputs whose
// 16-byte units are exchanged, unit u of row r at u ^ (r % 8) ("128-byte swizzle"), from a multiple of 1,024 bytes on;
// `step` selects 16 of the 64 inputs (PTX ISA, wgmma.mma_async and matrix-descriptor).
LOWBIT_DEVICE uint64_t descriptor(const Vec4* b, int step) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(b)) + 32 * step;
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 / 16} << 32;
  return kSwizzle128 | kEightRows | uint64_t{1} << 16 | (address & 0x3FFFFu) >> 4;
}
#define LOWBIT_SUMS(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define LOWBIT_WGMMA(type)                                                                                \
  asm volatile(                                                                                           \
      "{.reg .pred p; setp.ne.b32 p, 1, 0; "                                                              \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                        \
      " {"                                                                                                \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                            \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                  \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                  \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "                 \
      "{%64, %65, %66, %67}, %68, p, 1, 1, 0;}"                                                           \
      : LOWBIT_SUMS(0), LOWBIT_SUMS(1), LOWBIT_SUMS(2), LOWBIT_SUMS(3), LOWBIT_SUMS(4), LOWBIT_SUMS(5),   \
        LOWBIT_SUMS(6), LOWBIT_SUMS(7), LOWBIT_SUMS(8), LOWBIT_SUMS(9), LOWBIT_SUMS(10), LOWBIT_SUMS(11), \
        LOWBIT_SUMS(12), LOWBIT_SUMS(13), LOWBIT_SUMS(14), LOWBIT_SUMS(15)                                \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor(b, step)))
template <class T>
LOWBIT_DEVICE void wgmma(T, float (&d)[16][4], const uint32_t* a, const Vec4* b, int step) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  if constexpr (std::is_same_v<T, Fp16>) {
    LOWBIT_WGMMA("f16");
  } else {
    LOWBIT_WGMMA("bf16");
  }
#else
  __trap();  // the host launches this on sm_90a only
#endif
}
#undef LOWBIT_WGMMA
#undef LOWBIT_SUMS

// Before the first product, and after registers of one were written.
LOWBIT_DEVICE void begin_products() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
LOWBIT_DEVICE void commit_products() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int kPending>
LOWBIT_DEVICE void wait_products() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}
// What this thread has written to shared memory is seen by warp-group products after the next barrier.
LOWBIT_DEVICE void publish_shared() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

}  // namespace lowbit::gpu
