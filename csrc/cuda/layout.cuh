// The GPU layout of a quantized matrix W[N, K]: codes in the order of tensor-core fragments.
//
// CHUNKS AND TILES. K is cut into chunks of 64 inputs, N into tiles of 16 outputs. A warp multiplies a tile and a
// chunk by four mma.m16n8k16 with the weights as the left operand. Lane 4g + t holds the outputs g and g + 8
// and the inputs 16t .. 16t + 15 of the chunk, 32 codes. Which input meets which column of an mma is free as long
// as the activations agree, so that step s, half h, element e of lane t is
//
//     input  k = 16t + 4s + 2h + e          s = 0..3 (mma), h = 0..1 (register pair), e = 0..1 (half of a register)
//
// and the activations that a lane needs for the four steps are 16 consecutive ones: two 16-byte loads.
//
// WORDS. A lane's 32 codes are 16 pairs (e = 0, 1), pair P = 4s + 2h + (output is g + 8), in `bits` 32-bit words:
//
//     word P / (16/b), place i = P % (16/b):     u = | code e=1, place 16/b-1 | ... | place 0 | code e=0, ... | place 0 |
//                                           bit   31                             16 15                        0
//
// code(place i, e) lies in bits [b i + 16 e, b i + 16 e + b) of u, and u is stored rotated left by 2 (b < 8): the
// low window of each half then lies at bits 2..9, where OR-ing the exponent of 1024 makes it an fp16 number
// without a shift and with all constants of the affine map exact (dequant.cuh).
//
// VECTORS. Four words of a lane are a 16-byte vector, 32 lanes a run of 512 bytes: what one warp-wide load brings. At
// 1 bit the four words are four tiles, at 2 bits two tiles of two words, at 4 bits a tile, at 8 bits half of one:
//
//     b            1     2     4     8
//     block_rows  64    32    16    16     outputs whose words share vectors: a block
//     vectors      1     1     1     2     of a block and a chunk
//
//     codes  uint8 [N_pad / block_rows][chunks][vectors][32 lanes][16 bytes]       N_pad = N rounded up to 64
//
// so that a warp which walks along K reads one contiguous run per block. Code 0 pads N and K.
//
// SCALES  fp16 [groups][N_pad], zero past N.
#pragma once

#include "ptx.cuh"

namespace lowbit::gpu {

constexpr int kChunk = 64;       // inputs
constexpr int kTile = 16;        // outputs
constexpr int kRowPad = 64;      // N is padded to a multiple
constexpr int kPairs = 16;       // of codes in a lane, a tile and a chunk
constexpr int kVectorWords = 4;  // 32-bit words of a lane's 16-byte vector

LOWBIT_HD constexpr int block_rows(int bits) { return bits == 1 ? 64 : bits == 2 ? 32 : 16; }
LOWBIT_HD constexpr int block_tiles(int bits) { return block_rows(bits) / kTile; }
LOWBIT_HD constexpr int vectors(int bits) { return bits == 8 ? 2 : 1; }
LOWBIT_HD constexpr int places(int bits) { return kPairs / bits; }  // pairs in a word
LOWBIT_HD constexpr int rotation(int bits) { return bits < 8 ? 2 : 0; }

static_assert(block_tiles(1) * 1 == kVectorWords * vectors(1), "a block and a chunk are whole vectors");
static_assert(block_tiles(2) * 2 == kVectorWords * vectors(2), "a block and a chunk are whole vectors");
static_assert(block_tiles(4) * 4 == kVectorWords * vectors(4), "a block and a chunk are whole vectors");
static_assert(block_tiles(8) * 8 == kVectorWords * vectors(8), "a block and a chunk are whole vectors");

// Index, in 16-byte units, of lane 0 of vector v of (block, chunk).
LOWBIT_HD constexpr int64_t vector_index(int bits, int64_t block, int64_t chunk, int v, int64_t chunks) {
  return ((block * chunks + chunk) * vectors(bits) + v) * 32;
}

// Where a code lies: 32-bit word in the whole array, and its lowest bit there (a code may wrap around the word).
struct Place {
  int64_t word;
  int bit;
};

LOWBIT_HD constexpr Place place_of(int bits, int64_t n, int64_t k, int64_t chunks) {
  const int row = static_cast<int>(n % kTile), in = static_cast<int>(k % kChunk);
  const int lane = row % 8 * 4 + in / 16;
  const int pair = in % 16 / 4 * 4 + in % 4 / 2 * 2 + row / 8;
  const int word =
      static_cast<int>(n % block_rows(bits)) / kTile * bits + pair / places(bits);  // of the lane
  const int64_t vector =
      vector_index(bits, n / block_rows(bits), k / kChunk, word / kVectorWords, chunks) + lane;
  const int bit = pair % places(bits) * bits + in % 2 * 16 + rotation(bits);
  return {vector * kVectorWords + word % kVectorWords, bit % 32};
}

LOWBIT_HD constexpr uint32_t code_in(int bits, uint32_t word, int bit) {
  return (bit ? word >> bit | word << (32 - bit) : word) & ((1u << bits) - 1u);
}

}  // namespace lowbit::gpu
