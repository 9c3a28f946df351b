#include "../cpu/simd_neon-inl.h"
#include "make_train_ops-inl.h"

namespace lowbit {

const TrainOps kNeonTrainOps = make_train_ops<Neon>();

}  // namespace lowbit
