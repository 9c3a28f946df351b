// Attention in integers, where a CPU has tiles for them: sums are exact in any order, so that a query gets the same
// bits alone and among others, wherever its tokens stand.
//
// A head's query, key or value x[dim] is held as two digits, x ~ scale * (128 high + low), |128 high + low| <= 16256,
// and so are the weights of attention. Of a product of two such numbers high * high and high * low are kept: what is
// left out is as small as the rounding.
//
//   score = scale_q scale_k (high_q high_k 2^14 + (high_q low_k + low_q high_k) 2^7)
//   out   = sum of weight * value / sum of e^(score - top), both sums in integers
#pragma once

#include <cstdint>

#include "../layout.h"
#include "isa.h"
#include "qlinear.h"

namespace lowbit {

// What is kept of a token in a layer: for every head rows of key high, key low, value high and value low, each of whole
// 64 bytes; then for every head the scales of key and value. Values go in the order in which packing 32-bit
// integers to bytes leaves them: dwords of 64 bytes as a transposed 4 x 4 matrix.
struct DigitRecord {
  int64_t heads = 0, dim = 0;

  int64_t row() const { return ceil_div(dim, kTileK) * kTileK; }
  int64_t head(int64_t h) const { return h * 4 * row(); }
  int64_t scales(int64_t h) const { return head(heads) + h * 2 * static_cast<int64_t>(sizeof(float)); }
  // An odd number of cache lines: rows of neighbours fall into different sets of the L1 cache.
  int64_t bytes() const { return (ceil_div(scales(heads), kAlign) | 1) * kAlign; }
};

// One head of some queries, each over tokens of its own. The record of token j begins `offset` bytes after slots[j].
struct DigitHead {
  DigitRecord record;
  int64_t head = 0, offset = 0;
  int sum_bits = 0;      // e^(score - top) counts in units of 2^-sum_bits
  float scale = 1;       // of the queries
  float* q = nullptr;    // [queries, dim], becomes the output
  int64_t q_stride = 0;  // floats
  int64_t queries = 0;
  float* const* slots = nullptr;
  int64_t tokens = 0;
  // Queries [16 b, 16 b + 16) see tokens of the blocks [16 t, 16 t + 16), t = blocks[first[b]] and following: query
  // 16 b + i the tokens of masks[16 entry + i]. One that sees none is not touched.
  const int64_t* first = nullptr;
  const int32_t* blocks = nullptr;
  const uint16_t* masks = nullptr;
  const uint8_t* used = nullptr;  // 0 for blocks of tokens that no query sees
  int64_t most_blocks = 0;
};

struct DigitOps {
  // Digits of a head's keys and values, of up to 16 tokens whose rows lie `stride` floats apart.
  void (*keep)(const DigitHead& to, const float* k, const float* v, int64_t stride, int count);
  // The one query over all tokens.
  void (*attend)(const DigitHead& head, uint8_t* room);
  // Queries [16 blocks.begin, 16 blocks.end).
  void (*attend_together)(const DigitHead& head, Range blocks, uint8_t* room);
  // Bytes that both need.
  int64_t (*room)(const DigitHead& head);
};

// Null where an instruction set has none.
const DigitOps* digit_ops(Isa isa);

// So many that the sum over a context cannot overflow.
inline int sum_bits(int64_t max_len) {
  int bits = 20;
  while (bits > 0 && max_len >> (30 - bits) != 0) --bits;
  return bits;
}

extern const DigitOps kAmxDigitOps;  // forward_digits_amx.cpp

}  // namespace lowbit
