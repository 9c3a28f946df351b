#include "forward_ops.h"

#include "forward_digits.h"

namespace lowbit {

const RowOps& row_ops(Isa isa) {
  switch (isa) {
#if defined(LOWBIT_X86)
    case Isa::kAvx2:
      return kAvx2RowOps;
    case Isa::kAvx512:
    case Isa::kAmx:
      return kAvx512RowOps;
#elif defined(LOWBIT_ARM)
    case Isa::kNeon:
      return kNeonRowOps;
#endif
    default:
      return kScalarRowOps;
  }
}

const DigitOps* digit_ops(Isa isa) {
#if defined(LOWBIT_X86)
  if (isa == Isa::kAmx) return &kAmxDigitOps;
#endif
  (void)isa;
  return nullptr;
}

}  // namespace lowbit
