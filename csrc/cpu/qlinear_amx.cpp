// AMX: int8 tiles for large M. C[16 rows][16 outputs] += A[16 rows][64 inputs] * B[64 inputs][16 outputs].
//
// A is the activations in tile order (qlinear.h). B is a tile of layout.h, unpacked to signed levels, or as it is
// where codes have 8 bits: its row r of 64 bytes [output][4 inputs] is row r of the tile register. Two A and
// two B tiles feed four accumulators: one tile load a dot product.
//
// Loops, outside in:  rows that fit L2  ->  two blocks (32 outputs)  ->  a chunk of at most kChunkTiles * 64
// inputs, unpacked into L1  ->  32 rows at a time. The tile unit works beside the vector units, and everything
// else hides behind its products: between two steps of 64 inputs, the vector units fold a few rows of the
// accumulators that were stored last into the output, and the last rows of a chunk leave the next one in its place.
#include "amx_stages-inl.h"
#include "dispatch.h"

namespace lowbit {
namespace {

constexpr int kShortChunkTiles = 8;         // of a chunk that serves one pair of row groups only
constexpr int64_t kRowBytesInL2 = 1 << 20;  // of activations
constexpr int64_t kNear = 1 << 20;          // packed weights up to this size stay in L2 from call to call
constexpr int64_t kMaxRowsAtATime = 1024;

// C 0-3 = [row group][block], A 4-5, B 6-7.
constexpr int kTileA = 4, kTileB = 6;

// kA row groups x kB blocks b over one chunk, from and to the accumulators c. between(t, j) runs when tile t of
// block j has been read, fold() once a step.
template <int kA, int kB, bool kCodes, class F, class G>
LOWBIT_INLINE void multiply(const Job& job, const Chunk& chunk, int64_t group, const uint8_t* const (&b)[2],
                            uint8_t* c, const F& between, const G& fold) {
  unroll<kA * kB>([&](auto i) LOWBIT_LAMBDA {
    if (chunk.first) {
      tile_zero<i / kB * 2 + i % kB>();
    } else {
      tile_load<i / kB * 2 + i % kB>(c + (i % kB * 2 + i / kB) * kTileBytes);
    }
  });
  const int8_t* a[kA];
  for (int i = 0; i < kA; ++i) a[i] = job.act.at((group + i) * kTileRows, chunk.tile);
  for (int64_t t = 0; t < chunk.tiles; ++t) {
    unroll<kA>([&](auto i) LOWBIT_LAMBDA {
      tile_stream<kTileA + i>(a[i] + t * kTileBytes);
      unroll<kB>([&](auto j) LOWBIT_LAMBDA {
        if constexpr (i == 0) tile_load<kTileB + j>(b[j] + t * kTileBytes);
        tile_dot<i * 2 + j, kTileA + i, kTileB + j, kCodes>();
        if constexpr (i == kA - 1) between(t, j);
      });
    });
    fold();
  }
  unroll<kA * kB>(
      [&](auto i) LOWBIT_LAMBDA { tile_store<i / kB * 2 + i % kB>(c + (i % kB * 2 + i / kB) * kTileBytes); });
}

// The chunk after this one, along K, then along N. A span is cut into nearly equal chunks of at most `most` tiles.
Chunk next(const Matrix& w, Chunk chunk, int64_t most) {
  chunk.tile += chunk.tiles;
  if (chunk.tile == w.tiles_k()) {
    chunk.block += 2;
    chunk.tile = 0;
  }
  chunk.span = chunk.tile / w.span_tiles();
  const int64_t begin = chunk.span * w.span_tiles(), end = least(w.tiles_k(), begin + w.span_tiles());
  chunk.tiles = least(ceil_div(end - begin, ceil_div(end - begin, most)), end - chunk.tile);
  chunk.first = chunk.tile == begin;
  chunk.last = chunk.tile + chunk.tiles == end;
  return chunk;
}

// Some row groups times all blocks.
template <int kBits>
void rows_at_once(const Job& job, Range blocks, Range groups, const Scratch& scratch) {
  constexpr bool kCodes = kBits == 8;  // tiles that are bytes are read where they lie
  const Matrix& w = job.w;
  Unpacker<kBits> unpacker(w);
  Folder<kCodes> folder(job);
  Prefetcher prefetcher;
  const auto width = [&](const Chunk& chunk) { return static_cast<int>(least(2, blocks.end - chunk.block)); };
  const auto unpack_from = [&](int64_t t) {
    for (; !kCodes && t < unpacker.tiles(); ++t) {
      unpacker.tile(0, t, scratch.b);
      unpacker.tile(1, t, scratch.b);
    }
  };
  const int64_t early = (groups.size() - 1) / 2 + (kCodes ? 1 : 0);  // pairs that leave time to prefetch
  const bool far = early > 0 && blocks.size() * w.block_bytes() > kNear;
  const int64_t most = groups.size() > 2 ? kChunkTiles : kShortChunkTiles;
  Chunk chunk = next(w, Chunk{blocks.begin - 2, w.tiles_k(), 0, 0, false, false}, most);
  unpacker.start(chunk, width(chunk));
  unpack_from(0);
  while (chunk.block < blocks.end) {
    const Chunk following = next(w, chunk, most);
    if (following.block < blocks.end) {
      unpacker.start(following, width(following));
      if (far) prefetcher.start(w, following, width(following), early * chunk.tiles);
    }
    const int64_t quota = ceil_div(kPairRows, chunk.tiles);
    const auto fold = [&]() LOWBIT_LAMBDA {
      folder.step(quota);
      prefetcher.step();
    };
    const uint8_t* b[2];
    for (int j = 0; j < 2; ++j) {
      b[j] = kCodes ? packed(w, chunk, j, width(chunk)) : scratch.b + j * kChunkTiles * kTileBytes;
    }
    for (int64_t group = groups.begin; group < groups.end; group += 2) {
      // Accumulators wait between the chunks of a span; else all pairs share those of the first, in L1.
      const int64_t at = (group - groups.begin) / 2 * kPairBytes;
      const bool two = group + 1 < groups.end;
      const int64_t unpacked = group + 2 >= groups.end && following.block < blocks.end ? unpacker.tiles() : 0;
      const auto between = [&](int64_t t, int j) LOWBIT_LAMBDA {
        if (!kCodes && t < unpacked) unpacker.tile(j, t, scratch.b);
      };
      uint8_t* c = scratch.c + (chunk.first && chunk.last ? 0 : at);
      if (width(chunk) == 1) {
        two ? multiply<2, 1, kCodes>(job, chunk, group, b, c, between, fold)
            : multiply<1, 1, kCodes>(job, chunk, group, b, c, between, fold);
      } else {
        two ? multiply<2, 2, kCodes>(job, chunk, group, b, c, between, fold)
            : multiply<1, 2, kCodes>(job, chunk, group, b, c, between, fold);
      }
      folder.step(kPairRows);
      if (chunk.last) folder.start(chunk, group * kTileRows, c, scratch.sums + at);
    }
    if (following.block < blocks.end) unpack_from(chunk.tiles);
    chunk = following;
  }
  folder.step(kPairRows);
}

int64_t rows_at_a_time(const Matrix& w) {
  const int64_t rows = kRowBytesInL2 / (w.tiles_k() * kTileK) / kPairRows * kPairRows;
  return rows < kPairRows ? kPairRows : least(rows, kMaxRowsAtATime);
}

template <int kBits>
void amx(const Job& job, Range blocks, Range rows, uint8_t* scratch) {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = 64;
    // With fewer rows in all than a pair of tiles has, shorter A and C tiles take fewer cycles.
    const int64_t left = i == kTileA + 1 || i / 2 == 1 ? job.m - kTileRows : job.m;
    config.rows[i] = static_cast<uint8_t>(i >= kTileB || left < 1 ? kTileRows : least(left, kTileRows));
  }
  load_config(config);
  const int64_t step = rows_at_a_time(job.w);
  for (int64_t m = rows.begin; m < rows.end; m += step) {
    const Range groups{m / kTileRows, ceil_div(least(m + step, rows.end), kTileRows)};
    rows_at_once<kBits>(job, blocks, groups, Scratch(scratch, ceil_div(groups.size(), 2)));
  }
  release_tiles();
}

int64_t scratch_bytes(const Job& job) {
  return Scratch::bytes(ceil_div(least(job.m, rows_at_a_time(job.w)), kPairRows));
}

template <int kBits>
constexpr Panel amx_panel() {
  return {amx<kBits>, kBits == 2 || kBits == 4 ? amx<kBits> : nullptr, scratch_bytes, 2, true};
}

}  // namespace

const Panel kAmxPanels[4] = {amx_panel<1>(), amx_panel<2>(), amx_panel<4>(), amx_panel<8>()};

}  // namespace lowbit
