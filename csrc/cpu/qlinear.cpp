#include "qlinear.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "dispatch.h"
#include "parallel.h"

namespace lowbit {
namespace {

// Multiply-adds that are worth a thread: about what one thread does in the 1.3 us that a region costs.
constexpr int64_t kWorkPerThread = 1 << 18;
constexpr int64_t kRowUnit = 32;  // rows that a member gets are a multiple of it
// Up to this much the caller prepares alone: a barrier costs more than the work.
constexpr int64_t kSerialPrepare = 1 << 14;  // activations

constexpr int64_t kShortSpan = 256;  // inputs; measured at 128, where the gain is a quarter of the time

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

// The team as a grid over outputs x rows.
struct Grid {
  int columns, rows;
};

// Outputs first, so that each weight is read by one member.
Grid by_outputs(int members, int64_t column_units, int64_t row_units) {
  int columns = members;
  while (columns > 1 && (members % columns != 0 || columns > column_units)) --columns;
  const int64_t rows = members / columns;
  return {columns, static_cast<int>(rows < row_units ? rows : row_units)};
}

// Or rows alone, so that a member finds the activations that it prepared in its own cache, at the price of reading (and
// unpacking) all weights. Measured: worth it for tile kernels where the products of a member's rows take longer than the
// weights (with 128 rows they do at any width), or the weights are few beside the activations; for the panel kernel where
// a member has few outputs.
bool by_rows(const Job& job, const LinearPlan& plan, int members) {
  const Matrix& w = job.w;
  const int64_t rows = job.m / members, weights = w.blocks() * w.block_bytes();
  if (!plan.large || rows < kRowUnit) return false;
  if (!plan.form.tiled) return w.n <= 2 * job.m;
  return rows >= (w.bits < 4 ? 32 * w.bits : 128) || weights <= 4 * job.m * w.k;
}

Grid grid(const Job& job, const LinearPlan& plan, int members) {
  if (by_rows(job, plan, members)) return {1, members};
  return by_outputs(members, ceil_div(job.w.blocks(), plan.column_unit), ceil_div(job.m, kRowUnit));
}

int64_t padded_k(const Form& form) { return ceil_div(form.k, kTileK) * kTileK; }

// Bytes of the scales, and of the sums, of int8 activations.
int64_t count_bytes(const LinearPlan& plan) {
  return round_up(plan.m * ceil_div(plan.form.k, plan.form.span) * 4);
}

// x with rows of whole tiles.
void pad_rows(const Job& job, Range rows) {
  auto* padded = const_cast<float*>(job.x_tiled);
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    float* row = padded + m * job.x_tiled_stride;
    std::memcpy(row, job.x + m * job.x_stride, static_cast<size_t>(job.w.k) * sizeof(float));
    std::memset(row + job.w.k, 0, static_cast<size_t>(job.x_tiled_stride - job.w.k) * sizeof(float));
  }
}

}  // namespace

LinearPlan plan_linear(const Matrix& w, int64_t m, Compute compute) {
  const Isa isa = selected_isa();
  const KernelSet& set = kernels(isa, w.bits);
  const bool exact = compute == Compute::kExact, large = !exact && m >= crossover(isa, w.bits);
  LinearPlan plan{};
  if (exact) {
    plan.kernel = set.exact;
  } else if (large) {
    plan.kernel = w.lookup ? set.large.lookup : set.large.affine;
  } else {
    const Kernel affine = w.span <= kShortSpan && set.small_short != nullptr ? set.small_short : set.small;
    plan.kernel = w.lookup ? set.small_lookup : affine;
  }
  plan.quantize = set.quantize;
  plan.form = {w.k, w.span, exact, large && set.large.tiled};
  plan.large = large;
  plan.m = m;
  plan.column_unit = large ? set.large.blocks : 4;  // small: as many streams as any kernel reads at once
  if (large) {
    Job job;
    job.w = w;
    job.m = m;
    plan.scratch = round_up(set.large.scratch_bytes(job));
    plan.activates = set.large.activates;
  }
  const int64_t useful = m * w.n * w.k / kWorkPerThread;
  const int available = max_threads();
  plan.threads = useful <= 1 ? 1 : static_cast<int>(useful < available ? useful : available);
  return plan;
}

