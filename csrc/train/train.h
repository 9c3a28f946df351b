// Training's row kernels over whole matrices, on all threads. Every row is one thread's work from beginning to end:
// results do not depend on the number of threads.
#pragma once

#include "train_ops.h"

namespace lowbit {

struct SoftmaxJob {
  void* logits = nullptr;               // [rows, n] bf16 or fp32
  const void* teacher = nullptr;        // [rows, n] or null
  const int64_t* target = nullptr;      // [rows], each in [0, n)
  int64_t rows = 0, n = 0, stride = 0;  // stride between rows of logits, and of the teacher's
  float distill = 0;
  bool bf16 = false, gradient = true;
  float *loss = nullptr, *nll = nullptr;  // [rows], out
};

// Logits become gradients of the loss (unless gradient is off: then they are as they were).
void softmax_gradient(const SoftmaxJob& job);

struct QuantizeJob {
  LevelTable table;
  const float* v = nullptr;  // [n, k]
  float* scale = nullptr;    // [n, ceil(k / group)]
  int64_t n = 0, k = 0, group = 0;
};

// out[n, k] = scale * nearest level
void load_nearest(const QuantizeJob& job, float* out);

// Alternates `iterations` times between the nearest levels and their least-squares scales, which replace the job's;
// where these would be 0 / 0 or not positive, a scale stands.
void refine_scales(const QuantizeJob& job, int iterations);

}  // namespace lowbit
