#include "dispatch.h"

#include <atomic>

#include "crossover.h"

namespace lowbit {
namespace {

constexpr int log2_bits(int bits) { return bits == 1 ? 0 : bits == 2 ? 1 : bits == 4 ? 2 : 3; }

struct Table {
  KernelSet set[kIsaCount][4] = {};  // an entry of an absent instruction set stays null and is never reached

  Table() {
    fill(Isa::kScalar, kScalarKernels);
#if defined(LOWBIT_X86)
    fill(Isa::kAvx2, kAvx2Kernels);
    fill(Isa::kAvx512, kAvx512Kernels);
    fill(Isa::kAmx, kAvx512Kernels);
    for (int i = 0; i < 4; ++i) {
      KernelSet& amx = set[static_cast<int>(Isa::kAmx)][i];
      amx.large = kAmxPanels[i];
      if (kVbmiLookups[i] != nullptr) amx.small_lookup = kVbmiLookups[i];
    }
    set[static_cast<int>(Isa::kAmx)][0].small_short = kVbmiShort;
#elif defined(LOWBIT_ARM)
    fill(Isa::kNeon, kNeonKernels);
#endif
  }
  void fill(Isa isa, const KernelSet (&from)[4]) {
    for (int i = 0; i < 4; ++i) set[static_cast<int>(isa)][i] = from[i];
  }
};

std::atomic<int>& crossover_of(Isa isa, int bits) {
  static struct Rows {
    std::atomic<int> rows[kIsaCount][4];
    Rows() {
      for (int i = 0; i < kIsaCount; ++i) {
        for (int j = 0; j < 4; ++j) rows[i][j] = kCrossover[i][j];
      }
    }
  } all;
  return all.rows[static_cast<int>(isa)][log2_bits(bits)];
}

}  // namespace

const KernelSet& kernels(Isa isa, int bits) {
  static const Table table;
  return table.set[static_cast<int>(isa)][log2_bits(bits)];
}

int crossover(Isa isa, int bits) { return crossover_of(isa, bits).load(std::memory_order_relaxed); }

void set_crossover(Isa isa, int bits, int rows) { crossover_of(isa, bits) = rows; }

std::string kernel_name(Isa isa, int bits, int64_t rows, Compute compute) {
  const char* kind = compute == Compute::kExact ? "exact" : rows < crossover(isa, bits) ? "small" : "large";
  return std::string(isa_name(isa)) + " " + std::to_string(bits) + "-bit " + kind;
}

}  // namespace lowbit
