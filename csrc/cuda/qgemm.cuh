// y = x W^T for more than 16 rows of x: tensor-core tiles fed by a pipeline of asynchronous copies.
//
// Weights go from global to shared memory as they lie, in fragment order, and from there into the registers of the
// lane that multiplies them: no shuffle, no transposition, no bank conflict. x goes to shared memory in rows of 64 inputs
// (128 bytes), whose 16-byte units are exchanged in pairs in odd rows, so that eight lanes read eight different banks:
//
//     unit u of row m lies at  128 m + 16 (u ^ (m & 1))           u = input / 8
#pragma once

#include "epilogue.cuh"

namespace lowbit::gpu {

// A block of kWarpsN x kWarpsM warps; a warp has kTilesN tiles of 16 outputs x kTilesM tiles of 8 rows of x.
template <int kBits_, bool kLookup_, class T_, bool kGrouped_, int kTilesN_, int kTilesM_, int kWarpsN_,
          int kWarpsM_, int kStages_, int kBlocks_>
struct GemmShape {
  using T = T_;
  static constexpr int kBits = kBits_, kTilesN = kTilesN_, kTilesM = kTilesM_, kWarpsN = kWarpsN_;
  static constexpr int kWarpsM = kWarpsM_, kStages = kStages_, kBlocks = kBlocks_;
  static constexpr bool kLookup = kLookup_, kGrouped = kGrouped_;
  static constexpr int kThreads = 32 * kWarpsN * kWarpsM;
  static constexpr int kRows = kTile * kTilesN * kWarpsN;  // outputs a block
  static constexpr int kMaxM = 8 * kTilesM * kWarpsM;      // rows of x a block
  static constexpr int kUnitsX = kMaxM * 8;                // 16-byte units a stage
  static constexpr int kUnitsW = kRows / block_rows(kBits) * vectors(kBits) * 32;
  static constexpr int kStageBytes = (kUnitsX + kUnitsW) * 16;
  static constexpr int kPitch = kRows + 4;  // of the sums in shared memory
  static constexpr int kSumBytes = (kMaxM * kPitch + 1) * 4;
  static constexpr int kSharedBytes = kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes;
  static_assert(kRows % 64 == 0 && kUnitsX % kThreads == 0, "copies are divided evenly");
};

// Block of y that a block of the grid computes: bands of 8 row tiles run through all outputs, so that blocks in flight
// share their rows of x and their weights in L2.
struct Tile {
  int m, n;
};
LOWBIT_HD constexpr Tile tile_of(int block, int tiles_m, int tiles_n) {
  const int band = block / (8 * tiles_n), inside = block % (8 * tiles_n);
  const int height = tiles_m - band * 8 < 8 ? tiles_m - band * 8 : 8;
  return {band * 8 + inside % height, inside / height};
}

LOWBIT_HD constexpr int x_unit(int row, int unit) { return row * 8 + (unit ^ (row & 1)); }

// The weights of a chunk, for all outputs of a block.
template <class S>
LOWBIT_DEVICE void copy_weights(const Args& p, const Tile& tile, int chunk, Vec4* to) {
  constexpr int kPer = vectors(S::kBits) * 32, kBlockRows = block_rows(S::kBits);
  LOWBIT_UNROLL
  for (int c = 0; c < (S::kUnitsW + S::kThreads - 1) / S::kThreads; ++c) {
    const int i = c * S::kThreads + thread_index();
    if (S::kUnitsW % S::kThreads != 0 && i >= S::kUnitsW) break;
    // A tile of 128 outputs may begin in the last 64: the others are not stored.
    const int wanted = tile.n * (S::kRows / kBlockRows) + i / kPer, most = p.n_padded / kBlockRows - 1;
    const int block = wanted < most ? wanted : most;
    copy_async(to + i, p.codes + vector_index(S::kBits, block, chunk, 0, p.chunks) + i % kPer, 16);
  }
}

template <class S>
LOWBIT_DEVICE void copy_stage(const Args& p, const Tile& tile, int chunk, Vec4* stage) {
  LOWBIT_UNROLL
  for (int c = 0; c < S::kUnitsX / S::kThreads; ++c) {
    const int i = c * S::kThreads + thread_index(), row = i / 8, unit = i % 8, m = tile.m * S::kMaxM + row,
              k = chunk * kChunk + unit * 8;
    const bool inside = m < p.m && k < p.k;
    copy_async(stage + x_unit(row, unit), p.x + (inside ? m * p.x_stride + k : 0), inside ? 16 : 0);
  }
  copy_weights<S>(p, tile, chunk, stage + S::kUnitsX);
}

// A lane's words of half a chunk of tile `tile` of a block, from the weights of a stage.
template <class S>
LOWBIT_DEVICE void read_words(const Vec4* weights, int tile, int half,
                              uint32_t (&words)[half_words(S::kBits)]) {
  constexpr int kWords = half_words(S::kBits);
  const int lane = thread_index() % 32, block = tile / block_tiles(S::kBits);
  const int at =
      tile % block_tiles(S::kBits) * S::kBits + (S::kBits > 1 ? half * kWords : 0);  // word of the lane
  const Vec4* vector = weights + (block * vectors(S::kBits) + at / kVectorWords) * 32 + lane;
  if constexpr (kWords == kVectorWords) {
    const Vec4 loaded = load_shared(vector);
    LOWBIT_UNROLL
    for (int w = 0; w < kWords; ++w) words[w] = loaded.x[w];
  } else {
    LOWBIT_UNROLL
    for (int w = 0; w < kWords; ++w) words[w] = load_shared(vector->x + at % kVectorWords + w);
  }
}

// sums += the chunk of a stage.
template <class S>
LOWBIT_DEVICE void multiply_chunk(const Vec4* stage, const Codebook& book, int warp_n, int warp_m,
                                  float (&sums)[S::kTilesN][S::kTilesM][4]) {
  const int lane = thread_index() % 32;
  // 128 sums a thread leave no room for what the compiler would load ahead from the second half.
  [[maybe_unused]] constexpr int kUnrolled = S::kBits > 1 && S::kTilesN * S::kTilesM == 32 ? 1 : 2;
  LOWBIT_UNROLL_BY(kUnrolled)
  for (int half = 0; half < 2; ++half) {
    Vec4 x[S::kTilesM];
    LOWBIT_UNROLL
    for (int j = 0; j < S::kTilesM; ++j) {
      x[j] = load_shared(stage + x_unit((warp_m * S::kTilesM + j) * 8 + lane / 4, lane % 4 * 2 + half));
    }
    LOWBIT_UNROLL
    for (int i = 0; i < S::kTilesN; ++i) {
      uint32_t words[half_words(S::kBits)], a[8];
      read_words<S>(stage + S::kUnitsX, warp_n * S::kTilesN + i, half, words);
      unpack_half<S::kBits, S::kLookup, typename S::T>(words, half, book, a);
      LOWBIT_UNROLL
      for (int step = 0; step < 2; ++step) {
        LOWBIT_UNROLL
        for (int j = 0; j < S::kTilesM; ++j)
          mma(typename S::T{}, sums[i][j], a + 4 * step, x[j].x + 2 * step);
      }
    }
  }
}

// Scales of a lane's outputs g and g + 8 from n on; 0 past the padded outputs.
LOWBIT_DEVICE void read_scales(const Args& p, int64_t group, int n, float (&scale)[2]) {
  LOWBIT_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int at = n + 8 * r + thread_index() % 32 / 4;
    scale[r] = at < p.n_padded ? widen(Fp16{}, load_global(p.scales + group * p.n_padded + at)) : 0.0f;
  }
}

