// Which kernel runs: table[isa][bits], and from how many rows on a panel is worth unpacking.
#pragma once

#include "isa.h"
#include "qlinear.h"

namespace lowbit {

// The kernels of an available instruction set. bits is 1, 2, 4 or 8.
const KernelSet& kernels(Isa isa, int bits);

// The M from which `large` beats `small` (data: see crossover.h).
int crossover(Isa isa, int bits);

// Replaces it for the process (tuning files, tests); rows is at least 1.
void set_crossover(Isa isa, int bits, int rows);

// What a call with these rows runs, for people: "avx512 4-bit small".
std::string kernel_name(Isa isa, int bits, int64_t rows, Compute compute);

// Defined by qlinear_<isa>.cpp, each in its own file so that each has its own compiler flags.
// [log2(bits)]
extern const KernelSet kScalarKernels[4];
extern const KernelSet kNeonKernels[4];
extern const KernelSet kAvx2Kernels[4];
extern const KernelSet kAvx512Kernels[4];
extern const Panel kAmxPanels[4];  // small, exact and quantize are AVX-512's
// With VBMI, for look-up tables and for short spans. Null where AVX-512's own are as good, or none is needed.
extern const Kernel kVbmiLookups[4];
extern const Kernel kVbmiShorts[4];

}  // namespace lowbit
