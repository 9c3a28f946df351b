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
  void* packed_x;  // workspace of qwgmma.cuh, which then does the product, or null
  int64_t x_stride, y_stride;
  int m, splits, activation;
  bool bf16, y_fp32;
  bool early;  // may start before the kernel before it in its stream has ended (sm_90)
  int tile_m;  // rows of x a block: 16 or less is the GEMV, 32, 64 and 128 are tiles of the GEMM
};

// Where kernels are enqueued: a device's number and one of its streams.
struct Queue {
  int device;
  void* stream;
};

// These enqueue one kernel each, linear() with packed_x two; std::runtime_error with CUDA's reason where that fails.
void linear(const Linear& call, Queue queue);
void rows(const Weight& w, const void* ids, int64_t count, void* out, Queue queue);
void panel(const Weight& w, bool bf16, int first_row, int rows, void* out, Queue queue);

// Whether linear() may be called with packed_x: on sm_90, of an extension that was compiled for 90a.
bool has_wgmma(int device);
bool built_for_wgmma();

// The number of the graph that is being recorded on the stream, 0 where none is: unique in a process.
uint64_t recording(Queue queue);

}  // namespace lowbit::gpu
