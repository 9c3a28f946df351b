// What the tile kernel does beside its products, in small steps that hide behind them: fetching and unpacking weights
// before, scaling and storing sums after.
#pragma once

#include "amx-inl.h"
#include "qlinear-inl.h"
#include "simd_avx512-inl.h"

namespace lowbit {
namespace {

constexpr int kChunkTiles = 12;  // of two blocks: 24 KiB, half of L1
// Accumulators of a pair of row groups lie as [2 blocks][32 rows][16].
constexpr int kPairRows = 2 * kTileRows;
constexpr int64_t kPairBytes = 4 * kTileBytes, kHalfBytes = 2 * kTileBytes;

// Consecutive inputs of two blocks, unpacked at a time: whole spans, or a part of one.
struct Chunk {
  int64_t block, tile, tiles;
  int64_t span, begin;  // the span of its first tile, and where that begins
};

// The chunks of a matrix, along K, then along N: as many whole spans as fit `most` tiles, or nearly equal parts of one.
// One division here spares several of every chunk, which may be but eight steps long.
class Cutter {
 public:
  Cutter(const Matrix& w, int64_t most) : tiles_(w.tiles_k()), span_(w.span_tiles()) {
    whole_ = most / span_;
    part_ = whole_ > 0 ? whole_ * span_ : ceil_div(span_, ceil_div(span_, most));
  }
  Chunk first(int64_t block) const { return {block, 0, least(part_, tiles_), 0, 0}; }
  Chunk after(Chunk chunk) const {
    chunk.tile += chunk.tiles;
    if (chunk.tile == tiles_) return first(chunk.block + 2);
    if (whole_ > 0 || chunk.tile == chunk.begin + span_) {
      chunk.span += whole_ > 0 ? whole_ : 1;
      chunk.begin = chunk.tile;
    }
    const int64_t end = whole_ > 0 ? tiles_ : least(tiles_, chunk.begin + span_);
    chunk.tiles = least(part_, end - chunk.tile);
    return chunk;
  }

 private:
  const int64_t tiles_, span_;
  int64_t whole_, part_;  // spans and tiles of a chunk
};

// What is summed in int32 without a break: the tiles of one span in a chunk against a pair of row groups.
struct Segment {
  int64_t block, row, span;
  int row_groups, blocks;  // 1 or 2 of each; 0: none
  bool first, last;        // of its span
  uint8_t* c;              // where its accumulators go, [2 blocks][32 rows][16]
  uint8_t* sums;           // fp32 sums of the spans before, likewise
};

// Packed tiles of block j of a chunk; where `blocks` is 1, the first stands in for the second.
const uint8_t* packed(const Matrix& w, const Chunk& chunk, int j, int blocks) {
  return w.tiles + (chunk.block + (j < blocks ? j : 0)) * w.block_bytes() + chunk.tile * tile_bytes(w.bits);
}

struct Scratch {
  uint8_t* b;     // the unpacked chunk: [2 blocks][kChunkTiles] tiles
  uint8_t* c;     // int32 accumulators of every pair of row groups
  uint8_t* sums;  // fp32 sums of all spans so far, likewise

  static int64_t bytes(int64_t pairs) { return 2 * kChunkTiles * kTileBytes + 2 * pairs * kPairBytes; }
  Scratch(uint8_t* at, int64_t pairs)
      : b(at), c(at + 2 * kChunkTiles * kTileBytes), sums(c + pairs * kPairBytes) {}
};

// Unpacks a chunk to signed levels.
template <int kBits>
class Unpacker {
 public:
  explicit Unpacker(const Matrix& w)
      : w_(w), lut_(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.levels)))) {}

  void start(const Chunk& chunk, int blocks) {
    for (int j = 0; j < 2; ++j) from_[j] = packed(w_, chunk, j, blocks);
    tiles_ = chunk.tiles;
  }
  int64_t tiles() const { return tiles_; }

  // Tile t of block j.
  LOWBIT_INLINE void tile(int j, int64_t t, uint8_t* b) const {
    const uint8_t* from = from_[j] + t * kPacked;
    uint8_t* to = b + (j * kChunkTiles + t) * kTileBytes;
    const __m512i lut = lut_;
    for (int v = 0; v < vectors_per_tile(kBits); ++v, from += kVectorBytes) {
      const __m512i raw = Avx512::load(from);
      unroll<positions(kBits)>([&](auto i) LOWBIT_LAMBDA {
        Avx512::store(to, level<decltype(i)::value>(raw, lut));
        to += kVectorBytes;
      });
    }
  }

 private:
  static constexpr int64_t kPacked = tile_bytes(kBits);

  // VPERMB reads the low 6 bits of its index: with the table repeated, the code needs no mask.
  template <int kRow>
  static LOWBIT_INLINE __m512i level(__m512i raw, __m512i lut) {
    return _mm512_permutexvar_epi8(kRow == 0 ? raw : _mm512_srli_epi16(raw, kRow * kBits), lut);
  }

  const Matrix& w_;
  const __m512i lut_;
  const uint8_t* from_[2];
  int64_t tiles_;
};