int64_t activation_bytes(const LinearPlan& plan) {
  const int64_t row = padded_k(plan.form);
  if (plan.form.exact) return plan.form.k == row ? 0 : round_up(plan.m * row * 4);
  return 2 * count_bytes(plan) + ceil_div(plan.m, 16) * 16 * row;
}

void place_activations(Job& job, const LinearPlan& plan, uint8_t* memory) {
  const int64_t row = padded_k(plan.form), counts = count_bytes(plan);
  if (plan.form.exact) {
    const bool ragged = plan.form.k != row;
    job.x_tiled = ragged ? reinterpret_cast<const float*>(memory) : job.x;
    job.x_tiled_stride = ragged ? row : job.x_stride;
    return;
  }
  Activations& act = job.act;
  act.scale = reinterpret_cast<float*>(memory);
  act.sum = reinterpret_cast<int32_t*>(memory + counts);
  act.q = reinterpret_cast<int8_t*>(memory + 2 * counts);
  act.row_stride = plan.form.tiled ? kTileK : row;
  act.tile_stride = plan.form.tiled ? 16 * kTileK : kTileK;
  act.group_stride = 16 * row;
}

void prepare(const Job& job, const LinearPlan& plan, Range rows) {
  if (!plan.form.exact) {
    plan.quantize(job, rows);
  } else if (job.x_tiled != job.x) {
    pad_rows(job, rows);
  }
}

void multiply(const Job& job, const LinearPlan& plan, const Team& team, uint8_t* scratch) {
  const Grid g = grid(job, plan, team.size);
  if (team.rank >= g.columns * g.rows) return;
  const Range blocks = share(job.w.blocks(), plan.column_unit, {team.rank % g.columns, g.columns});
  const Range rows = share(job.m, kRowUnit, {team.rank / g.columns, g.rows});
  if (blocks.size() > 0 && rows.size() > 0) plan.kernel(job, blocks, rows, scratch);
}

Range share(int64_t count, int64_t unit, const Team& team) {
  const int64_t units = ceil_div(count, unit);
  const int64_t begin = units * team.rank / team.size * unit,
                end = units * (team.rank + 1) / team.size * unit;
  return {begin < count ? begin : count, end < count ? end : count};
}

Matrix slice(const Matrix& w, Range blocks) {
  Matrix part = w;
  part.tiles += blocks.begin * w.block_bytes();
  part.scales += blocks.begin * w.spans() * kTileN;
  const int64_t end = blocks.end * kTileN < w.n ? blocks.end * kTileN : w.n;
  part.n = end - blocks.begin * kTileN;
  return part;
}

void qlinear(Job job, Compute compute) {
  if (job.m == 0 || job.w.n == 0) return;
  const LinearPlan plan = plan_linear(job.w, job.m, compute);
  const int64_t shared = activation_bytes(plan);
  uint8_t* memory = workspace(shared + plan.threads * plan.scratch);
  place_activations(job, plan, memory);
  const bool alone = plan.threads == 1 || plan.form.exact || job.m * job.w.k <= kSerialPrepare;
  if (alone) prepare(job, plan, {0, job.m});

  parallel(plan.threads, [&](const Team& team) {
    if (!alone && by_rows(job, plan, team.size)) {
      prepare(job, plan, share(job.m, kRowUnit, team));  // what this member multiplies
    } else if (!alone) {
      prepare(job, plan, share(job.m, 1, team));
      team.barrier();
    }
    multiply(job, plan, team, memory + shared + team.rank * plan.scratch);
  });
}

}  // namespace lowbit
