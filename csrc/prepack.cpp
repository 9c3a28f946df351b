#include "prepack.h"

#include <cstring>

namespace lowbit {
namespace {

// Exchanges the bits of x under mask with those `shift` places higher.
inline uint32_t swap_bits(uint32_t x, uint32_t mask, int shift) {
  const uint32_t t = (x ^ (x >> shift)) & mask;
  return x ^ t ^ (t << shift);
}

// Both layouts hold the codes k = 4Pv .. 4P(v+1) of one output in one 32-bit word, P = 8 / bits: canonical in
// the order of k = 4i + j, prepacked in the order (j, i). So prepacking is one bit permutation a word.
template <int kBits>
uint32_t permute_word(uint32_t x);

template <>
uint32_t permute_word<8>(uint32_t x) {
  return x;
}

template <>
uint32_t permute_word<4>(uint32_t x) {  // nibbles 2 x 4 -> 4 x 2: a perfect shuffle
  x = swap_bits(x, 0x0000FF00u, 8);
  return swap_bits(x, 0x00F000F0u, 4);
}

template <>
uint32_t permute_word<2>(uint32_t x) {  // pairs of bits 4 x 4: a transposition
  x = swap_bits(x, 0x00CC00CCu, 6);
  return swap_bits(x, 0x0000F0F0u, 12);
}

inline uint32_t unshuffle(uint32_t x) {  // even bits to the low half, odd bits to the high half
  x = swap_bits(x, 0x22222222u, 1);
  x = swap_bits(x, 0x0C0C0C0Cu, 2);
  x = swap_bits(x, 0x00F000F0u, 4);
  return swap_bits(x, 0x0000FF00u, 8);
}

template <>
uint32_t permute_word<1>(uint32_t x) {  // bits 8 x 4 -> 4 x 8
  return unshuffle(unshuffle(x));
}

template <int kBits>
void prepack_block(const uint8_t* rows, int64_t row_bytes, int64_t words, int outputs, uint8_t* out) {
  std::memset(out, 0, static_cast<size_t>(words) * kVectorBytes);
  const int64_t whole = row_bytes / 4;
  for (int o = 0; o < outputs; ++o) {
    const uint8_t* row = rows + o * row_bytes;
    uint8_t* to = out + 4 * o;
    for (int64_t v = 0; v < whole; ++v) {
      uint32_t word;
      std::memcpy(&word, row + 4 * v, 4);
      word = permute_word<kBits>(word);
      std::memcpy(to + v * kVectorBytes, &word, 4);
    }
    if (const int64_t rest = row_bytes - 4 * whole) {
      uint32_t word = 0;
      std::memcpy(&word, row + 4 * whole, static_cast<size_t>(rest));
      word = permute_word<kBits>(word);
      std::memcpy(to + whole * kVectorBytes, &word, 4);
    }
  }
}

int level_of(const Matrix& w, int code) { return w.lookup ? w.levels[code] : w.a * code + w.b; }

}  // namespace

void prepack_tiles(const uint8_t* rows, int64_t n, int64_t k, int bits, uint8_t* tiles) {
  const int64_t row_bytes = ceil_div(k * bits, 8);
  const int64_t words = ceil_div(k, kTileK) * vectors_per_tile(bits);  // vectors a block
  const auto block = bits == 1   ? prepack_block<1>
                     : bits == 2 ? prepack_block<2>
                     : bits == 4 ? prepack_block<4>
                                 : prepack_block<8>;
  for (int64_t first = 0; first < n; first += kTileN) {
    const int outputs = static_cast<int>(n - first < kTileN ? n - first : kTileN);
    block(rows + first * row_bytes, row_bytes, words, outputs, tiles + first / kTileN * words * kVectorBytes);
  }
}

void prepack_scales(const uint16_t* groups, int64_t n, int64_t k, int64_t group, int64_t span,
                    uint16_t* scales) {
  const int64_t per_row = ceil_div(k, group), spans = ceil_div(k, span);
  std::memset(scales, 0, static_cast<size_t>(ceil_div(n, kTileN) * spans * kTileN) * sizeof(uint16_t));
  for (int64_t row = 0; row < n; ++row) {
    for (int64_t s = 0; s < spans; ++s) {
      scales[(row / kTileN * spans + s) * kTileN + row % kTileN] = groups[row * per_row + s * span / group];
    }
  }
}

int64_t span_of(int64_t k, int64_t group) {
  if (group >= k) return k <= kMaxSpan ? k : kMaxSpan;
  const int64_t tiles = group / kTileK;
  int64_t parts = ceil_div(group, kMaxSpan);
  while (tiles % parts != 0) ++parts;  // ends at one tile a part
  return group / parts;
}

namespace {

// Inputs [begin, end) of an output whose codes lie in `words`, one 32-bit word a vector; begin is a multiple of a tile.
template <int kBits>
void dequantize_span(const uint8_t* words, const float* levels, int64_t begin, int64_t end, float* out) {
  constexpr int kInputs = 4 * positions(kBits), kMask = (1 << kBits) - 1;
  for (int64_t k = begin; k < end; k += kInputs) {
    uint32_t word;
    std::memcpy(&word, words + k / kInputs * kVectorBytes, 4);
    const auto value = [&](int i) { return levels[word >> (i % 4 * 8 + i / 4 * kBits) & kMask]; };
    if (end - k >= kInputs) {
      for (int i = 0; i < kInputs; ++i) out[k + i] = value(i);
    } else {
      for (int i = 0; i < end - k; ++i) out[k + i] = value(i);
    }
  }
}

}  // namespace

void dequantize_rows(const Matrix& w, const int64_t* ids, int64_t count, float* out) {
  const auto span = w.bits == 1   ? dequantize_span<1>
                    : w.bits == 2 ? dequantize_span<2>
                    : w.bits == 4 ? dequantize_span<4>
                                  : dequantize_span<8>;
  const int codes = 1 << w.bits;
  for (int64_t i = 0; i < count; ++i, out += w.k) {
    const int64_t block = ids[i] / kTileN, lane = ids[i] % kTileN;
    const uint16_t* scale = w.scales + block * w.spans() * kTileN + lane;
    for (int64_t first = 0; first < w.k; first += w.span, scale += kTileN) {
      const float s = half_to_float(*scale);
      float levels[256];
      for (int c = 0; c < codes; ++c) levels[c] = s * static_cast<float>(level_of(w, c));
      const int64_t end = first + w.span < w.k ? first + w.span : w.k;
      span(w.tiles + block * w.block_bytes() + 4 * lane, levels, first, end, out);
    }
  }
}

float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = half >> 10 & 31u, fraction = half & 0x3FFu;
  if (exponent == 0) {  // zero and subnormal: fraction * 2^-24
    const float value = static_cast<float>(fraction) * 5.9604644775390625e-8f;
    return sign ? -value : value;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | fraction << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

}  // namespace lowbit
