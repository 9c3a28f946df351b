// The fp32 part of a forward: what happens to rows between the matrix products. One table an instruction set.
#pragma once

#include <cstdint>

#include "../layout.h"
#include "isa.h"
#include "qlinear.h"

namespace lowbit {

struct NormWeights {
  const float* weight = nullptr;  // [D]
  const float* bias = nullptr;    // [D]
  float eps = 0;
};

// One head of one query over the tokens that it sees. A token's key lies at slots[j] + key, its value at
// slots[j] + value.
struct HeadQuery {
  const float* q = nullptr;  // [dim], scaled by 1 / sqrt(dim)
  const float* const* slots = nullptr;
  int64_t count = 0, dim = 0;
  int64_t key = 0, value = 0;  // floats
};

// One head of up to 16 queries, each in a lane of its own, over the tokens that any of them sees.
struct HeadBlock {
  const float* q = nullptr;  // [queries, dim], q_stride floats apart
  int64_t q_stride = 0;
  int queries = 0;
  uint16_t wanted = 0xFFFF;  // bit i: out is written for query i
  float scale = 1;           // of the queries
  const float* const* slots = nullptr;
  const uint16_t* lanes = nullptr;  // bit i of lanes[j]: query i sees token j
  int64_t count = 0, dim = 0;
  int64_t key = 0, value = 0;  // as above

  // Floats that attend_together needs.
  static int64_t room(int64_t count, int64_t dim) { return (ceil_div(dim, 16) * 16 + count) * 16; }
};

struct RowOps {
  // out = (x - mean) / sqrt(variance + eps) * weight + bias. Returns max |out|: NaN or infinity where out holds any.
  float (*layer_norm)(const float* x, const NormWeights& norm, int64_t n, float* out);
  // x += y; then the same of x, whose place `out` may be.
  float (*add_norm)(float* x, const float* y, const NormWeights& norm, int64_t n, float* out);
  float (*activation[2])(const float* x, int64_t n,
                         float* out);             // [Activation]; likewise. GELU by erf, within 2e-6
  float (*magnitude)(const float* x, int64_t n);  // max |x|; likewise
  // Row m of the job's activations from job.x, whose max |x| is known; for weights of one span.
  void (*quantize_row)(const Job& job, int64_t m, float top);
  void (*scale_add)(float* x, float scale, const float* y, int64_t n);  // x = scale * x + y; y may be null
  // Rotates the pairs (i, i + half) by the angles of cos and sin; in place or not.
  void (*rotate)(const float* x, const float* cos, const float* sin, int64_t half, float* out);
  // out = softmax(q K^T) V. scores: room for count rounded up to 16.
  void (*attend)(const HeadQuery& query, float* scores, float* out);
  // The same bits for every query of a block; out is as q, and may be q. room: 64-byte aligned.
  void (*attend_together)(const HeadBlock& block, float* room, float* out);
  // max x and sum exp(x - max) over n values; x may be written up to n rounded up to 16.
  void (*softmax_part)(float* x, int64_t n, float* max, float* sum);
  // log sum over n parts of sum * exp(max); as above for both arrays.
  float (*log_sum_exp)(float* max, float* sum, int64_t n);
  void (*subtract)(const float* x, float by, int64_t n, float* out);  // out = x - by
};

const RowOps& row_ops(Isa isa);

// Defined by forward_<isa>.cpp, each with its own compiler flags.
extern const RowOps kScalarRowOps;
extern const RowOps kNeonRowOps;
extern const RowOps kAvx2RowOps;
extern const RowOps kAvx512RowOps;

}  // namespace lowbit
