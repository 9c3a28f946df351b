#include "../cpu/simd_avx512-inl.h"
#include "make_train_ops-inl.h"

namespace lowbit {

const TrainOps kAvx512TrainOps = make_train_ops<Avx512>();

}  // namespace lowbit
