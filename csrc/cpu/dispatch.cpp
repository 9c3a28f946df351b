#include "dispatch.h"

#include <atomic>

#include "crossover.h"

namespace lowbit {
namespace {

constexpr int log2_bits(int bits) { return bits == 1 ? 0 : bits == 2 ? 1 : bits == 4 ? 2 : 3; }

struct Table {
  KernelSet set[kIsaCount][4] = {};  // an entry of an absent instruction set stays null and is never reached

  explicit Table(bool vbmi) {
    fill(Isa::kScalar, kScalarKernels);
#if defined(LOWBIT_X86)
    fill(Isa::kAvx2, kAvx2Kernels);
    fill(Isa::kAvx512, kAvx512Kernels);
    fill(Isa::kAmx, kAvx512Kernels);
    for (int i = 0; i < 4; ++i) set[static_cast<int>(Isa::kAmx)][i].large = kAmxPanels[i];
    for (const Isa isa : {Isa::kAvx512, Isa::kAmx}) {
      if (vbmi) use_vbmi(set[static_cast<int>(isa)]);
    }
#elif defined(LOWBIT_ARM)
    fill(Isa::kNeon, kNeonKernels);
#endif
  }
  void fill(Isa isa, const KernelSet (&from)[4]) {
    for (int i = 0; i < 4; ++i) set[static_cast<int>(isa)][i] = from[i];
  }
#if defined(LOWBIT_X86)
  static void use_vbmi(KernelSet (&to)[4]) {
    for (int i = 0; i < 4; ++i) {
      if (kVbmiLookups[i] != nullptr) to[i].small_lookup = kVbmiLookups[i];
      to[i].small_short = kVbmiShorts[i];
    }
  }
#endif
};

std::atomic<int>& crossover_of(Isa isa, int bits) {
  static struct Rows {
    std::atomic<int> rows[kIsaCount][4];
    Rows() {
      const auto& measured = kCrossover[static_cast<int>(this_cpu())];
      for (int i = 0; i < kIsaCount; ++i) {
        for (int j = 0; j < 4; ++j) rows[i][j] = measured[i][j];
      }
    }
  } all;
  return all.rows[static_cast<int>(isa)][log2_bits(bits)];
}

}  // namespace

const KernelSet& kernels(Isa isa, int bits) {
  static const Table tables[] = {Table(false), Table(true)};
  return tables[traits().vbmi].set[static_cast<int>(isa)][log2_bits(bits)];
}

int crossover(Isa isa, int bits) { return crossover_of(isa, bits).load(std::memory_order_relaxed); }

bool requests_weights() { return traits().requests_weights; }

void set_crossover(Isa isa, int bits, int rows) { crossover_of(isa, bits) = rows; }

std::string kernel_name(Isa isa, int bits, int64_t rows, Compute compute) {
  const char* kind = compute == Compute::kExact ? "exact" : rows < crossover(isa, bits) ? "small" : "large";
  return std::string(isa_name(isa)) + " " + std::to_string(bits) + "-bit " + kind;
}

}  // namespace lowbit
