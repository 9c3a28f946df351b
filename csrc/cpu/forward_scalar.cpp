#include "forward_attention-inl.h"
#include "simd_scalar-inl.h"

namespace lowbit {

const RowOps kScalarRowOps = make_row_ops<Scalar>();

}  // namespace lowbit
