#include "dispatch.h"
#include "exact-inl.h"
#include "simd_avx512-inl.h"

namespace lowbit {
namespace {

constexpr KernelSet one_bit() {
  KernelSet set = kernel_set<Avx512, 1>();
  set.small_short = int8_small<Avx512Short, 1, false>;
  return set;
}

}  // namespace

const KernelSet kAvx512Kernels[4] = {
    one_bit(),
    kernel_set<Avx512, 2>(),
    kernel_set<Avx512, 4>(),
    kernel_set<Avx512, 8>(),
};

}  // namespace lowbit
