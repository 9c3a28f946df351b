// Rows of W as 16- or 32-bit floats: an embedding's look-up, and dense panels for a library's matrix product.
#pragma once

#include "dequant.cuh"

namespace lowbit::gpu {

struct RowsArgs {
  const uint32_t* codes;   // layout.cuh
  const uint16_t* scales;  // fp16 [groups, n_padded]
  const int64_t* ids;      // [count] row numbers
  float* out;              // [count, k]
  int64_t count;
  int n_padded, k, chunks, group_chunks, bits;
  int16_t levels[16];  // of codes below 8 bits
};

constexpr int kRowsThreads = 256;

// One row a block, one input a thread. grid (count)
template <int kThreads>
LOWBIT_KERNEL(kThreads, 1)
rows_kernel(LOWBIT_PARAM RowsArgs p) {
  const int64_t row = block_x(), n = load_global(p.ids + row);
  for (int k = thread_index(); k < p.k; k += kThreads) {
    const Place place = place_of(p.bits, n, k, p.chunks);
    const uint32_t code = code_in(p.bits, load_global(p.codes + place.word), place.bit);
    const int level = p.bits == 8 ? static_cast<int>(code) - 128 : p.levels[code];
    const float scale =
        widen(Fp16{}, load_global(p.scales + int64_t{k / kChunk / p.group_chunks} * p.n_padded + n));
    store_global(p.out + row * p.k + k, scale * static_cast<float>(level));
  }
}

struct PanelArgs {
  const Vec4* codes;
  const uint16_t* scales;
  Vec4* out;  // T [blocks * block_rows, chunks * 64]: row pitch chunks * 64, so that every store is whole
  int first_block;  // of W, in blocks of block_rows outputs
  int units;        // blocks * chunks
  int n_padded, chunks, group_chunks;
  Codebook book;
};

// Level pairs times a scale, rounded once to T.
template <class T>
LOWBIT_HD uint32_t scale_pair(T type, uint32_t pair, float scale) {
  return pack2(type, widen(type, static_cast<uint16_t>(pair)) * scale,
               widen(type, static_cast<uint16_t>(pair >> 16)) * scale);
}

constexpr int kPanelThreads = 256;

// One block of outputs and one chunk a warp: a lane's 16 consecutive inputs of a row are two 16-byte stores.
// grid (units / 8, rounded up)
template <int kBits, bool kLookup, class T>
LOWBIT_KERNEL(kPanelThreads, 2)
panel_kernel(LOWBIT_PARAM PanelArgs p) {
  const int lane = thread_index() % 32, unit = block_x() * (kPanelThreads / 32) + thread_index() / 32;
  if (unit >= p.units) return;
  const int block = unit / p.chunks, chunk = unit % p.chunks;
  Vec4 loaded[vectors(kBits)];
  LOWBIT_UNROLL
  for (int v = 0; v < vectors(kBits); ++v) {
    loaded[v] = load_stream(p.codes + vector_index(kBits, p.first_block + block, chunk, v, p.chunks) + lane);
  }
  const uint16_t* scales =
      p.scales + int64_t{chunk / p.group_chunks} * p.n_padded + p.first_block * block_rows(kBits);
  LOWBIT_UNROLL
  for (int tile = 0; tile < block_tiles(kBits); ++tile) {
    const int row = block * block_rows(kBits) + tile * kTile + lane / 4;
    const float scale[2] = {widen(Fp16{}, load_global(scales + row)),
                            widen(Fp16{}, load_global(scales + row + 8))};
    LOWBIT_UNROLL
    for (int half = 0; half < 2; ++half) {
      constexpr int kWords = half_words(kBits);
      uint32_t words[kWords], pairs[8];
      LOWBIT_UNROLL
      for (int w = 0; w < kWords; ++w) {
        const int at = tile * kBits + (kBits > 1 ? half * kWords : 0) + w;
        words[w] = loaded[at / kVectorWords].x[at % kVectorWords];
      }
      unpack_half<kBits, kLookup, T>(words, half, p.book, pairs);
      LOWBIT_UNROLL
      for (int r = 0; r < 2; ++r) {  // outputs g and g + 8
        Vec4 out;
        LOWBIT_UNROLL
        for (int i = 0; i < 4; ++i) out.x[i] = scale_pair(T{}, pairs[2 * i + r], scale[r]);
        store_global(p.out + ((row + int64_t{8} * r) * p.chunks + chunk) * 8 + lane % 4 * 2 + half, out);
      }
    }
  }
}

}  // namespace lowbit::gpu
