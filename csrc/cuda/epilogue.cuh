// What both products share: arguments, where K is cut, and the way of sums from shared memory to y.
#pragma once

#include "dequant.cuh"

namespace lowbit::gpu {

enum class Activation : int { kNone = 0, kRelu = 1, kGelu = 2 };

// y = residual + activation(x W^T + bias). Checked by the caller; all pointers on the device.
struct Args {
  const Vec4* codes;       // layout.cuh
  const uint16_t* scales;  // fp16 [groups, n_padded]
  const uint16_t*
      x;  // 16-bit floats [m, k], rows x_stride elements apart: 16-byte aligned, zero from k to the
          // next multiple of 8
  const float* bias;     // [n] or null
  const void* residual;  // [m, n] of y's type and stride, or null; may be y
  void* y;               // [m, n] of x's type or fp32, rows y_stride elements apart
  float* partial;        // [splits, m, n_padded], where splits > 1
  int* arrived;          // a counter for each tile of y, zero before and after, where splits > 1
  int64_t x_stride, y_stride;
  int m, n, k;
  int n_padded, chunks;
  int group_chunks;  // chunks that share a scale; >= chunks for one scale a row
  bool y_fp32;
  Activation activation;
  Codebook book;
};

// First chunk of part i of `parts`: parts differ by one chunk at most.
LOWBIT_HD constexpr int part_start(int chunks, int i, int parts) {
  return static_cast<int>(static_cast<int64_t>(chunks) * i / parts);
}

LOWBIT_DEVICE float activate(float v, Activation activation) {
  if (activation == Activation::kRelu) return v > 0.0f || v != v ? v : 0.0f;  // NaN stays
  if (activation == Activation::kGelu) return 0.5f * v * (1.0f + erff(v * 0.70710678118654752f));
  return v;
}

// A warp's sums of 16 outputs x 8 rows of x, as mma leaves them, times the factors of outputs g and g + 8, to
// shared [rows][pitch] from (row, column) on.
LOWBIT_DEVICE void store_fragment(float* shared, int pitch, int row, int column, const float (&sums)[4],
                                  const float (&by)[2]) {
  const int lane = thread_index() % 32;
  float* at = shared + (row + lane % 4 * 2) * pitch + column + lane / 4;
  LOWBIT_UNROLL
  for (int r = 0; r < 4; ++r) store_shared(at + r % 2 * pitch + r / 2 * 8, sums[r] * by[r / 2]);
}

// One element of y from its finished sum.
template <class T>
LOWBIT_DEVICE void finish(const Args& p, int row, int column, float sum) {
  if (p.bias != nullptr) sum += load_global(p.bias + column);
  float value = activate(sum, p.activation);
  const int64_t at = row * p.y_stride + column;
  if (p.y_fp32) {
    if (p.residual != nullptr) value += load_coherent(static_cast<const float*>(p.residual) + at);
    store_global(static_cast<float*>(p.y) + at, value);
  } else {
    if (p.residual != nullptr) {
      value += widen(T{}, load_coherent(static_cast<const uint16_t*>(p.residual) + at));
    }
    store_global(static_cast<uint16_t*>(p.y) + at, static_cast<uint16_t>(pack2(T{}, value, 0.0f)));
  }
}

// Sums of a block's tile: `sum(row, column)` for rows [0, kM) from row_first, columns [0, kN) from column_first. With
// one split they go to y. With more, each block leaves its part in `partial`, and the one that arrives last adds them in
// the order of the splits, so that results do not depend on timing, and leaves the counter at zero for the next launch.
template <class T, int kM, int kN, int kThreads, class Sum>
LOWBIT_DEVICE void write_tile(const Args& p, int tile, int row_first, int column_first, int splits, int* last,
                              const Sum& sum) {
  const int rows = p.m - row_first < kM ? p.m - row_first : kM;
  const int split = block_y();
  const auto part = [&](int s, int row, int column) {
    return p.partial + (static_cast<int64_t>(s) * p.m + row_first + row) * p.n_padded + column_first + column;
  };
  for (int i = thread_index(); i < rows * kN; i += kThreads) {
    const int row = i / kN, column = i % kN;
    if (column_first + column >= p.n) continue;
    const float value = sum(row, column);
    if (splits == 1) {
      finish<T>(p, row_first + row, column_first + column, value);
    } else {
      store_global(part(split, row, column), value);
    }
  }
  if (splits == 1) return;
  fence();
  barrier();
  if (thread_index() == 0) store_shared(last, add_atomic(p.arrived + tile, 1));
  barrier();
  if (load_shared(last) != splits - 1) return;
  fence();
  for (int i = thread_index(); i < rows * kN; i += kThreads) {
    const int row = i / kN, column = i % kN;
    if (column_first + column >= p.n) continue;
    float total = 0.0f;
    for (int s = 0; s < splits; ++s) total += load_coherent(part(s, row, column));
    finish<T>(p, row_first + row, column_first + column, total);
  }
  if (thread_index() == 0) store_global(p.arrived + tile, 0);
}

}  // namespace lowbit::gpu
