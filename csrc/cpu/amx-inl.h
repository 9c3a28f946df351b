// One-instruction helpers of AMX: 8 tile registers of 16 rows x 64 bytes.
//
// Own assembly instead of the intrinsics: GCC's have no memory clobber, and up to version 12 its
// _tile_loadconfig claims to read 8 of the 64 bytes, so that the stores to the others are deleted. The operands
// name the kilobyte that is read or written, so that the compiler orders plain loads and stores around them.
#pragma once

#include <cstdint>

#include "../layout.h"

namespace lowbit {
namespace {

constexpr int kTileBytes = 1024, kTileRows = 16;

struct TileBytes {
  uint8_t byte[kTileBytes];
};

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64, "LDTILECFG reads 64 bytes");

LOWBIT_INLINE void load_config(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config)); }
LOWBIT_INLINE void release_tiles() { __asm__ volatile("tilerelease"); }

template <int kTile>
LOWBIT_INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
LOWBIT_INLINE void tile_load(const void* p) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(64L), "i"(kTile),
                   "m"(*static_cast<const TileBytes*>(p)));
}
// The same for a tile that is not needed again soon: the hint keeps it from displacing others in L1.
template <int kTile>
LOWBIT_INLINE void tile_stream(const void* p) {
  __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(64L), "i"(kTile),
                   "m"(*static_cast<const TileBytes*>(p)));
}
template <int kTile>
LOWBIT_INLINE void tile_store(void* p) {
  __asm__ volatile("tilestored %%tmm%c3, (%1,%2,1)"
                   : "=m"(*static_cast<TileBytes*>(p))
                   : "r"(p), "r"(64L), "i"(kTile));
}
template <int kC, int kA, int kB, bool kUnsignedB = false>
LOWBIT_INLINE void tile_dot() {  // A is signed
  if constexpr (kUnsignedB) {
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
  } else {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
  }
}

}  // namespace
}  // namespace lowbit
