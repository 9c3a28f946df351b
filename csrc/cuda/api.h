// What the Python module asks of the GPU, in plain C++: addresses, sizes, a stream. Everything was checked before.
#pragma once

#include <cstdint>

namespace lowbit::gpu {

// W [n, k] in the layout of layout.cuh, on the device.
struct Weight {
  const void *codes, *scales;
  int8_t levels[16];  // 2^bits of them; unused at 8 bits
  int n, k, bits, group;
  bool lookup;  // levels are not affine in the code, or not exactly so in 16-bit floats
};

// y = residual + activation(x W^T + bias); see Args in epilogue.cuh.
struct Linear {
  Weight w;
  const void *x, *bias, *residual;
  void *y, *partial, *arrived;
  int64_t x_stride, y_stride;
  int m, splits, activation;
  bool bf16, y_fp32;
  int tile_m;  // rows of x a block: 16 or less is the GEMV, 32, 64 and 128 are tiles of the GEMM
};

// These enqueue one kernel each on `stream`; std::runtime_error with CUDA's reason where that fails.
void linear(const Linear& call, void* stream);
void rows(const Weight& w, const void* ids, int64_t count, void* out, void* stream);
void panel(const Weight& w, bool bf16, int first_row, int rows, void* out, void* stream);

}  // namespace lowbit::gpu
