// From how many rows M the panel kernel (`large`) is chosen over the one that unpacks as it goes (`small`), per
// instruction set and bits 1, 2, 4, 8. Set where a panel of rows is full (8 for scalar and AMX tiles of 16 rows half
// used, 16 elsewhere), not yet tuned by timings.
#pragma once

#include "isa.h"

namespace lowbit {

constexpr int kCrossover[kIsaCount][4] = {
    {8, 8, 8, 8},      // scalar
    {16, 16, 16, 16},  // neon
    {16, 16, 16, 16},  // avx2
    {16, 16, 16, 16},  // avx512
    {8, 8, 8, 8},      // amx
};

}  // namespace lowbit
