// From how many rows M the panel kernel (`large`) is chosen over the one that unpacks as it goes (`small`), per kind of
// CPU, instruction set and bits 1, 2, 4, 8. `lowbit tune-cpu` measures a machine.
#pragma once

#include "isa.h"

namespace lowbit {

constexpr int kNever = 1 << 20;

constexpr int kCrossover[kCpuCount][kIsaCount][4] = {
    // x86: where the two took equally long on one core of a Sapphire Rapids, weights in L2, 2048 x 512 and 1024 x 1024;
    // the others: where a panel of rows is full.
    {
        {8, 8, 8, 8},      // scalar
        {16, 16, 16, 16},  // neon
        {12, 12, 12, 24},  // avx2
        {24, 24, 24, 28},  // avx512
        {5, 5, 5, 5},      // amx
    },
    // Zen 5 has ports to spare for unpacking: a panel was at no number of rows faster by more than 1 % (4096 x 4096,
    // 2048 x 512 and 512 x 2048, up to 512 rows).
    {
        {8, 8, 8, 8},
        {16, 16, 16, 16},
        {kNever, kNever, kNever, kNever},
        {kNever, kNever, kNever, kNever},
        {5, 5, 5, 5},
    },
};

}  // namespace lowbit
