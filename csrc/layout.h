// The bit layouts of a quantized matrix W[N, K]: codes of b = 1, 2, 4 or 8 bits, w = scale * level[code].
//
// CANONICAL (files; lowbit/bitpack.py). Row by row, little-endian within the byte, rows of whole bytes:
//
//     bit offset of code(n, k) in row n  =  k * b            row n starts at byte n * ceil(K * b / 8)
//
// PREPACKED (memory; one layout for every instruction set, made by prepack.h, never saved). W is cut into
// tiles of 16 outputs x 64 inputs, zero codes padding the edges. Tiles follow each other along K, then
// along N:
//
//     tile(block, t)  at byte  (block * tiles + t) * 128 * b           block = n / 16, t = k / 64
//
// A tile is 16 rows of 64 bytes before packing. Row r holds the inputs k = 4r .. 4r + 3 of all 16 outputs:
//
//     byte       0    1    2    3  |  4    5    6    7  | ...  | 60   61   62   63
//     output n   0    0    0    0  |  1    1    1    1  | ...  | 15   15   15   15
//     input k  4r  4r+1 4r+2 4r+3  | 4r  4r+1 4r+2 4r+3 | ...  | 4r  4r+1 4r+2 4r+3
//
// which is the operand of VPDPBUSD / SDOT for one broadcast quadruple of activations (16 outputs in 16 int32
// lanes: no horizontal sums), and row r of an AMX B tile. At b bits one 64-byte vector holds P = 8 / b
// consecutive rows; row i of the vector sits in bits [i * b, (i + 1) * b) of every byte:
//
//     b = 4, vector v:   byte = | row 2v+1 : 4 | row 2v : 4 |                                8 vectors a tile
//     b = 2, vector v:   byte = | row 4v+3 : 2 | row 4v+2 : 2 | row 4v+1 : 2 | row 4v : 2 |  4 vectors a tile
//     b = 1, vector v:   byte = | row 8v+7 : 1 |            ...            | row 8v : 1 |    2 vectors a tile
//
// Because a block's vectors are contiguous over all its tiles, a kernel walks one linear sequence: vector v
// of a block meets the activations x[4 * P * v .. 4 * P * (v + 1)).
//
// SCALES. fp16 bits, [block][span][16 outputs]. A span is the run of inputs that shares one scale and one
// int32 accumulator: the group, or a part of it where the group exceeds kMaxSpan (then the scale is
// repeated).
#pragma once

#include <cstdint>

// Always inlined: files compiled for AVX-512 include this header too, and a merged out-of-line copy of theirs
// could run on a machine without it.
#if defined(LOWBIT_SANITIZED)
// Instrumented, functions this large take a compiler minutes and gigabytes. These builds run on the machine that
// made them, so that it does not matter which copy the linker keeps.
#define LOWBIT_INLINE inline
#define LOWBIT_LAMBDA
#else
#define LOWBIT_INLINE inline __attribute__((always_inline))
#define LOWBIT_LAMBDA __attribute__((always_inline))
#endif

namespace lowbit {

constexpr int kTileN = 16;           // outputs a tile
constexpr int kTileK = 64;           // inputs a tile
constexpr int kVectorBytes = 64;     // bytes a vector: 16 outputs x 4 inputs
constexpr int kAlign = 64;           // of tiles, scales and workspaces
constexpr int64_t kMaxSpan = 65536;  // 255 * 127 * 65536 < 2^31: the accumulator of a span cannot overflow

LOWBIT_INLINE constexpr int positions(int bits) { return 8 / bits; }  // rows in a vector
LOWBIT_INLINE constexpr int vectors_per_tile(int bits) { return 2 * bits; }
LOWBIT_INLINE constexpr int tile_bytes(int bits) { return 128 * bits; }

static_assert(vectors_per_tile(4) * positions(4) * 4 == kTileK, "a tile holds 64 inputs");
static_assert(vectors_per_tile(1) * kVectorBytes == tile_bytes(1), "a tile is whole vectors");
static_assert(tile_bytes(8) == kTileN * kTileK, "8-bit tiles are plain bytes");
static_assert(255LL * 127 * kMaxSpan < (1LL << 31), "int32 accumulation is exact over a span");

LOWBIT_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A prepacked matrix. Plain pointers: the caller owns the memory and has checked the sizes.
struct Matrix {
  const uint8_t* tiles = nullptr;    // [blocks][tiles][tile_bytes], 64-byte aligned
  const uint16_t* scales = nullptr;  // [blocks][spans][16] fp16 bits, 64-byte aligned
  const int8_t* levels = nullptr;    // [16] for bits <= 4 (2^bits entries, repeated); unused at 8 bits
  int64_t n = 0, k = 0;
  int64_t span = 0;  // inputs a scale; a multiple of 64, or >= k
  int bits = 0;
  bool lookup = false;   // levels are not affine in the code
  int32_t a = 0, b = 0;  // level = a * code + b where !lookup

  LOWBIT_INLINE int64_t blocks() const { return ceil_div(n, kTileN); }
  LOWBIT_INLINE int64_t tiles_k() const { return ceil_div(k, kTileK); }
  LOWBIT_INLINE int64_t spans() const { return ceil_div(k, span); }
  LOWBIT_INLINE int64_t span_tiles() const { return span < k ? span / kTileK : tiles_k(); }
  LOWBIT_INLINE int64_t block_bytes() const { return tiles_k() * tile_bytes(bits); }
};

}  // namespace lowbit