// Turns the accumulators of a complete span into outputs, a few rows at a time:
// y = bias + sum over spans of scale * sx * C. kCodes: C are sums of codes, 128 above their levels.
// Its loop is called, not inlined among tile instructions, where the compiler ran out of registers and moved strides
// and sums through vector and mask registers: that took longer than the products.
template <bool kCodes>
class Folder {
 public:
  Folder(const Job& job, int64_t rows_end) : job_(job), rows_end_(rows_end), spans_(job.w.spans()) {}

  void start(const Segment& s) {
    const Matrix& w = job_.w;
    const int64_t at = s.row * spans_ + s.span;
    left_ = least(rows_end_ - s.row, kPairRows);
    done_ = 0;
    const bool last = s.span + 1 == spans_;
    fold_ = s.span == 0 ? fold<true>(last) : fold<false>(last);
    c_ = s.c;
    sums_ = s.sums;
    sx_ = job_.act.scale + at;
    sum_ = job_.act.sum + at;
    y_ = job_.y + s.row * job_.y_stride + s.block * kTileN;
    if (s.block == block_ && s.span == span_) return;  // as for the rows before
    block_ = s.block;
    span_ = s.span;
    for (int j = 0; j < 2; ++j) {
      const int64_t block = least(s.block + j, w.blocks() - 1);
      Avx512::store_f32(scale_[j], Avx512::load_half(w.scales + (block * spans_ + s.span) * kTileN), kTileN);
      Avx512::store_f32(bias_[j], load_bias<Avx512>(job_, block), kTileN);
      const int64_t count = least(kTileN, w.n - block * kTileN);
      mask_[j] = Avx512::first(j < s.blocks ? static_cast<int>(count) : 0);
    }
  }

  LOWBIT_INLINE void step(int64_t quota) {
    quota = least(quota, left_);
    if (quota <= 0) return;
    left_ -= quota;
    (this->*fold_)(quota);
  }

 private:
  using Fold = void (Folder::*)(int64_t);

  template <bool kFirst>
  Fold fold(bool last) const {
    if (!last) return &Folder::rows<kFirst, false, kNoActivation>;
    switch (job_.activation) {
      case kRelu:
        return &Folder::rows<kFirst, true, kRelu>;
      case kGelu:
        return &Folder::rows<kFirst, true, kGelu>;
      default:
        return &Folder::rows<kFirst, true, kNoActivation>;
    }
  }

  // kFirst, kLast: of the row's spans.
  template <bool kFirst, bool kLast, Activation kActivation>
  __attribute__((noinline)) void rows(int64_t count) {
    const __m512 scale[2] = {Avx512::load_f32(scale_[0]), Avx512::load_f32(scale_[1])};
    const __m512 bias[2] = {Avx512::load_f32(bias_[0]), Avx512::load_f32(bias_[1])};
    const __mmask16 mask[2] = {mask_[0], mask_[1]};
    const int64_t spans = spans_, y_stride = job_.y_stride, done = done_;
    const uint8_t* c = c_ + done * kVectorBytes;
    uint8_t* sums = sums_ + done * kVectorBytes;
    const float* sx = sx_ + done * spans;
    const int32_t* sum_of_row = sum_ + done * spans;
    float* y = y_ + done * y_stride;
    done_ = done + count;
    do {
      const __m512 row_scale = Avx512::set1(*sx);
      unroll<2>([&](auto j) LOWBIT_LAMBDA {
        constexpr int64_t kAt = j * kHalfBytes;
        auto* so_far = reinterpret_cast<float*>(sums + kAt);
        __m512i total = Avx512::load(c + kAt);
        if constexpr (kCodes) {
          total = _mm512_sub_epi32(total, _mm512_slli_epi32(_mm512_set1_epi32(*sum_of_row), 7));
        }
        const __m512 value = Avx512::fmadd(Avx512::to_f32(total), Avx512::mul(scale[j], row_scale),
                                           kFirst ? bias[j] : Avx512::load_f32(so_far));
        if constexpr (kLast) {
          _mm512_mask_storeu_ps(y + j * kTileN, mask[j], activate<Avx512, kActivation>(value));
        } else {
          _mm512_storeu_ps(so_far, value);
        }
      });
      c += kVectorBytes;
      sums += kVectorBytes;
      sx += spans;
      sum_of_row += spans;
      y += y_stride;
    } while (--count > 0);
  }

  const Job& job_;
  const int64_t rows_end_, spans_;
  int64_t done_ = 0, left_ = 0;     // rows
  int64_t block_ = -1, span_ = -1;  // whose scales, bias and masks these are
  Fold fold_ = nullptr;
  const uint8_t* c_ = nullptr;
  uint8_t* sums_ = nullptr;
  const float* sx_ = nullptr;
  const int32_t* sum_ = nullptr;
  float* y_ = nullptr;
  __mmask16 mask_[2] = {};
  alignas(64) float scale_[2][kTileN], bias_[2][kTileN];
};

}  // namespace
}  // namespace lowbit
