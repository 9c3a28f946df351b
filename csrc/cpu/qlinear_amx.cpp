// AMX: int8 tiles for large M. C[16 rows][16 outputs] += A[16 rows][64 inputs] * B[64 inputs][16 outputs].
//
// A is the activations in tile order (qlinear.h). B is a tile of layout.h, unpacked to signed levels: its row
// r of 64 bytes [output][4 inputs] is row r of the tile register. Two A and two B tiles feed four
// accumulators: one tile load a dot product.
//
// Loops, outside in:  rows that fit L2  ->  two blocks (32 outputs)  ->  a chunk of at most kChunkTiles * 64
// inputs, unpacked into L1  ->  32 rows at a time. The tile unit works beside the vector units, and everything
// else hides behind its products: between two steps of 64 inputs, the vector units fold a few rows of the
// accumulators that were stored last into the output, and the last rows of a chunk leave the next one in its place.
#include "amx-inl.h"
#include "dispatch.h"
#include "qlinear-inl.h"
#include "simd_avx512-inl.h"

namespace lowbit {
namespace {

constexpr int kChunkTiles = 12;             // two blocks: 24 KiB, half of L1
constexpr int kShortChunkTiles = 8;         // where a chunk serves one pair of row groups only
constexpr int64_t kRowBytesInL2 = 1 << 20;  // of activations
constexpr int64_t kNear = 1 << 20;          // packed weights up to this size stay in L2 from call to call
constexpr int64_t kMaxRowsAtATime = 1024;

// C 0-3 = [row group][block], A 4-5, B 6-7.
constexpr int kTileA = 4, kTileB = 6;
constexpr int kPairRows = 2 * kTileRows;
constexpr int64_t kPairBytes = 4 * kTileBytes,
                  kHalfBytes = 2 * kTileBytes;  // accumulators: [2 blocks][32 rows][16]

// Consecutive inputs of two blocks: a span, or a part of one.
struct Chunk {
  int64_t block, tile, tiles, span;
  bool first, last;  // of its span
};

struct Scratch {
  uint8_t* b;     // the unpacked chunk: [2 blocks][kChunkTiles] tiles
  uint8_t* c;     // int32 accumulators of every pair of row groups
  uint8_t* sums;  // fp32 sums of all spans so far, likewise

  static int64_t bytes(int64_t pairs) { return 2 * kChunkTiles * kTileBytes + 2 * pairs * kPairBytes; }
  Scratch(uint8_t* at, int64_t pairs)
      : b(at), c(at + 2 * kChunkTiles * kTileBytes), sums(c + pairs * kPairBytes) {}
};

// Brings the packed bytes of the next chunk to L2 while this one is multiplied, or unpacking would wait for them.
class Prefetcher {
 public:
  // blocks: 1 or 2. steps: how often step() will be called.
  void start(const Matrix& w, const Chunk& chunk, int blocks, int64_t steps) {
    at_ = w.tiles + chunk.block * w.block_bytes() + chunk.tile * tile_bytes(w.bits);
    stride_ = (blocks - 1) * w.block_bytes();
    left_ = chunk.tiles * vectors_per_tile(w.bits);
    quota_ = ceil_div(left_, steps);
  }
  LOWBIT_INLINE void step() {
    const int64_t quota = least(quota_, left_);
    left_ -= quota;
    for (const uint8_t* end = at_ + quota * kVectorBytes; at_ < end; at_ += kVectorBytes) {
      _mm_prefetch(at_, _MM_HINT_T1);
      _mm_prefetch(at_ + stride_, _MM_HINT_T1);
    }
  }

 private:
  const uint8_t* at_ = nullptr;
  int64_t stride_ = 0, left_ = 0, quota_ = 0;  // lines of a block
};

// Unpacks a chunk to signed levels.
template <int kBits>
class Unpacker {
 public:
  explicit Unpacker(const Matrix& w)
      : w_(w), lut_(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.levels)))) {}

  // blocks: 1 or 2; where there is but one, it stands in for the other.
  void start(const Chunk& chunk, int blocks) {
    for (int j = 0; j < 2; ++j) {
      from_[j] = w_.tiles + (chunk.block + (j < blocks ? j : 0)) * w_.block_bytes() + chunk.tile * kPacked;
    }
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
    if constexpr (kBits == 8) {
      return _mm512_xor_si512(raw, _mm512_set1_epi8(static_cast<char>(0x80)));
    } else {
      return _mm512_permutexvar_epi8(kRow == 0 ? raw : _mm512_srli_epi16(raw, kRow * kBits), lut);
    }
  }

  const Matrix& w_;
  const __m512i lut_;
  const uint8_t* from_[2];
  int64_t tiles_;
};

// A vector of each row: at a stride, or one for all rows where it is 0.
struct Rows {
  uint8_t* at;
  int64_t stride;  // bytes
};

// Turns the accumulators of a complete span into outputs, a few rows at a time:
// y = bias + sum over spans of scale * sx * C.
class Folder {
 public:
  explicit Folder(const Job& job) : job_(job) {}

