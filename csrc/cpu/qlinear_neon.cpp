#include "dispatch.h"
#include "exact-inl.h"
#include "simd_neon-inl.h"

namespace lowbit {

const KernelSet kNeonKernels[4] = {
    kernel_set<Neon, 1>(),
    kernel_set<Neon, 2>(),
    kernel_set<Neon, 4>(),
    kernel_set<Neon, 8>(),
};

}  // namespace lowbit
