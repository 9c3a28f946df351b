#include "dispatch.h"
#include "gemv-inl.h"
#include "simd_vbmi-inl.h"

namespace lowbit {

const Kernel kVbmiLookups[4] = {nullptr, int8_small<Avx512Vbmi, 2, true>, int8_small<Avx512Vbmi, 4, true>,
                                nullptr};
const Kernel kVbmiShort = int8_small<Avx512VbmiShort, 1, true>;

}  // namespace lowbit
