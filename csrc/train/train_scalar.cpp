#include "../cpu/simd_scalar-inl.h"
#include "make_train_ops-inl.h"

namespace lowbit {

const TrainOps kScalarTrainOps = make_train_ops<Scalar>();

}  // namespace lowbit
