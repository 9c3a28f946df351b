// From how many rows M the panel kernel (`large`) beats the one that unpacks as it goes (`small`), per
// instruction set and bits 1, 2, 4, 8. Measured, not derived: bench/crossover.py prints this table for a
// machine.
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
