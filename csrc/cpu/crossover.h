// From how many rows M the panel kernel (`large`) is chosen over the one that unpacks as it goes (`small`), per
// instruction set and bits 1, 2, 4, 8. x86: where the two took equally long on one core of a Sapphire Rapids, weights
// in L2, 2048 x 512 and 1024 x 1024; the others: where a panel of rows is full. `lowbit tune-cpu` measures a machine.
#pragma once

#include "isa.h"

namespace lowbit {

constexpr int kCrossover[kIsaCount][4] = {
    {8, 8, 8, 8},      // scalar
    {16, 16, 16, 16},  // neon
    {12, 12, 12, 24},  // avx2
    {24, 24, 24, 28},  // avx512
    {5, 5, 5, 5},      // amx
};

}  // namespace lowbit
