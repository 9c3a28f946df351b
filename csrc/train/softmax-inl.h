// Cross-entropy and its gradient with respect to one row of logits, with or without a teacher.
#pragma once

#include "../cpu/forward_ops-inl.h"
#include "train_ops.h"

namespace lowbit {
namespace {

// Plain loops over numbers of 16 and 32 bits: compilers vectorize them for every instruction set.
LOWBIT_INLINE void widen(const uint16_t* bf16, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = bits_to_float(static_cast<uint32_t>(bf16[i]) << 16);
}

LOWBIT_INLINE void narrow(const float* x, int64_t n, uint16_t* bf16) {  // to nearest, ties to even
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    bf16[i] = static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
  }
}

// A row of either type as fp32, padded to 16 values with what adds nothing to a softmax. Returns the padded length.
LOWBIT_INLINE int64_t fetch(const SoftmaxRow& row, const void* from, float* to) {
  if (row.bf16) {
    widen(static_cast<const uint16_t*>(from), row.n, to);
  } else {
    std::memcpy(to, from, static_cast<size_t>(row.n) * 4);
  }
  return pad(to, row.n, kMinusInfinity);
}

// The teacher's part: t becomes exp(t - max); returns their sum. *divergence = KL(teacher || student) but for the
// student's log-sum, given as sum q (t - x) less the teacher's log-sum, where sum q = 1.
template <class S>
LOWBIT_INLINE float teach(float* t, const float* x, int64_t padded, int64_t n, float* divergence) {
  using F32 = typename S::F32;
  const float top = greatest<S>(t, padded);
  const F32 minus_top = S::set1(-top * kLog2E);
  F32 total = S::zero_f32(), product = S::zero_f32();
  for_vectors(n, [&](int64_t i, auto count) LOWBIT_LAMBDA {
    // Lanes beyond n load as 0 - 0 here and meet the zeros that a partial store of e leaves aside.
    const F32 difference = S::sub(load<S>(t + i, count), load<S>(x + i, count));
    const F32 e = exp_below<S>(S::load_f32(t + i), minus_top);
    product = S::fmadd(e, difference, product);
    total = S::add(total, e);
    S::store_f32(t + i, e, 16);
  });
  const float sum = S::reduce_add(total);
  *divergence = S::reduce_add(product) / sum - top - std::log(sum);
  return sum;
}

template <class S>
void softmax_gradient(SoftmaxRow& row) {
  using F32 = typename S::F32;
  float* x = row.scratch;
  const int64_t padded = fetch(row, row.logits, x);
  float* t = x + padded;
  const float picked = x[row.target], top = greatest<S>(x, padded);
  float divergence = 0, teacher_sum = 1;
  if (row.teacher != nullptr) {
    fetch(row, row.teacher, t);
    teacher_sum = teach<S>(t, x, padded, row.n, &divergence);
  }
  const float sum = exponentiate<S>(x, padded, top), log_sum = top + std::log(sum);
  const float soft = row.teacher == nullptr ? 0.0f : row.distill, hard = 1.0f - soft;
  row.nll = log_sum - picked;
  row.loss = row.teacher == nullptr ? row.nll : hard * row.nll + soft * (divergence + log_sum);
  if (!row.gradient) return;
  // d loss / d x = softmax(x) - hard onehot - soft softmax(t)
  const F32 scale = S::set1(1.0f / sum), minus = S::set1(-soft / teacher_sum);
  for (int64_t i = 0; i < padded; i += 16) {
    const F32 p = S::mul(S::load_f32(x + i), scale);
    S::store_f32(x + i, row.teacher == nullptr ? p : S::fmadd(S::load_f32(t + i), minus, p), 16);
  }
  x[row.target] -= hard;
  if (row.bf16) {
    narrow(x, row.n, static_cast<uint16_t*>(row.logits));
  } else {
    std::memcpy(row.logits, x, static_cast<size_t>(row.n) * 4);
  }
}

}  // namespace
}  // namespace lowbit
