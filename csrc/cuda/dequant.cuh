// Packed codes -> levels as packed 16-bit floats: the one dequantization of all CUDA kernels.
//
// AFFINE (level = a code + b). An fp16 number 1024 + m has m in its mantissa. A window of 8 bits (4 for bf16) holds
// 8/bits (4/bits) places; AND with the place's mask, OR with the exponent: one LOP3 gives 1024 + code * 2^p in both
// halves, one fused multiply-add by a * 2^-p the exact level. A rotation moves on to the next window. Per weight:
// 1/2 LOP3 + 1/2 HFMA2, and 1/16 (bf16: up to 1/4) rotations.
//
// LOOK-UP. Levels + 128 lie as bytes in registers; PRMT picks four at a time by the nibbles of its selector, which at 4
// bits are the codes themselves. Bytes become fp16 by PRMT into the mantissa of 1024 and one subtraction; bf16 has
// too few bits for that and goes through fp32 (as 8-bit codes do, whose byte is level + 128 already).
#pragma once

#include "layout.cuh"

namespace lowbit::gpu {

// What turns codes into levels, made by codebook() on the host and passed by value.
struct Codebook {
  uint32_t mul[8];     // by place in the window: a * 2^-p, twice
  uint32_t add[8];     // b - base * a * 2^-p, twice
  uint32_t levels[4];  // look-up: level + 128 of up to 16 codes
};

// Whether the affine path is exact: with |a| <= 4 every constant is an integer of at most 11 (fp16) or 8 (bf16) bits.
inline bool affine_is_exact(int a) { return a != 0 && -4 <= a && a <= 4; }

template <class T>
inline Codebook codebook(T type, int bits, const int8_t* level) {
  Codebook book{};
  if (bits == 8) return book;
  const int a = level[1] - level[0], b = level[0];
  for (int j = 0; j < T::kWindow / bits; ++j) {
    const double step = std::ldexp(static_cast<double>(a), -(T::kFirst + bits * j));
    book.mul[j] = pack_portable(type, static_cast<float>(step), static_cast<float>(step));
    const float add = static_cast<float>(b - T::kBase * step);
    book.add[j] = pack_portable(type, add, add);
  }
  for (int c = 0; c < 16; ++c) {
    const uint32_t byte = static_cast<uint32_t>(level[c % (1 << bits)] + 128);
    book.levels[c / 4] |= byte << (8 * (c % 4));
  }
  return book;
}

// Pair `i` of a word, affine.
template <int kBits, class T>
LOWBIT_HD uint32_t affine_pair(uint32_t word, int i, const Codebook& book) {
  const int window = i * kBits / T::kWindow, j = i % (T::kWindow / kBits), at = T::kFirst + kBits * j;
  const uint32_t mask = ((1u << kBits) - 1u) * 0x00010001u << at;
  const uint32_t turned = rotate_right(word, (32 + rotation(kBits) - T::kFirst + window * T::kWindow) % 32);
  return fma2(T{}, and_or(turned, mask, T::kMagic), book.mul[j], book.add[j]);
}

// Bytes i and j of `bytes`, minus 128.
LOWBIT_HD uint32_t pair_of_bytes(Fp16 type, uint32_t bytes, uint32_t i, uint32_t j) {
  constexpr uint32_t kMinus1152 = 0xE480E480u;
  return fma2(type, permute_bytes(bytes, 0x64646464u, i | 4u << 4 | j << 8 | 4u << 12), Fp16::kOne,
              kMinus1152);
}
LOWBIT_HD uint32_t pair_of_bytes(Bf16 type, uint32_t bytes, uint32_t i, uint32_t j) {
  constexpr uint32_t kTwo23 = 0x4B000000u;
  constexpr float kShift = 8388608.0f + 128.0f;
  const float low = as_float(permute_bytes(bytes, kTwo23, 0x7440u | i)) - kShift;
  return pack2(type, low, as_float(permute_bytes(bytes, kTwo23, 0x7440u | j)) - kShift);
}

// Levels + 128 of the four codes in nibbles of the low 16 bits.
template <int kBits>
LOWBIT_HD uint32_t lookup_four(uint32_t nibbles, const Codebook& book) {
  if constexpr (kBits == 2) {
    return permute_bytes(book.levels[0], book.levels[0], nibbles & 0x3333u);
  } else {
    const uint32_t low = permute_bytes(book.levels[0], book.levels[1], nibbles & 0x7777u);
    const uint32_t high = permute_bytes(book.levels[2], book.levels[3], nibbles & 0x7777u);
    return permute_bytes(low, high,
                         and_or(nibbles >> 1, 0x4444u, 0x3210u));  // byte j of high where bit 3 is set
  }
}

// All pairs of one word by look-up. `out` [places(kBits)].
template <int kBits, class T>
LOWBIT_HD void lookup_word(uint32_t word, const Codebook& book, uint32_t* out) {
  const uint32_t u = rotate_right(word, rotation(kBits));
  constexpr int kStride = 4 / kBits;  // at 2 bits the even places are nibbles, then the odd ones
  LOWBIT_UNROLL
  for (int first = 0; first < kStride; ++first) {
    const uint32_t nibbles = first ? u >> 2 : u;
    const uint32_t low = lookup_four<kBits>(nibbles, book), high = lookup_four<kBits>(nibbles >> 16, book);
    LOWBIT_UNROLL
    for (int j = 0; j < 4; j += 2) {
      const uint32_t bytes = permute_bytes(low, high, j ? 0x7362u : 0x5140u);
      out[first + kStride * j] = pair_of_bytes(T{}, bytes, 0, 1);
      out[first + kStride * (j + 1)] = pair_of_bytes(T{}, bytes, 2, 3);
    }
  }
}

// Words that hold half a chunk of one tile: at 1 bit both halves share one.
LOWBIT_HD constexpr int half_words(int bits) { return bits > 1 ? bits / 2 : 1; }

// Levels of half a chunk of one tile: the pairs 8 * half .. 8 * half + 7 of a lane, from the half_words(kBits) words that
// hold them -> out [8], the left operands of two mma.
template <int kBits, bool kLookup, class T>
LOWBIT_HD void unpack_half(const uint32_t* words, int half, const Codebook& book, uint32_t* out) {
  static_assert(!kLookup || kBits == 2 || kBits == 4, "only 2 and 4 bits have tables that are not affine");
  if constexpr (kBits == 8) {
    LOWBIT_UNROLL
    for (int i = 0; i < 8; ++i) out[i] = pair_of_bytes(T{}, words[i / 2], i % 2, i % 2 + 2);
  } else if constexpr (kLookup) {
    LOWBIT_UNROLL
    for (int i = 0; i < 8; i += places(kBits)) lookup_word<kBits, T>(words[i / places(kBits)], book, out + i);
  } else {
    const int first = kBits == 1 ? 8 * half : 0;
    LOWBIT_UNROLL
    for (int i = 0; i < 8; ++i) {
      out[i] = affine_pair<kBits, T>(words[i / places(kBits)], (first + i) % places(kBits), book);
    }
  }
}

}  // namespace lowbit::gpu
