#include "forward_attention-inl.h"
#include "simd_neon-inl.h"

namespace lowbit {

const RowOps kNeonRowOps = make_row_ops<Neon>();

}  // namespace lowbit
