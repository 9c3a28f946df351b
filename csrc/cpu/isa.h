// What this CPU and this operating system allow, and which instruction set is in use.
#pragma once

#include <string>
#include <vector>

namespace lowbit {

enum class Isa { kScalar, kNeon, kAvx2, kAvx512, kAmx };
constexpr int kIsaCount = 5;

const char* isa_name(Isa isa);

// Whether this build contains the kernels, the CPU has the instructions and the OS saves their registers.
bool isa_available(Isa isa);

std::vector<std::string> available_isas();

// The instruction set in use: LOWBIT_ISA, or the best available. Resolved once a process.
// Throws std::runtime_error if LOWBIT_ISA names one that is unknown or absent.
Isa selected_isa();

// Parses a name; the same errors as selected_isa().
Isa require_isa(const std::string& name);

}  // namespace lowbit
