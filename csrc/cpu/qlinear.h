// y = x * W^T for a prepacked W: what the kernels of every instruction set implement, and the driver over
// them.
#pragma once

#include <cstdint>

#include "../layout.h"

namespace lowbit {

// Activations rounded to int8, q = round(x * 127 / max|x|), one scale for every row and span of W.
// Row m, tile t of 64 inputs lies at q + m / 16 * group_stride + m % 16 * row_stride + t * tile_stride, so
// that the same code writes plain rows (VNNI) and A tiles of 16 rows x 64 bytes (AMX).
struct Activations {
  int8_t* q = nullptr;     // padded with zeros to whole tiles
  float* scale = nullptr;  // [M, spans] max|x| / 127; NaN where the span holds a NaN or an infinity
  int32_t* sum = nullptr;  // [M, spans] sum of q
  int64_t group_stride = 0, row_stride = 0, tile_stride = 0;  // bytes

  LOWBIT_INLINE int8_t* at(int64_t m, int64_t tile) const {
    return q + m / 16 * group_stride + m % 16 * row_stride + tile * tile_stride;
  }
};

// What an MLP does between its products.
enum Activation { kRelu = 0, kGelu = 1, kNoActivation = 2 };

// One call, as all its workers see it. Pointers are valid and sizes checked.
struct Job {
  Matrix w;
  const float* x = nullptr;     // [M, K] fp32
  int64_t x_stride = 0;         // floats between rows
  const float* bias = nullptr;  // [N] or null
  float* y = nullptr;           // [M, N] fp32
  int64_t y_stride = 0;         // floats between rows
  int64_t m = 0;
  Activation activation = kNoActivation;  // of the outputs; only kernels whose plan `activates` apply it
  Activations act;                        // int8 kernels
  const float* x_tiled = nullptr;         // exact kernels: x with rows padded to whole tiles
  int64_t x_tiled_stride = 0;
};

struct Range {
  int64_t begin, end;
  LOWBIT_INLINE int64_t size() const { return end - begin; }
};

// Computes y[rows, 16 * blocks) of the job. scratch: kernel-specific, scratch_bytes() long, one per worker.
using Kernel = void (*)(const Job&, Range blocks, Range rows, uint8_t* scratch);
// Fills job.act for the rows.
using Quantizer = void (*)(const Job&, Range rows);

// A kernel that unpacks a panel of weights once and then serves all rows.
struct Panel {
  Kernel affine, lookup;                 // lookup: for tables that are not affine; null where none exist
  int64_t (*scratch_bytes)(const Job&);  // per worker
  int blocks;                            // of a panel
  bool tiled;                            // wants activations in tile order
  bool activates;                        // applies Job::activation
};

// The kernels of one instruction set and bit width.
struct KernelSet {
  Kernel small, small_lookup;  // weights unpacked in the inner loop: M = 1 and small M
  Kernel small_short;          // in place of small where spans are short; null: nothing is better
  Panel large;
  Kernel exact;  // fp32 activations
  Quantizer quantize;
};

enum class Compute { kInt8, kExact };

// Whether kernels for a row or two ask for weights ahead of their use (Traits of isa.h).
bool requests_weights();

// What kernels want of activations. Matrices that want the same form can share one prepared copy.
struct Form {
  int64_t k, span;
  bool exact;  // fp32 rows padded to whole tiles; otherwise int8
  bool tiled;  // int8 in AMX tile order
  bool operator==(const Form& o) const {
    return k == o.k && exact == o.exact && tiled == o.tiled && (exact || span == o.span);
  }
};

// How a call with M rows runs. Depends on shapes, the instruction set and set_threads() alone.
struct LinearPlan {
  Kernel kernel;
  Quantizer quantize;
  Form form;
  int64_t m;
  int64_t column_unit;  // blocks: what a member gets is a multiple of it
  int64_t scratch;      // bytes a member
  int threads;          // that are worth waking for this call alone
  bool large;           // a kernel for many rows
  bool activates;       // heeds Job::activation
};

// The driver: prepares activations, splits the work over threads, and runs. x rows are contiguous; y is
// overwritten.
void qlinear(Job job, Compute compute);

// The same in steps that neither allocate nor open a parallel region, for callers who run in one (parallel.h):
//
//   plan = plan_linear(w, m, compute)            anywhere
//   place_activations(job, plan, memory)         memory: activation_bytes(plan), 64-byte aligned, one for the team
//   prepare(job, plan, share(m, 1, team))        every member its rows; then a barrier
//   multiply(job, plan, team, scratch)           every member; scratch: plan.scratch bytes, 64-byte aligned, its own
//
// job.w, x, x_stride, m, y, y_stride and bias are set before. y is complete after the next barrier; until
// then the activations must stay. Where plan.form of several matrices is equal (q, k, v), prepare one job and
// give the others its act, x_tiled and x_tiled_stride. With few activations (M * K up to some thousands) a
// barrier costs more than the work: then each member prepares all rows in memory of its own instead.
struct Team;
LinearPlan plan_linear(const Matrix& w, int64_t m, Compute compute);
int64_t activation_bytes(const LinearPlan& plan);
void place_activations(Job& job, const LinearPlan& plan, uint8_t* memory);
void prepare(const Job& job, const LinearPlan& plan, Range rows);
void multiply(const Job& job, const LinearPlan& plan, const Team& team, uint8_t* scratch);

// Member `rank`'s part of `count` things in nearly equal contiguous parts of whole units.
Range share(int64_t count, int64_t unit, const Team& team);

// Outputs [16 * blocks.begin, 16 * blocks.end) as a matrix of its own (logits a piece at a time).
Matrix slice(const Matrix& w, Range blocks);

}  // namespace lowbit
