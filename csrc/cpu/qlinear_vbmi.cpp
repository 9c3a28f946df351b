#include "dispatch.h"
#include "gemv-inl.h"
#include "simd_vbmi-inl.h"

namespace lowbit {

const Kernel kVbmiLookups[4] = {nullptr, int8_small<Avx512Vbmi, 2, true>, int8_small<Avx512Vbmi, 4, true>,
                                nullptr};
// With more than 1 bit, VPERMB costs more than it saves where a span ends.
const Kernel kVbmiShorts[4] = {int8_small<Avx512VbmiShort, 1, true>, nullptr, nullptr, nullptr};

}  // namespace lowbit
