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

// Tile registers: C 0-3 = [row group][block], A 4-5, B 6-7.
constexpr int kTileA = 4, kTileB = 6;

// Some rows times some blocks.
template <int kBits>
class Product {
 public:
  Product(const Job& job, Range blocks, Range rows, const Scratch& scratch)
      : job_(job),
        w_(job.w),
        blocks_(blocks),
        rows_(rows),
        scratch_(scratch),
        unpacker_(w_),
        folder_(job, rows.end) {}

  void run() {
    const int64_t pairs = ceil_div(rows_.size(), kPairRows), early = pairs - (kCodes ? 0 : 1);
    const bool far = pairs > 1 && blocks_.size() * w_.block_bytes() > kNear;
    const int64_t most = pairs > 1 ? kChunkTiles : kShortChunkTiles;
    const Cutter cutter(w_, most);
    Chunk chunk = cutter.first(blocks_.begin);
    unpacker_.start(chunk, width(chunk));
    unpack_from(0);
    while (chunk.block < blocks_.end) {
      const Chunk following = cutter.after(chunk);
      const bool more = following.block < blocks_.end;
      if (more) {
        unpacker_.start(following, width(following));
        if (far) {
          prefetcher_.start(packed(w_, following, 0, 1), (width(following) - 1) * w_.block_bytes(),
                            following.tiles * vectors_per_tile(w_.bits), early * chunk.tiles);
        }
      }
      for (int64_t pair = 0; pair < pairs; ++pair) {
        multiply(chunk, pair, pair + 1 == pairs && more ? unpacker_.tiles() : 0);
      }
      if (more) unpack_from(chunk.tiles);
      chunk = following;
    }
    finish();
  }

 private:
  static constexpr bool kCodes = kBits == 8;  // tiles that are bytes are read where they lie

  int width(const Chunk& chunk) const { return static_cast<int>(least(2, blocks_.end - chunk.block)); }

  void unpack_from(int64_t t) {
    for (; !kCodes && t < unpacker_.tiles(); ++t) {
      unpacker_.tile(0, t, scratch_.b);
      unpacker_.tile(1, t, scratch_.b);
    }
  }

  // One pair of row groups against a chunk. unpacked: tiles of the next chunk to leave in its place.
  void multiply(const Chunk& chunk, int64_t pair, int64_t unpacked) {
    const int64_t span_tiles = w_.span_tiles(), at = pair * kPairBytes;
    Segment now{};
    now.block = chunk.block;
    now.row = rows_.begin + pair * kPairRows;
    now.row_groups = rows_.end - now.row > kTileRows ? 2 : 1;
    now.blocks = width(chunk);
    now.sums = scratch_.sums + at;
    now.span = chunk.span;
    int64_t span_begin = chunk.begin;
    for (int64_t t = 0, tiles; t < chunk.tiles; t += tiles, ++now.span, span_begin += span_tiles) {
      tiles = least(span_tiles, chunk.tiles - t);
      const int64_t begin = chunk.tile + t, end = begin + tiles;
      now.first = begin == span_begin;
      now.last = end == span_begin + span_tiles || end == w_.tiles_k();
      // Accumulators wait between the chunks of a span; else all pairs share those of the first, in L1.
      now.c = scratch_.c + (now.first && now.last ? 0 : at);
      const int8_t* a[2];
      const uint8_t* b[2];
      for (int i = 0; i < 2; ++i) {
        a[i] = job_.act.at(now.row + i * kTileRows, begin);
        b[i] = kCodes ? packed(w_, chunk, i, now.blocks) + t * kTileBytes
                      : scratch_.b + (i * kChunkTiles + t) * kTileBytes;
      }
      const auto between = [&](int64_t step, int j) LOWBIT_LAMBDA {
        if (!kCodes && t + step < unpacked) unpacker_.tile(j, t + step, scratch_.b);
      };
      if (now.row_groups == 2) {
        now.blocks == 2 ? accumulate<2, 2>(now, a, b, tiles, between)
                        : accumulate<2, 1>(now, a, b, tiles, between);
      } else {
        now.blocks == 2 ? accumulate<1, 2>(now, a, b, tiles, between)
                        : accumulate<1, 1>(now, a, b, tiles, between);
      }
      before_ = now;
    }
  }

