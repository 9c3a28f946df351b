// y = x W^T for many rows of x on sm_90a: warp-group products, whose rate mma does not reach there.
//
// The unpacked weights are the left operand, in registers, where a lane's words already lie as it needs them. x is the
// right one and has to lie in shared memory, its inputs in the order of the weights' fragments (layout.cuh) and its
// 16-byte units exchanged: pack_x_kernel lays it so in global memory, tile by tile and chunk by chunk, once for all
// blocks, so that a stage is filled by copies of whole runs:
//
//     packed x  T [tiles of 128 rows][chunks][128 rows][64 inputs]    place 16 s + 8 h + 2 t + e of a row, unit
//               p / 8 of row r at unit p / 8 ^ r % 8, holds input 16 t + 4 s + 2 h + e of the chunk
#pragma once

#include "qgemm.cuh"

namespace lowbit::gpu {

constexpr int kPackRows = 128, kPackUnits = kPackRows * 8, kPackThreads = 256;

struct PackArgs {
  const uint32_t* x;  // pairs of T, [m, k]: rows `pitch` pairs apart, zero from k to the next multiple of 8
  Vec4* out;
  int64_t pitch, units;
  int m, k, chunks;
};

// A unit a thread: four pairs of a row. grid (units / 256)
template <int kThreads>
LOWBIT_KERNEL(kThreads, 1)
pack_x_kernel(LOWBIT_PARAM PackArgs p) {
  const int64_t at = int64_t{block_x()} * kThreads + thread_index();
  if (at >= p.units) return;
  const int unit = static_cast<int>(at % 8), row = static_cast<int>(at / 8 % kPackRows);
  const int64_t stage = at / kPackUnits;
  const int64_t m = stage / p.chunks * kPackRows + row;
  const int first = static_cast<int>(stage % p.chunks) * kChunk + unit / 2 * 4 + unit % 2 * 2;
  Vec4 out{};
  LOWBIT_UNROLL
  for (int t = 0; t < 4; ++t) {
    const int input = first + 16 * t;
    if (m < p.m && input < p.k) out.x[t] = load_global(p.x + m * p.pitch + input / 2);
  }
  store_global(p.out + stage * kPackUnits + row * 8 + (unit ^ (row % 8)), out);
}

// A block of two warp groups: 128 outputs x 128 rows of x. Two blocks a multiprocessor where the
// registers suffice: not for sums of groups, nor for the words of 8 bits.
template <int kBits_, bool kLookup_, class T_, bool kGrouped_>
struct WgmmaShape {
  using T = T_;
  static constexpr int kBits = kBits_;
  static constexpr bool kLookup = kLookup_, kGrouped = kGrouped_;
  static constexpr int kThreads = 256, kBlocks = kGrouped || kBits == 8 ? 1 : 2;
  static constexpr int kStages = kBlocks == 1 ? 6 : 5;
  static constexpr int kRows = 128, kMaxM = kPackRows;
  static constexpr int kUnitsX = kPackUnits;
  static constexpr int kUnitsW = kRows / block_rows(kBits) * vectors(kBits) * 32;
  static constexpr int kPitch = kRows + 4;  // of the sums in shared memory
  static constexpr int kSumBytes = (kMaxM * kPitch + 1) * 4, kStageBytes = (kUnitsX + kUnitsW) * 16;
  static constexpr int kSharedBytes = kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes;
};

struct WgmmaArgs {
  Args product;          // x is not read
  const Vec4* packed_x;  // see above
};

template <class S>
LOWBIT_DEVICE void copy_packed(const WgmmaArgs& p, const Tile& tile, int chunk, int slot, Vec4* shared) {
  const Vec4* x = p.packed_x + (int64_t{tile.m} * p.product.chunks + chunk) * S::kUnitsX;
  LOWBIT_UNROLL
  for (int c = 0; c < S::kUnitsX / S::kThreads; ++c) {
    const int i = c * S::kThreads + thread_index();
    copy_async(shared + slot * S::kUnitsX + i, x + i, 16);
  }
  copy_weights<S>(p.product, tile, chunk, shared + S::kStages * S::kUnitsX + slot * S::kUnitsW);
}

// sums += the chunk in `slot`, begun; `a`: registers for the unpacked weights, in use until the products are done.
template <class S>
LOWBIT_DEVICE void begin_chunk(const Codebook& book, int slot, const Vec4* shared, uint32_t (&a)[16],
                               float (&sums)[16][4]) {
  const Vec4* weights = shared + S::kStages * S::kUnitsX + slot * S::kUnitsW;
  LOWBIT_UNROLL
  for (int half = 0; half < 2; ++half) {
    uint32_t words[half_words(S::kBits)];
    read_words<S>(weights, thread_index() / 32, half, words);
    unpack_half<S::kBits, S::kLookup, typename S::T>(words, half, book, a + 8 * half);
  }
  begin_products();
  LOWBIT_UNROLL
  for (int step = 0; step < 4; ++step) {
    wgmma(typename S::T{}, sums, a + 4 * step, shared + slot * S::kUnitsX, step);
  }
  commit_products();
}

// grid (tiles of y, splits)
template <class S>
LOWBIT_KERNEL(S::kThreads, S::kBlocks)
qwgmma_kernel(LOWBIT_PARAM WgmmaArgs p) {
  const Args& q = p.product;
  const int warp = thread_index() / 32;
  const int tiles_m = (q.m + S::kMaxM - 1) / S::kMaxM, tiles_n = (q.n_padded + S::kRows - 1) / S::kRows;
  const Tile tile = tile_of(block_x(), tiles_m, tiles_n);
  const int n_first = tile.n * S::kRows + warp * kTile;
  const int begin = part_start(q.chunks, block_y(), grid_y()),
            end = part_start(q.chunks, block_y() + 1, grid_y());
  Vec4* shared = reinterpret_cast<Vec4*>(shared_memory());

  let_next_start();
  wait_for_previous();
  LOWBIT_UNROLL
  for (int s = 0; s < S::kStages - 2; ++s) {
    if (begin + s < end) copy_packed<S>(p, tile, begin + s, s, shared);
    commit_copies();
  }
  float sums[16][4] = {}, total[S::kGrouped ? 16 : 1][4] = {};
  uint32_t a[2][16];  // of two chunks: the products of one run while the other is unpacked
  const auto step = [&](int chunk, uint32_t (&registers)[16]) {
    const int slot = (chunk - begin) % S::kStages, ahead = chunk + S::kStages - 2;
    wait_copies<S::kStages - 3>();
    publish_shared();
    barrier();  // this chunk has arrived for all, and all have done with the one before the last, whose slot is filled
    if (ahead < end) copy_packed<S>(p, tile, ahead, (ahead - begin) % S::kStages, shared);
    commit_copies();
    begin_chunk<S>(q.book, slot, shared, registers, sums);
    wait_products<1>();
    if constexpr (S::kGrouped) {
      if ((chunk + 1) % q.group_chunks == 0 || chunk + 1 == end) {
        wait_products<0>();
        float by[2];
        read_scales(q, chunk / q.group_chunks, n_first, by);
        LOWBIT_UNROLL
        for (int j = 0; j < 16; ++j) {
          LOWBIT_UNROLL
          for (int r = 0; r < 4; ++r) total[j][r] += by[r / 2] * sums[j][r], sums[j][r] = 0.0f;
        }
      }
    }
  };
  int chunk = begin;
  for (; chunk + 1 < end; chunk += 2) {
    step(chunk, a[0]);
    step(chunk + 1, a[1]);
  }
  if (chunk < end) step(chunk, a[0]);
  wait_products<0>();
  wait_copies<0>();
  barrier();  // the stages become the place of the sums
  float* place = reinterpret_cast<float*>(shared);
  float by[2] = {1.0f, 1.0f};
  if constexpr (!S::kGrouped) read_scales(q, 0, n_first, by);
  LOWBIT_UNROLL
  for (int j = 0; j < 16; ++j) {
    store_fragment(place, S::kPitch, 8 * j, warp * kTile, S::kGrouped ? total[S::kGrouped ? j : 0] : sums[j],
                   by);
  }
  barrier();
  const auto sum = [&](int row, int column) { return load_shared(place + row * S::kPitch + column); };
  int* last = reinterpret_cast<int*>(place + S::kMaxM * S::kPitch);
  write_tile<typename S::T, S::kMaxM, S::kRows, S::kThreads>(q, block_x(), tile.m * S::kMaxM,
                                                             tile.n * S::kRows, grid_y(), last, sum);
}

}  // namespace lowbit::gpu
