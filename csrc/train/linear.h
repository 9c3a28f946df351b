// y = x W^T + bias and its gradients in bf16 with fp32 sums and fp32 weights, on AMX tiles: what a linear layer under
// bf16 autocast computes, without copies of the weights and with gradients of weights that are never rounded.
#pragma once

#include <cstdint>

namespace lowbit {

// Whether the instruction set in use is AMX and the CPU multiplies bf16 tiles.
bool has_bf16_tiles();

// A row-major matrix. Rows of bf16 activations are read in runs of 32 values: columns up to the next multiple of 32
// must lie within the stride and be zero.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t stride = 0;
};

struct LinearShape {
  int64_t m = 0, n = 0, k = 0;  // x [m, k], W [n, k], y [m, n]
};

// bias [n] may be null.
void linear_forward(const LinearShape& shape, Rows<const uint16_t> x, const float* w, const float* bias,
                    Rows<uint16_t> y);

// dx = dy W, dw = dy^T x, db = sum of dy over the rows; dx and db may be null.
void linear_backward(const LinearShape& shape, Rows<const uint16_t> dy, Rows<const uint16_t> x,
                     const float* w, Rows<uint16_t> dx, float* dw, float* db);

// Memory of the calling thread, 64-byte aligned, until its next call.
uint8_t* train_workspace(int64_t bytes);

}  // namespace lowbit
