#include "dispatch.h"
#include "exact-inl.h"
#include "simd_avx2-inl.h"

namespace lowbit {

const KernelSet kAvx2Kernels[4] = {
    kernel_set<Avx2, 1>(),
    kernel_set<Avx2, 2>(),
    kernel_set<Avx2, 4>(),
    kernel_set<Avx2, 8>(),
};

}  // namespace lowbit
