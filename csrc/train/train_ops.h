// Row kernels of training on a CPU: what PyTorch would do in many passes over memory, in one over a row that stays
// in cache. One table an instruction set; tools/training/ has the same in PyTorch, for other devices and as their
// reference.
#pragma once

#include <cstdint>

#include "../cpu/isa.h"

namespace lowbit {

// One row of logits, and what becomes of it.
struct SoftmaxRow {
  void* logits = nullptr;         // [n] bf16 or fp32; becomes the gradient of the loss
  const void* teacher = nullptr;  // [n] logits of the same type, or null
  int64_t n = 0, target = 0;
  float distill = 0;  // loss = (1 - distill) NLL + distill KL(teacher || student)
  bool bf16 = false, gradient = true;
  float* scratch = nullptr;  // 2 rows of n rounded up to 16
  float loss = 0, nll = 0;   // out
};

// The levels of a table (lowbit/tables.py): a * code + b for codes bottom .. top, or a list.
struct LevelTable {
  bool affine = false;
  float a = 0, b = 0, bottom = 0, top = 0;
  int count = 0;
  float level[16] = {}, boundary[15] = {};  // ascending; boundary[i] is the middle of levels i and i + 1
};

struct TrainOps {
  void (*softmax_gradient)(SoftmaxRow& row);
  // out[i] = scale * level nearest to v[i] / scale
  void (*nearest)(const LevelTable& table, const float* v, int64_t n, float scale, float* out);
  // sum t v and sum t^2 over the levels t nearest to v[i] / scale
  void (*correlate)(const LevelTable& table, const float* v, int64_t n, float scale, float* tv, float* tt);
};

const TrainOps& train_ops(Isa isa);

// Defined by train_<isa>.cpp, each with its own compiler flags.
extern const TrainOps kScalarTrainOps;
extern const TrainOps kNeonTrainOps;
extern const TrainOps kAvx2TrainOps;
extern const TrainOps kAvx512TrainOps;

}  // namespace lowbit
