// AVX-512 with VBMI, for look-up tables: VPERMB takes the low six bits of a byte as its index and ignores the others.
// A table that repeats itself needs no mask, and one whose entries are repeated needs no shift either.
#pragma once

#include "simd_avx512-inl.h"

namespace lowbit {
namespace {

struct Avx512Vbmi : Avx512 {
  struct Lut {
    Bytes at[3];  // for a code that stands at bit 0, 2 or 4
  };
  static constexpr bool kLooksUpPacked = true;

  static Lut load_lut(const int8_t* levels) {
    const Bytes table = Avx512::load_lut(levels);
    alignas(kAlign) uint8_t index[64];
    for (int i = 0; i < 64; ++i) index[i] = static_cast<uint8_t>(i);
    // Shifted in pairs: what comes from the next byte lands where neither VPERMB nor the table tells it apart.
    const Bytes count = load(index);
    return {{table, _mm512_permutexvar_epi8(_mm512_srli_epi16(count, 2), table),
             _mm512_permutexvar_epi8(_mm512_srli_epi16(count, 4), table)}};
  }

  template <int kBits, int kRow>
  static Bytes lookup_packed(Bytes x, const Lut& lut) {
    constexpr int kBit = kBits * kRow;
    if constexpr (kBit + kBits <= 6) {
      return _mm512_permutexvar_epi8(x, lut.at[kBit / 2]);
    } else {
      return _mm512_permutexvar_epi8(_mm512_srli_epi16(x, kBit), lut.at[0]);
    }
  }
};

}  // namespace
}  // namespace lowbit
