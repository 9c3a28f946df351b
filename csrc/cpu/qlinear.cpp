#include "qlinear.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "dispatch.h"
#include "parallel.h"

namespace lowbit {
namespace {

// Below this many multiply-adds a second thread costs more than it brings.
constexpr int64_t kWorkPerThread = 1 << 16;
constexpr int64_t kRowUnit = 32;  // rows that a worker gets are a multiple of it
// Up to this much the caller quantizes alone: a barrier costs more than the work.
constexpr int64_t kSerialQuantize = 1 << 14;  // activations

constexpr int64_t round_up(int64_t bytes) { return ceil_div(bytes, kAlign) * kAlign; }

// Memory that a thread keeps between calls.
uint8_t* workspace(int64_t bytes) {
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<uint8_t, Free> buffer;
  thread_local int64_t capacity = 0;
  if (bytes > capacity) {
    buffer.reset();
    capacity = 0;
    auto* p = static_cast<uint8_t*>(std::aligned_alloc(kAlign, static_cast<size_t>(round_up(bytes))));
    if (p == nullptr) throw std::bad_alloc();
    buffer.reset(p);
    capacity = round_up(bytes);
  }
  return buffer.get();
}

// Part `rank` of `size` nearly equal parts, in whole units.
Range part(int64_t count, int64_t unit, int rank, int size) {
  const int64_t units = ceil_div(count, unit);
  const int64_t begin = units * rank / size * unit, end = units * (rank + 1) / size * unit;
  return {begin < count ? begin : count, end < count ? end : count};
}

// The team as a grid over outputs x rows: outputs first, so that each weight is read by one thread.
struct Grid {
  int columns, rows;
};

Grid grid(int threads, int64_t column_units, int64_t row_units) {
  int columns = threads;
  while (columns > 1 && (threads % columns != 0 || columns > column_units)) --columns;
  const int64_t rows = threads / columns;
  return {columns, static_cast<int>(rows < row_units ? rows : row_units)};
}

struct Plan {
  const KernelSet* set;
  Kernel kernel;
  bool large;
  int threads;
  int64_t column_unit;  // blocks: what a worker gets is a multiple of it
  int64_t scratch;      // bytes a worker
};

Plan make_plan(const Job& job, Compute compute) {
  const Isa isa = selected_isa();
  const Matrix& w = job.w;
  Plan plan{};
  plan.set = &kernels(isa, w.bits);
  plan.large = compute == Compute::kInt8 && job.m >= crossover(isa, w.bits);
  if (compute == Compute::kExact) {
    plan.kernel = plan.set->exact;
  } else if (plan.large) {
    plan.kernel = w.lookup ? plan.set->large.lookup : plan.set->large.affine;
  } else {
    plan.kernel = w.lookup ? plan.set->small_lookup : plan.set->small;
  }
  plan.column_unit = plan.large ? plan.set->large.blocks : 2;
  plan.scratch = plan.large ? round_up(plan.set->large.scratch_bytes(job)) : 0;
  const int64_t useful = job.m * w.n * w.k / kWorkPerThread + 1;
  const int available = max_threads();
  plan.threads = static_cast<int>(useful < available ? useful : available);
  return plan;
}

void lay_out_activations(Job& job, bool tiled, uint8_t* at) {
  const int64_t tiles = job.w.tiles_k(), counts = round_up(job.m * job.w.spans() * 4);
  Activations& act = job.act;
  act.scale = reinterpret_cast<float*>(at);
  act.sum = reinterpret_cast<int32_t*>(at + counts);
  act.q = reinterpret_cast<int8_t*>(at + 2 * counts);
  act.row_stride = tiled ? kTileK : tiles * kTileK;
  act.tile_stride = tiled ? 16 * kTileK : kTileK;
  act.group_stride = 16 * tiles * kTileK;
}

// x with rows of whole tiles; a copy only where K is ragged.
void pad_rows(Job& job, uint8_t* at, Range rows) {
  float* padded = reinterpret_cast<float*>(at);
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    float* row = padded + m * job.x_tiled_stride;
    std::memcpy(row, job.x + m * job.x_stride, static_cast<size_t>(job.w.k) * sizeof(float));
    std::memset(row + job.w.k, 0, static_cast<size_t>(job.x_tiled_stride - job.w.k) * sizeof(float));
  }
}

}  // namespace

void qlinear(Job job, Compute compute) {
  if (job.m == 0 || job.w.n == 0) return;
  const Matrix& w = job.w;
  const Plan plan = make_plan(job, compute);
  const bool exact = compute == Compute::kExact;
  const int64_t padded_k = w.tiles_k() * kTileK;
  int64_t shared = 0;
  if (!exact) {
    shared = 2 * round_up(job.m * w.spans() * 4) + round_up(ceil_div(job.m, 16) * 16 * padded_k);
  } else if (w.k != padded_k) {
    shared = round_up(job.m * padded_k * 4);
  }
  uint8_t* memory = workspace(shared + plan.threads * plan.scratch);

  bool prepared = true;  // before the team starts
  if (!exact) {
    lay_out_activations(job, plan.large && plan.set->large.tiled, memory);
    prepared = plan.threads == 1 || job.m * w.k <= kSerialQuantize;
    if (prepared) plan.set->quantize(job, {0, job.m});
  } else {
    job.x_tiled = w.k == padded_k ? job.x : reinterpret_cast<const float*>(memory);
    job.x_tiled_stride = w.k == padded_k ? job.x_stride : padded_k;
    if (w.k != padded_k) pad_rows(job, memory, {0, job.m});
  }

  parallel(plan.threads, [&](const Team& team) {
    if (!prepared) {
      plan.set->quantize(job, part(job.m, 1, team.rank, team.size));
      team.barrier();
    }
    const Grid g = grid(team.size, ceil_div(w.blocks(), plan.column_unit), ceil_div(job.m, kRowUnit));
    if (team.rank >= g.columns * g.rows) return;
    const Range blocks = part(w.blocks(), plan.column_unit, team.rank % g.columns, g.columns);
    const Range rows = part(job.m, kRowUnit, team.rank / g.columns, g.rows);
    if (blocks.size() > 0 && rows.size() > 0)
      plan.kernel(job, blocks, rows, memory + shared + team.rank * plan.scratch);
  });
}

}  // namespace lowbit