  // The pair of row groups that begins at row; c and sums: its accumulators.
  void start(const Chunk& chunk, int64_t row, const uint8_t* c, uint8_t* sums) {
    const Matrix& w = job_.w;
    const int64_t spans = w.spans();
    left_ = least(job_.m - row, kPairRows);
    c_ = c;
    sx_ = job_.act.scale + row * spans + chunk.span;
    sx_stride_ = spans;
    const bool complete = chunk.span + 1 == spans;
    for (int j = 0; j < 2; ++j) {
      const int64_t block = least(chunk.block + j, w.blocks() - 1), output = block * kTileN;
      uint8_t* so_far = sums + j * kHalfBytes;
      Avx512::store_f32(scale_[j], Avx512::load_half(w.scales + (block * spans + chunk.span) * kTileN),
                        kTileN);
      Avx512::store_f32(bias_[j], load_bias<Avx512>(job_, block), kTileN);
      before_[j] =
          chunk.span > 0 ? Rows{so_far, kVectorBytes} : Rows{reinterpret_cast<uint8_t*>(bias_[j]), 0};
      after_[j] = complete ? Rows{reinterpret_cast<uint8_t*>(job_.y + row * job_.y_stride + output),
                                  job_.y_stride * 4}
                           : Rows{so_far, kVectorBytes};
      const int64_t count = complete ? least(kTileN, w.n - output) : kTileN;
      mask_[j] = Avx512::first(block == chunk.block + j ? static_cast<int>(count) : 0);
    }
  }

  LOWBIT_INLINE void step(int64_t quota) {
    quota = least(quota, left_);
    if (quota <= 0) return;
    left_ -= quota;
    const __m512 scale[2] = {Avx512::load_f32(scale_[0]), Avx512::load_f32(scale_[1])};
    const __mmask16 mask[2] = {mask_[0], mask_[1]};
    Rows before[2] = {before_[0], before_[1]}, after[2] = {after_[0], after_[1]};
    const uint8_t* c = c_;
    const float* sx = sx_;
    const int64_t sx_stride = sx_stride_;
    do {
      const __m512 row_scale = Avx512::set1(*sx);
      unroll<2>([&](auto j) LOWBIT_LAMBDA {
        const __m512 sum = Avx512::to_f32(Avx512::load(c + j * kHalfBytes));
        const __m512 so_far = Avx512::load_f32(reinterpret_cast<const float*>(before[j].at));
        const __m512 y = Avx512::fmadd(sum, Avx512::mul(scale[j], row_scale), so_far);
        _mm512_mask_storeu_ps(after[j].at, mask[j], y);
        before[j].at += before[j].stride;
        after[j].at += after[j].stride;
      });
      c += kVectorBytes;
      sx += sx_stride;
    } while (--quota > 0);
    c_ = c, sx_ = sx;
    for (int j = 0; j < 2; ++j) before_[j].at = before[j].at, after_[j].at = after[j].at;
  }

 private:
  const Job& job_;
  int64_t left_ = 0;  // rows
  const uint8_t* c_ = nullptr;
  const float* sx_ = nullptr;
  int64_t sx_stride_ = 0;
  Rows before_[2] = {}, after_[2] = {};
  __mmask16 mask_[2] = {};
  alignas(64) float scale_[2][kTileN], bias_[2][kTileN];
};

// kA row groups x kB blocks over one chunk, from and to the accumulators c. between(t, j) runs when tile t of
// block j has been read, fold() once a step.
template <int kA, int kB, class F, class G>
LOWBIT_INLINE void multiply(const Job& job, const Chunk& chunk, int64_t group, const uint8_t* b, uint8_t* c,
                            const F& between, const G& fold) {
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
        if constexpr (i == 0) tile_load<kTileB + j>(b + (j * kChunkTiles + t) * kTileBytes);
        tile_dot<i * 2 + j, kTileA + i, kTileB + j>();
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
  const Matrix& w = job.w;
  Unpacker<kBits> unpacker(w);
  Folder folder(job);
  Prefetcher prefetcher;
  const auto width = [&](const Chunk& chunk) { return static_cast<int>(least(2, blocks.end - chunk.block)); };
  const auto unpack_from = [&](int64_t t) {
    for (; t < unpacker.tiles(); ++t) {
      unpacker.tile(0, t, scratch.b);
      unpacker.tile(1, t, scratch.b);
    }
  };
  const bool far = groups.size() > 2 && blocks.size() * w.block_bytes() > kNear;
  const int64_t most = groups.size() > 2 ? kChunkTiles : kShortChunkTiles;
  Chunk chunk = next(w, Chunk{blocks.begin - 2, w.tiles_k(), 0, 0, false, false}, most);
  unpacker.start(chunk, width(chunk));
  unpack_from(0);
  while (chunk.block < blocks.end) {
    const Chunk following = next(w, chunk, most);
    if (following.block < blocks.end) {
      unpacker.start(following, width(following));
      if (far) prefetcher.start(w, following, width(following), (groups.size() - 1) / 2 * chunk.tiles);
    }
    const int64_t quota = ceil_div(kPairRows, chunk.tiles);
    const auto fold = [&]() LOWBIT_LAMBDA {
      folder.step(quota);
      prefetcher.step();
    };
    for (int64_t group = groups.begin; group < groups.end; group += 2) {
      // Accumulators wait between the chunks of a span; else all pairs share those of the first, in L1.
      const int64_t at = (group - groups.begin) / 2 * kPairBytes;
      const bool two = group + 1 < groups.end;
      const int64_t unpacked = group + 2 >= groups.end && following.block < blocks.end ? unpacker.tiles() : 0;
      const auto between = [&](int64_t t, int j) LOWBIT_LAMBDA {
        if (t < unpacked) unpacker.tile(j, t, scratch.b);
      };
      uint8_t* c = scratch.c + (chunk.first && chunk.last ? 0 : at);
      if (width(chunk) == 1) {
        two ? multiply<2, 1>(job, chunk, group, scratch.b, c, between, fold)
            : multiply<1, 1>(job, chunk, group, scratch.b, c, between, fold);
      } else {
        two ? multiply<2, 2>(job, chunk, group, scratch.b, c, between, fold)
            : multiply<1, 2>(job, chunk, group, scratch.b, c, between, fold);
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