// total += scale * sums of the group that `chunk` belongs to; sums = 0.
template <class S>
LOWBIT_DEVICE void fold(const Args& p, int chunk, int n_first, float (&sums)[S::kTilesN][S::kTilesM][4],
                        float (&total)[S::kTilesN][S::kTilesM][4]) {
  const int64_t group = chunk / p.group_chunks;
  LOWBIT_UNROLL
  for (int i = 0; i < S::kTilesN; ++i) {
    float scale[2];
    read_scales(p, group, n_first + i * kTile, scale);
    LOWBIT_UNROLL
    for (int j = 0; j < S::kTilesM; ++j) {
      LOWBIT_UNROLL
      for (int r = 0; r < 4; ++r) {
        total[i][j][r] += scale[r / 2] * sums[i][j][r];
        sums[i][j][r] = 0.0f;
      }
    }
  }
}

// grid (tiles of y, splits)
template <class S>
LOWBIT_KERNEL(S::kThreads, S::kBlocks)
qgemm_kernel(LOWBIT_PARAM Args p) {
  const int warp = thread_index() / 32;
  const int warp_n = warp % S::kWarpsN, warp_m = warp / S::kWarpsN;
  const int tiles_m = (p.m + S::kMaxM - 1) / S::kMaxM, tiles_n = (p.n_padded + S::kRows - 1) / S::kRows;
  const Tile tile = tile_of(block_x(), tiles_m, tiles_n);
  const int n_first = tile.n * S::kRows + warp_n * S::kTilesN * kTile;
  const int begin = part_start(p.chunks, block_y(), grid_y()),
            end = part_start(p.chunks, block_y() + 1, grid_y());
  Vec4* stages = reinterpret_cast<Vec4*>(shared_memory());
  constexpr int kStageUnits = S::kUnitsX + S::kUnitsW;

  let_next_start();
  wait_for_previous();
  LOWBIT_UNROLL
  for (int s = 0; s < S::kStages - 1; ++s) {
    if (begin + s < end) copy_stage<S>(p, tile, begin + s, stages + s * kStageUnits);
    commit_copies();
  }
  float sums[S::kTilesN][S::kTilesM][4] = {};
  float total[S::kGrouped ? S::kTilesN : 1][S::kTilesM][4] = {};
  int slot = 0;
  for (int chunk = begin; chunk < end; ++chunk) {
    wait_copies<S::kStages - 2>();
    barrier();  // this chunk has arrived for all threads, and all have left the slot that is filled next
    const int ahead = chunk + S::kStages - 1, next = slot == 0 ? S::kStages - 1 : slot - 1;
    if (ahead < end) copy_stage<S>(p, tile, ahead, stages + next * kStageUnits);
    commit_copies();
    multiply_chunk<S>(stages + slot * kStageUnits, p.book, warp_n, warp_m, sums);
    if constexpr (S::kGrouped) {
      if ((chunk + 1) % p.group_chunks == 0 || chunk + 1 == end) fold<S>(p, chunk, n_first, sums, total);
    }
    slot = slot + 1 == S::kStages ? 0 : slot + 1;
  }
  wait_copies<0>();
  barrier();  // the stages become the place of the sums
  float* shared = reinterpret_cast<float*>(stages);
  LOWBIT_UNROLL
  for (int i = 0; i < S::kTilesN; ++i) {
    float by[2] = {1.0f, 1.0f};
    if constexpr (!S::kGrouped) read_scales(p, 0, n_first + i * kTile, by);
    LOWBIT_UNROLL
    for (int j = 0; j < S::kTilesM; ++j) {
      const int row = (warp_m * S::kTilesM + j) * 8, column = (warp_n * S::kTilesN + i) * kTile;
      store_fragment(shared, S::kPitch, row, column, S::kGrouped ? total[S::kGrouped ? i : 0][j] : sums[i][j],
                     by);
    }
  }
  barrier();
  const auto sum = [&](int row, int column) { return load_shared(shared + row * S::kPitch + column); };
  int* last = reinterpret_cast<int*>(shared + S::kMaxM * S::kPitch);
  write_tile<typename S::T, S::kMaxM, S::kRows, S::kThreads>(p, block_x(), tile.m * S::kMaxM,
                                                             tile.n * S::kRows, grid_y(), last, sum);
}

}  // namespace lowbit::gpu
