#include "isa.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace lowbit {
namespace {

constexpr const char* kNames[kIsaCount] = {"scalar", "neon", "avx2", "avx512", "amx"};

#if defined(__x86_64__)

struct Cpuid {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  Cpuid(unsigned leaf, unsigned sub) { __get_cpuid_count(leaf, sub, &eax, &ebx, &ecx, &edx); }
};

constexpr bool has(unsigned reg, int bit) { return reg >> bit & 1u; }

// XCR0: which register files the OS saves. YMM: bits 1-2; ZMM: 5-7 too; tiles: 17-18.
uint64_t os_saved_registers() {
  if (!has(Cpuid(1, 0).ecx, 27)) return 0;  // OSXSAVE
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return static_cast<uint64_t>(hi) << 32 | lo;
}

bool os_saves(uint64_t mask) { return (os_saved_registers() & mask) == mask; }

bool cpu_has_avx2() {
  const Cpuid one(1, 0), seven(7, 0);
  return os_saves(0x6) && has(one.ecx, 12) /* FMA */ && has(one.ecx, 29) /* F16C */ && has(seven.ebx, 5);
}

bool cpu_has_avx512() {
  const Cpuid seven(7, 0);
  return cpu_has_avx2() && os_saves(0xE6) && has(seven.ebx, 16) /* F */ && has(seven.ebx, 17) /* DQ */ &&
         has(seven.ebx, 30) /* BW */ && has(seven.ebx, 31) /* VL */ && has(seven.ecx, 11) /* VNNI */;
}

bool cpu_has_vbmi() { return cpu_has_avx512() && has(Cpuid(7, 0).ecx, 1); }

// Linux hands out the 8 KiB tile state on request only; the permission holds for the process and its
// children.
bool request_tile_permission() {
  constexpr int kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
}

bool cpu_has_amx() {
  const Cpuid seven(7, 0);
  return cpu_has_vbmi() && os_saves(0x60000) && has(seven.edx, 24) /* TILE */ &&
         has(seven.edx, 25) /* INT8 */ && request_tile_permission();
}

Cpu detect_cpu() {
  const Cpuid vendor(0, 0);
  const bool amd = vendor.ebx == 0x68747541u && vendor.edx == 0x69746E65u && vendor.ecx == 0x444D4163u;
  const unsigned version = Cpuid(1, 0).eax, base = version >> 8 & 0xF;
  return amd && base == 0xF && base + (version >> 20 & 0xFF) >= 0x1A ? Cpu::kZen5 : Cpu::kAny;
}

bool detect(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return true;
    case Isa::kAvx2:
      return cpu_has_avx2();
    case Isa::kAvx512:
      return cpu_has_avx512();
    case Isa::kAmx:
      return cpu_has_amx();
    default:
      return false;
  }
}

#elif defined(__aarch64__)

bool cpu_has_vbmi() { return false; }

Cpu detect_cpu() { return Cpu::kAny; }

bool detect(Isa isa) {
  constexpr unsigned long kHwcapAsimdDotProduct = 1ul << 20;
  return isa == Isa::kScalar || (isa == Isa::kNeon && (getauxval(AT_HWCAP) & kHwcapAsimdDotProduct));
}

#else

bool cpu_has_vbmi() { return false; }

Cpu detect_cpu() { return Cpu::kAny; }

bool detect(Isa isa) { return isa == Isa::kScalar; }

#endif

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

Isa parse(const std::string& what, const std::string& name) {
  for (int i = 0; i < kIsaCount; ++i) {
    if (name != kNames[i]) continue;
    if (isa_available(static_cast<Isa>(i))) return static_cast<Isa>(i);
    throw std::runtime_error(what + ": this machine lacks it; it has " + join(available_isas()));
  }
  throw std::runtime_error(what + " is unknown; this machine has " + join(available_isas()));
}

std::atomic<int> g_selected{-1};

// Zen 5 does better when its prefetchers are left alone, and VPERMB gains nothing there.
std::atomic<Traits>& current_traits() {
  static std::atomic<Traits> traits{
      Traits{cpu_has_vbmi() && this_cpu() != Cpu::kZen5, this_cpu() != Cpu::kZen5}};
  return traits;
}

Isa choose() {
  const char* forced = std::getenv("LOWBIT_ISA");
  if (forced != nullptr && *forced != '\0') return parse(std::string("LOWBIT_ISA=") + forced, forced);
  for (int i = kIsaCount - 1; i > 0; --i) {
    if (isa_available(static_cast<Isa>(i))) return static_cast<Isa>(i);
  }
  return Isa::kScalar;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool isa_available(Isa isa) {
  static const auto found = [] {
    std::vector<bool> all;
    for (int i = 0; i < kIsaCount; ++i) all.push_back(detect(static_cast<Isa>(i)));
    return all;
  }();
  return found[static_cast<size_t>(isa)];
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < kIsaCount; ++i) {
    if (isa_available(static_cast<Isa>(i))) names.emplace_back(kNames[i]);
  }
  return names;
}

Isa selected_isa() {
  int isa = g_selected.load(std::memory_order_relaxed);
  if (isa < 0) g_selected = isa = static_cast<int>(choose());
  return static_cast<Isa>(isa);
}

Isa find_isa(const std::string& name) { return parse("isa " + name, name); }

void set_isa(const std::string& name) {
  g_selected = static_cast<int>(name.empty() ? choose() : find_isa(name));
}

Cpu this_cpu() {
  static const Cpu cpu = detect_cpu();
  return cpu;
}

Traits traits() { return current_traits().load(std::memory_order_relaxed); }

void set_traits(const Traits& wanted) {
  if (wanted.vbmi && !has_vbmi()) throw std::runtime_error("set_traits: this CPU lacks VBMI");
  current_traits() = wanted;
}

bool has_vbmi() { return cpu_has_vbmi(); }

}  // namespace lowbit
