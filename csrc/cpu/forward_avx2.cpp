#include "forward_attention-inl.h"
#include "simd_avx2-inl.h"

namespace lowbit {

const RowOps kAvx2RowOps = make_row_ops<Avx2>();

}  // namespace lowbit
