// The table of training's row kernels for the vector class S of a simd_<isa>-inl.h.
#pragma once

#include "nearest-inl.h"
#include "softmax-inl.h"

namespace lowbit {
namespace {

template <class S>
constexpr TrainOps make_train_ops() {
  return {softmax_gradient<S>, nearest, correlate};
}

}  // namespace
}  // namespace lowbit
