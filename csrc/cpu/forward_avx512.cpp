#include "forward_attention-inl.h"
#include "simd_avx512-inl.h"

namespace lowbit {

const RowOps kAvx512RowOps = make_row_ops<Avx512>();

}  // namespace lowbit
