#include "dispatch.h"
#include "exact-inl.h"
#include "simd_avx512-inl.h"

namespace lowbit {

const KernelSet kAvx512Kernels[4] = {
    kernel_set<Avx512, 1>(),
    kernel_set<Avx512, 2>(),
    kernel_set<Avx512, 4>(),
    kernel_set<Avx512, 8>(),
};

}  // namespace lowbit