  // kA row groups x kB blocks over `tiles` tiles from a and b. The accumulators of the segment before are stored one by
  // one between the first products, so that the tile unit need not wait, and folded during the others.
  // between(t, j) runs when tile t of block j has been read.
  template <int kA, int kB, class F>
  LOWBIT_INLINE void accumulate(const Segment& now, const int8_t* const (&a)[2], const uint8_t* const (&b)[2],
                                int64_t tiles, const F& between) {
    const bool carry = !now.first && before_.c == now.c;  // the accumulators stay where they are
    const auto step = [&](auto begin, int64_t t) LOWBIT_LAMBDA {
      unroll<4>([&](auto q) LOWBIT_LAMBDA {
        constexpr int i = decltype(q)::value / 2, j = decltype(q)::value % 2;
        constexpr bool kUsed = i < kA && j < kB;
        if constexpr (kUsed && j == 0) tile_stream<kTileA + i>(a[i] + t * kTileBytes);
        if constexpr (kUsed && i == 0) tile_load<kTileB + j>(b[j] + t * kTileBytes);
        if (begin && !carry) {
          store<q>();
          if constexpr (kUsed) now.first ? tile_zero<q>() : tile_load<q>(accumulator(now, q));
        }
        if constexpr (kUsed) tile_dot<q, kTileA + i, kTileB + j, kCodes>();
        if constexpr (kUsed && i == kA - 1) between(t, j);
      });
      prefetcher_.step();
    };
    folder_.step(kPairRows);
    step(std::true_type(), 0);
    if (!carry && before_.last) folder_.start(before_);
    if (tiles != quota_tiles_) {  // a division spared: 2 to 4 % where segments are short
      quota_tiles_ = tiles;
      quota_ = ceil_div(kPairRows, tiles);
    }
    const int64_t quota = quota_;
    for (int64_t t = 1; t < tiles; ++t) {
      step(std::false_type(), t);
      folder_.step(quota);
    }
  }

  static uint8_t* accumulator(const Segment& s, int q) { return s.c + (q % 2 * 2 + q / 2) * kTileBytes; }

  template <int kC>
  LOWBIT_INLINE void store() const {
    if (kC / 2 < before_.row_groups && kC % 2 < before_.blocks) tile_store<kC>(accumulator(before_, kC));
  }

  void finish() {
    folder_.step(kPairRows);
    unroll<4>([&](auto q) LOWBIT_LAMBDA { store<q>(); });
    folder_.start(before_);
    folder_.step(kPairRows);
  }

  const Job& job_;
  const Matrix& w_;
  const Range blocks_, rows_;
  const Scratch scratch_;
  Unpacker<kBits> unpacker_;
  Folder<kCodes> folder_;
  Prefetcher<2> prefetcher_;
  int64_t quota_tiles_ = 0, quota_ = 0;  // rows to fold in each of so many steps
  Segment before_{};                     // its accumulators are still in registers
};

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
    const Range some{m, least(m + step, rows.end)};
    Product<kBits>(job, blocks, some, Scratch(scratch, ceil_div(some.size(), kPairRows))).run();
  }
  release_tiles();
}

int64_t scratch_bytes(const Job& job) {
  return Scratch::bytes(ceil_div(least(job.m, rows_at_a_time(job.w)), kPairRows));
}

template <int kBits>
constexpr Panel amx_panel() {
  return {amx<kBits>, kBits == 2 || kBits == 4 ? amx<kBits> : nullptr, scratch_bytes, 2, true, true};
}

}  // namespace

const Panel kAmxPanels[4] = {amx_panel<1>(), amx_panel<2>(), amx_panel<4>(), amx_panel<8>()};

}  // namespace lowbit
