#include "train.h"

#if defined(LOWBIT_X86)
#include <cpuid.h>
#endif

#include <vector>

#include "../cpu/parallel.h"
#include "../cpu/workspace.h"
#include "../layout.h"
#include "linear.h"

namespace lowbit {
namespace {

constexpr float kFp16Tiny = 5.9604644775390625e-8f, kFp16Max = 65504.0f;
constexpr int64_t kWorthAThread = 1 << 14;  // values: below, waking a thread costs more than it saves

// f(first, last, rank): the share of every thread of `rows` rows of `width` values.
template <class F>
void over_rows(int64_t rows, int64_t width, int threads, const F& f) {
  parallel(rows * width < kWorthAThread ? 1 : threads, [&](const Team& team) {
    f(rows * team.rank / team.size, rows * (team.rank + 1) / team.size, team.rank);
  });
}

// f(values, count, scale) for every scale of the rows first .. last - 1; offset of the values in the matrix.
template <class F>
void over_groups(const QuantizeJob& job, int64_t first, int64_t last, const F& f) {
  const int64_t groups = ceil_div(job.k, job.group);
  for (int64_t row = first; row < last; ++row) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t k = g * job.group, left = job.k - k;
      f(row * job.k + k, left < job.group ? left : job.group, job.scale[row * groups + g]);
    }
  }
}

}  // namespace

const TrainOps& train_ops(Isa isa) {
  switch (isa) {
#if defined(LOWBIT_X86)
    case Isa::kAvx2:
      return kAvx2TrainOps;
    case Isa::kAvx512:
    case Isa::kAmx:
      return kAvx512TrainOps;
#elif defined(LOWBIT_ARM)
    case Isa::kNeon:
      return kNeonTrainOps;
#endif
    default:
      return kScalarTrainOps;
  }
}

bool has_bf16_tiles() {
#if defined(LOWBIT_X86)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return selected_isa() == Isa::kAmx && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 &&
         (edx >> 22 & 1u) != 0;
#else
  return false;
#endif
}

uint8_t* train_workspace(int64_t bytes) {
  static thread_local Block block;
  return block.reserve(bytes);
}

void softmax_gradient(const SoftmaxJob& job) {
  const TrainOps& ops = train_ops(selected_isa());
  const int64_t padded = ceil_div(job.n, 16) * 16, row_bytes = job.stride * (job.bf16 ? 2 : 4);
  const int threads = max_threads();
  std::vector<float> scratch(static_cast<size_t>(2 * padded * threads));
  over_rows(job.rows, job.n, threads, [&](int64_t first, int64_t last, int rank) {
    for (int64_t i = first; i < last; ++i) {
      SoftmaxRow row;
      row.logits = static_cast<char*>(job.logits) + i * row_bytes;
      row.teacher = job.teacher == nullptr ? nullptr : static_cast<const char*>(job.teacher) + i * row_bytes;
      row.n = job.n;
      row.target = job.target[i];
      row.distill = job.distill;
      row.bf16 = job.bf16;
      row.gradient = job.gradient;
      row.scratch = scratch.data() + 2 * padded * rank;
      ops.softmax_gradient(row);
      job.loss[i] = row.loss;
      job.nll[i] = row.nll;
    }
  });
}

void load_nearest(const QuantizeJob& job, float* out) {
  const TrainOps& ops = train_ops(selected_isa());
  over_rows(job.n, job.k, max_threads(), [&](int64_t first, int64_t last, int) {
    over_groups(job, first, last, [&](int64_t at, int64_t count, float scale) {
      ops.nearest(job.table, job.v + at, count, scale, out + at);
    });
  });
}

void refine_scales(const QuantizeJob& job, int iterations) {
  const TrainOps& ops = train_ops(selected_isa());
  over_rows(job.n, job.k, max_threads(), [&](int64_t first, int64_t last, int) {
    over_groups(job, first, last, [&](int64_t at, int64_t count, float& scale) {
      scale = scale < kFp16Tiny ? kFp16Tiny : scale > kFp16Max ? kFp16Max : scale;
      for (int i = 0; i < iterations; ++i) {
        float tv, tt;
        ops.correlate(job.table, job.v + at, count, scale, &tv, &tt);
        if (tv > 0 && tt > 0) scale = tv / tt;
      }
    });
  });
}

}  // namespace lowbit
