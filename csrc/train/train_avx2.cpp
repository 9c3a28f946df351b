#include "../cpu/simd_avx2-inl.h"
#include "make_train_ops-inl.h"

namespace lowbit {

const TrainOps kAvx2TrainOps = make_train_ops<Avx2>();

}  // namespace lowbit
