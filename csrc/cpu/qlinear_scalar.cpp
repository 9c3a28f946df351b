#include "dispatch.h"
#include "exact-inl.h"
#include "simd_scalar-inl.h"

namespace lowbit {

const KernelSet kScalarKernels[4] = {
    kernel_set<Scalar, 1>(),
    kernel_set<Scalar, 2>(),
    kernel_set<Scalar, 4>(),
    kernel_set<Scalar, 8>(),
};

}  // namespace lowbit
