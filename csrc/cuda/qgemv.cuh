// y = x W^T for 1 to 16 rows of x: bound by the bytes of W.
//
// A block has kRows outputs; its warps (and the splits of the grid) share K. Each warp walks along its chunks with
// kDepth chunks of weights in flight in registers, unpacks, and multiplies on tensor cores, which at one row still
// cost only 1/8 instruction a weight where fp32 sums would cost one. Activations come from L1/L2 as fragments: 16
// consecutive inputs a lane. At the end the warps' sums meet in shared memory.
#pragma once

#include "epilogue.cuh"

namespace lowbit::gpu {

// kColumns: 8-row column tiles of x (1 or 2); kGrouped: scales change along K.
template <int kBits_, bool kLookup_, class T_, int kColumns_, bool kGrouped_>
struct GemvShape {
  using T = T_;
  static constexpr int kBits = kBits_, kColumns = kColumns_;
  static constexpr bool kLookup = kLookup_, kGrouped = kGrouped_;
  static constexpr int kRows = kBits == 8 ? 32 : 64;  // outputs a block
  static constexpr int kTiles = kRows / kTile;
  static constexpr int kLoads = kRows / block_rows(kBits) * vectors(kBits);  // 16-byte loads a lane and chunk
  // The registers of a thread: 128 where one column tile leaves room for two blocks of 8 warps, else 168, or 255 where
  // two column tiles are folded by groups. Chunks in flight: as many as they hold.
  static constexpr bool kTight = kColumns == 1 && !(kBits == 2 && kLookup && kGrouped);
  static constexpr int kWarps = kTight ? 8 : 4, kThreads = 32 * kWarps;
  static constexpr int kBlocks = kTight || (kColumns == 2 && kGrouped) ? 2 : 3;  // a multiprocessor
  static constexpr int kDepth = kBits > 2 || kLookup          ? 2
                                : kColumns == 1 && !kGrouped  ? 4
                                : kColumns == 2 && kBits == 1 ? (kGrouped ? 4 : 3)
                                                              : 2;
  static constexpr int kMaxM = 8 * kColumns;
  static constexpr int kPitch = kRows + 4;  // of the sums in shared memory: no bank conflicts
  static constexpr int kSharedBytes = (kWarps * kMaxM * kPitch + 1) * 4;
};

template <class S>
struct GemvStage {
  Vec4 w[S::kLoads];
  Vec4 x[S::kColumns][2];
  uint16_t scale[S::kGrouped ? S::kTiles : 1][2];
};

// Where a lane reads next. Chunks are read in order; those of a loop pass lie at constant distances from here.
template <class S>
struct GemvCursor {
  const Vec4* w;  // of the first block of outputs
  int w_stride;   // to the next block
  const Vec4* x[S::kColumns];
  int inputs[S::kColumns];  // left in the row from here on; none for rows past M
  const uint16_t* scale;    // of output g of the first tile
  int group_left;           // chunks that still have this scale
};

template <class S>
LOWBIT_DEVICE GemvCursor<S> cursor_at(const Args& p, int chunk) {
  const int lane = thread_index() % 32, block = block_x() * (S::kRows / block_rows(S::kBits));
  const int k = chunk * kChunk + lane % 4 * 16;
  GemvCursor<S> at;
  at.w = p.codes + vector_index(S::kBits, block, chunk, 0, p.chunks) + lane;
  at.w_stride = static_cast<int>(vector_index(S::kBits, 1, 0, 0, p.chunks));
  LOWBIT_UNROLL
  for (int j = 0; j < S::kColumns; ++j) {
    const int row = 8 * j + lane / 4;
    at.x[j] = reinterpret_cast<const Vec4*>(p.x + row * p.x_stride + k);
    at.inputs[j] = row < p.m ? p.k - k : 0;
  }
  const int group = chunk / p.group_chunks;
  at.scale = p.scales + int64_t{group} * p.n_padded + block_x() * S::kRows + lane / 4;
  at.group_left = (group + 1) * p.group_chunks - chunk;
  return at;
}

// Vector `i` of the weights of the chunk `ahead`.
template <class S>
LOWBIT_DEVICE const Vec4* weights_at(const GemvCursor<S>& at, int ahead, int i) {
  constexpr int kPer = vectors(S::kBits);
  return at.w + int64_t{i / kPer} * at.w_stride + (ahead * kPer + i % kPer) * 32;
}

template <class S>
LOWBIT_DEVICE void load_scales(const uint16_t* from, uint16_t (&scale)[S::kTiles][2]) {
  LOWBIT_UNROLL
  for (int i = 0; i < S::kTiles; ++i) {
    scale[i][0] = load_global(from + i * kTile);
    scale[i][1] = load_global(from + i * kTile + 8);
  }
}

// The chunk `ahead` of the cursor, zeros for activations past the end.
template <class S>
LOWBIT_DEVICE void load_stage(const Args& p, GemvCursor<S>& at, int ahead, GemvStage<S>& stage) {
  LOWBIT_UNROLL
  for (int i = 0; i < S::kLoads; ++i) stage.w[i] = load_stream(weights_at<S>(at, ahead, i));
  LOWBIT_UNROLL
  for (int j = 0; j < S::kColumns; ++j) {
    LOWBIT_UNROLL
    for (int i = 0; i < 2; ++i) {
      stage.x[j][i] = Vec4{};
      if (ahead * kChunk + 8 * i < at.inputs[j])
        stage.x[j][i] = load_global(at.x[j] + ahead * (kChunk / 8) + i);
    }
  }
  if constexpr (S::kGrouped) {
    load_scales<S>(at.scale, stage.scale);
    if (--at.group_left == 0) at.group_left = p.group_chunks, at.scale += p.n_padded;
  }
}

template <class S>
LOWBIT_DEVICE void advance(GemvCursor<S>& at) {
  at.w += S::kDepth * vectors(S::kBits) * 32;
  LOWBIT_UNROLL
  for (int j = 0; j < S::kColumns; ++j) {
    at.x[j] += S::kDepth * (kChunk / 8);
    at.inputs[j] -= S::kDepth * kChunk;
  }
}

// sums[tile][column tile] += levels of the stage's chunk times its activations.
template <class S>
LOWBIT_DEVICE void multiply(const GemvStage<S>& stage, const Codebook& book,
                            float (&sums)[S::kTiles][S::kColumns][4]) {
  LOWBIT_UNROLL
  for (int i = 0; i < S::kTiles; ++i) {
    LOWBIT_UNROLL
    for (int half = 0; half < 2; ++half) {
      constexpr int kWords = half_words(S::kBits);
      uint32_t words[kWords], a[8];
      LOWBIT_UNROLL
      for (int w = 0; w < kWords; ++w) {
        const int at = i * S::kBits + (S::kBits > 1 ? half * kWords : 0) + w;
        words[w] = stage.w[at / kVectorWords].x[at % kVectorWords];
      }
      unpack_half<S::kBits, S::kLookup, typename S::T>(words, half, book, a);
      LOWBIT_UNROLL
      for (int step = 0; step < 2; ++step) {
        LOWBIT_UNROLL
        for (int j = 0; j < S::kColumns; ++j) {
          mma(typename S::T{}, sums[i][j], a + 4 * step, stage.x[j][half].x + 2 * step);
        }
      }
    }
  }
}

template <class S>
LOWBIT_DEVICE void multiply_stage(const Args& p, const GemvStage<S>& stage,
                                  float (&total)[S::kTiles][S::kColumns][4]) {
  if constexpr (!S::kGrouped) {
    multiply<S>(stage, p.book, total);
  } else {
    float sums[S::kTiles][S::kColumns][4] = {};
    multiply<S>(stage, p.book, sums);
    LOWBIT_UNROLL
    for (int i = 0; i < S::kTiles; ++i) {
      const float scale[2] = {widen(Fp16{}, stage.scale[i][0]), widen(Fp16{}, stage.scale[i][1])};
      LOWBIT_UNROLL
      for (int j = 0; j < S::kColumns; ++j) {
        LOWBIT_UNROLL
        for (int r = 0; r < 4; ++r) total[i][j][r] += scale[r / 2] * sums[i][j][r];
      }
    }
  }
}

// grid (n_padded / kRows, splits)
template <class S>
LOWBIT_KERNEL(S::kThreads, S::kBlocks)
qgemv_kernel(LOWBIT_PARAM Args p) {
  const int warp = thread_index() / 32;
  const int splits = grid_y(), parts = splits * S::kWarps, part = block_y() * S::kWarps + warp;
  const int end = part_start(p.chunks, part + 1, parts);
  int chunk = part_start(p.chunks, part, parts);

  float total[S::kTiles][S::kColumns][4] = {};
  uint16_t scale[S::kTiles][2];
  GemvCursor<S> at = cursor_at<S>(p, chunk);
  // The weights do not depend on the kernel before: the first ones come to L2 while it ends.
  let_next_start();
  LOWBIT_UNROLL
  for (int d = 0; d < S::kDepth; ++d) {
    LOWBIT_UNROLL
    for (int i = 0; i < S::kLoads; ++i) {
      if (chunk + d < end) prefetch_l2(weights_at<S>(at, d, i));
    }
  }
  wait_for_previous();
  if constexpr (!S::kGrouped) load_scales<S>(at.scale, scale);
  GemvStage<S> stage[S::kDepth];
  LOWBIT_UNROLL
  for (int d = 0; d < S::kDepth; ++d) {
    if (chunk + d < end) load_stage<S>(p, at, d, stage[d]);
  }
  for (; chunk < end; chunk += S::kDepth) {
    LOWBIT_UNROLL
    for (int d = 0; d < S::kDepth; ++d) {
      if (chunk + d < end) {
        multiply_stage<S>(p, stage[d], total);
        if (chunk + d + S::kDepth < end) load_stage<S>(p, at, d + S::kDepth, stage[d]);
      }
    }
    advance<S>(at);
  }

  float* shared = reinterpret_cast<float*>(shared_memory());
  LOWBIT_UNROLL
  for (int i = 0; i < S::kTiles; ++i) {
    const float by[2] = {S::kGrouped ? 1.0f : widen(Fp16{}, scale[i][0]),
                         S::kGrouped ? 1.0f : widen(Fp16{}, scale[i][1])};
    LOWBIT_UNROLL
    for (int j = 0; j < S::kColumns; ++j) {
      store_fragment(shared, S::kPitch, warp * S::kMaxM + 8 * j, i * kTile, total[i][j], by);
    }
  }
  barrier();
  const auto sum = [&](int row, int column) {
    float value = 0.0f;
    LOWBIT_UNROLL
    for (int w = 0; w < S::kWarps; ++w)
      value += load_shared(shared + (w * S::kMaxM + row) * S::kPitch + column);
    return value;
  };
  int* last = reinterpret_cast<int*>(shared + S::kWarps * S::kMaxM * S::kPitch);
  write_tile<typename S::T, S::kMaxM, S::kRows, S::kThreads>(p, block_x(), 0, block_x() * S::kRows, splits,
                                                             last, sum);
}

}  // namespace lowbit::gpu
