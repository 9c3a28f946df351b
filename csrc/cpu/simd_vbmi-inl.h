// AVX-512 with VBMI, for look-up tables: VPERMB takes the low six bits of a byte as its index and ignores the others.
// A table that repeats itself needs no mask, and one whose entries are repeated needs no shift either. All codes arrive
// at the bottom of their bytes, so that sums need no shift where a span ends: at 1 bit and with short spans that outweighs
// a mask's smaller cost, and affine levels are looked up too.
#pragma once

#include "simd_avx512-inl.h"

namespace lowbit {
namespace {

struct Avx512Vbmi : Avx512 {
  struct Lut {
    Bytes at[6];  // for a code that stands at this bit
  };
  static constexpr bool kLooksUpPacked = true;

  static Lut load_lut(const int8_t* levels) {
    const Bytes table = Avx512::load_lut(levels);
    alignas(kAlign) uint8_t index[64];
    for (int i = 0; i < 64; ++i) index[i] = static_cast<uint8_t>(i);
    // Shifted in pairs: what comes from the next byte lands where neither VPERMB nor the table (which repeats itself
    // after as many entries as codes have values) tells it apart.
    const Bytes count = load(index);
    Lut lut;
    unroll<6>([&](auto bit) LOWBIT_LAMBDA {
      lut.at[bit] = _mm512_permutexvar_epi8(_mm512_srli_epi16(count, bit), table);
    });
    return lut;
  }

  template <int kBits, int kRow>
  static Bytes lookup_packed(Bytes x, const Lut& lut) {
    constexpr int kBit = kBits * kRow;
    if constexpr (kBit + kBits <= 6) {
      return _mm512_permutexvar_epi8(x, lut.at[kBit]);
    } else {
      return _mm512_permutexvar_epi8(_mm512_srli_epi16(x, 2), lut.at[kBit - 2]);
    }
  }
};

// For short spans: fewer sums to add up at their ends, and four streams that share what is done once.
struct Avx512VbmiShort : Avx512Vbmi {
  static constexpr int kAccumulators = 8;
  static constexpr int blocks(int rows, int /*positions*/) { return rows == 1 ? 4 : 2; }
};

}  // namespace
}  // namespace lowbit
