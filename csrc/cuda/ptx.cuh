// One-instruction helpers. Every arithmetic one has a portable twin, so that whatever is built on them is tested on a
// CPU; those that touch memory or other lanes come from the device below or, without nvcc, from simt.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#define LOWBIT_HD __host__ __device__ __forceinline__
#define LOWBIT_DEVICE __device__ __forceinline__
#define LOWBIT_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define LOWBIT_PARAM const __grid_constant__
#define LOWBIT_UNROLL _Pragma("unroll")
#define LOWBIT_PRAGMA(text) _Pragma(#text)
#define LOWBIT_UNROLL_BY(count) LOWBIT_PRAGMA(unroll count)
#else
#define LOWBIT_HD inline
#define LOWBIT_DEVICE inline
#define LOWBIT_KERNEL(threads, blocks) void
#define LOWBIT_PARAM const
#define LOWBIT_UNROLL
#define LOWBIT_UNROLL_BY(count)
#endif

#include "float16.cuh"

namespace lowbit::gpu {

struct alignas(16) Vec4 {  // 16 bytes
  uint32_t x[4];
};

// Rotate right; `by` is a compile-time constant wherever it matters. In assembly, because the compiler would otherwise
// make one shift for the bits that do not wrap around and another for those that do.
LOWBIT_HD uint32_t rotate_right(uint32_t w, int by) {
#ifdef __CUDA_ARCH__
  if (by % 32 == 0) return w;
  uint32_t d;
  asm("shf.r.wrap.b32 %0, %1, %1, %2;" : "=r"(d) : "r"(w), "r"(by % 32));
  return d;
#else
  return by % 32 ? w >> (by % 32) | w << (32 - by % 32) : w;
#endif
}

// (w & mask) | bits in one instruction: left to the compiler, two immediate operands become two instructions.
LOWBIT_HD uint32_t and_or(uint32_t w, uint32_t mask, uint32_t bits) {
#ifdef __CUDA_ARCH__
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(w), "r"(mask), "r"(bits));
  return d;
#else
  return (w & mask) | bits;
#endif
}

// Byte i of the result is byte (selector nibble i) of b:a, a being the low word.
LOWBIT_HD uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
#ifdef __CUDA_ARCH__
  return __byte_perm(a, b, selector);
#else
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    out |= static_cast<uint32_t>(both >> (selector >> (4 * i) & 7u) * 8 & 0xFFu) << (8 * i);
  }
  return out;
#endif
}

LOWBIT_HD float as_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

// a * b + c on two packed 16-bit floats, rounded once.
template <class T>
LOWBIT_HD uint32_t fma2([[maybe_unused]] T type, uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDA_ARCH__
  uint32_t d;
  if constexpr (std::is_same_v<T, Fp16>) {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  } else {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  }
  return d;
#else
  return portable_fma2(type, a, b, c);
#endif
}

// Two floats to packed 16-bit floats, round to nearest even.
template <class T>
LOWBIT_HD uint32_t pack2([[maybe_unused]] T type, float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t d;
  if constexpr (std::is_same_v<T, Fp16>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  }
  return d;
#else
  return pack_portable(type, low, high);
#endif
}

LOWBIT_HD float widen(Fp16, uint16_t bits) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#else
  return half_to_float(bits);
#endif
}

LOWBIT_HD float widen(Bf16, uint16_t bits) { return as_float(static_cast<uint32_t>(bits) << 16); }

}  // namespace lowbit::gpu

#ifdef __CUDACC__
#include "device.cuh"
#else
#include "simt.h"
#endif
