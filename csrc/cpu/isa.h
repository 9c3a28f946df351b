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

// The available instruction set of that name. Throws std::runtime_error if it is unknown or absent.
Isa find_isa(const std::string& name);

// The instruction set in use: what set_isa() chose, else LOWBIT_ISA, else the best available.
// Throws std::runtime_error if LOWBIT_ISA names one that is unknown or absent.
Isa selected_isa();

// Changes it for the whole process (tests and benchmarks compare instruction sets in one run); an empty name
// goes back to LOWBIT_ISA. Throws like selected_isa().
void set_isa(const std::string& name);

// Kinds of CPU whose measurements differ (docs/KERNELS.md has them).
enum class Cpu { kAny, kZen5 };
constexpr int kCpuCount = 2;

Cpu this_cpu();

// What tells CPUs of one instruction set apart.
struct Traits {
  bool vbmi;              // AVX-512 kernels look levels up by VPERMB: tables, and 1 bit in short spans
  bool requests_weights;  // kernels for a row or two ask for weights ahead of their use
};

// What was faster on this kind of CPU, unless set_traits() changed it for the process (tests and benchmarks compare
// both in one run).
Traits traits();

// Throws std::runtime_error if this CPU lacks VBMI and it is asked for.
void set_traits(const Traits& wanted);

bool has_vbmi();

}  // namespace lowbit
