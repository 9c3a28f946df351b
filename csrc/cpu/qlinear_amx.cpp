// AMX: int8 tiles for large M. C[16 rows][16 outputs] += A[16 rows][64 inputs] * B[64 inputs][16 outputs].
//
// A is the activations in tile order (qlinear.h). B is a tile of layout.h, unpacked to signed levels: its row
// r of 64 bytes [output][4 inputs] is row r of the tile register. Two A and two B tiles feed four
// accumulators.
//
// Loops, outside in:  rows that fit L2  ->  two blocks (32 outputs)  ->  a chunk of kChunkTiles * 64 inputs,
// unpacked once into L1  ->  32 rows at a time. Accumulators wait in `partial` between the chunks of a span.
#include "dispatch.h"
#include "qlinear-inl.h"
#include "simd_avx512-inl.h"

namespace lowbit {
namespace {

constexpr int kTileBytes = 1024, kTileRows = 16;
constexpr int kChunkTiles = 16;             // B: 2 * 16 KiB, in L1
constexpr int64_t kRowBytesInL2 = 1 << 20;  // of activations
constexpr int64_t kMaxRowsAtATime = 1024;

// C 0-3 = [row group][block], A 4-5, B 6-7.
constexpr int kTileA = 4, kTileB = 6;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64, "LDTILECFG reads 64 bytes");

// Own assembly instead of the intrinsics: GCC's have no memory clobber, and up to version 12 its
// _tile_loadconfig claims to read 8 of the 64 bytes, so that the stores to the others are deleted.
void load_config(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config)); }
void release_tiles() { __asm__ volatile("tilerelease" ::: "memory"); }

template <int kTile>
LOWBIT_INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
LOWBIT_INLINE void tile_load(const void* p) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(64L), "i"(kTile) : "memory");
}
template <int kTile>
LOWBIT_INLINE void tile_store(void* p) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(64L), "i"(kTile) : "memory");
}
template <int kC, int kA, int kB>
LOWBIT_INLINE void tile_dot() {  // signed x signed
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

// Unpacks `tiles` tiles of one block to signed levels, 1024 bytes each.
template <int kBits>
void unpack_levels(const uint8_t* from, int64_t tiles, __m512i lut, uint8_t* to) {
  for (int64_t v = 0; v < tiles * vectors_per_tile(kBits); ++v) {
    const __m512i raw = Avx512::load(from + v * kVectorBytes);
    unroll<positions(kBits)>([&](auto i) LOWBIT_LAMBDA {
      __m512i level;
      if constexpr (kBits == 8) {
        level = _mm512_xor_si512(raw, _mm512_set1_epi8(static_cast<char>(0x80)));
      } else {
        level = _mm512_shuffle_epi8(lut, Avx512::codes<kBits, decltype(i)::value>(raw));
      }
      Avx512::store(to, level);
      to += kVectorBytes;
    });
  }
}

struct Chunk {
  const uint8_t* b[2];  // unpacked blocks
  int64_t tile, tiles;  // along K
  bool first, last;     // of its span
};

// kA row groups x kB blocks over one chunk. partial: [kA][kB] C tiles.
template <int kA, int kB>
void multiply(const Job& job, const Chunk& chunk, int64_t group, uint8_t* partial) {
  unroll<kA * kB>([&](auto c) LOWBIT_LAMBDA {
    constexpr int kC = c / kB * 2 + c % kB;
    if (chunk.first) {
      tile_zero<kC>();
    } else {
      tile_load<kC>(partial + c * kTileBytes);
    }
  });
  const int8_t* a[kA];
  for (int i = 0; i < kA; ++i) a[i] = job.act.at((group + i) * kTileRows, chunk.tile);
  for (int64_t t = 0; t < chunk.tiles; ++t) {
    unroll<kB>([&](auto j) LOWBIT_LAMBDA { tile_load<kTileB + j>(chunk.b[j] + t * kTileBytes); });
    unroll<kA>([&](auto i) LOWBIT_LAMBDA {
      tile_load<kTileA + i>(a[i] + t * kTileBytes);
      unroll<kB>([&](auto j) LOWBIT_LAMBDA { tile_dot<i * 2 + j, kTileA + i, kTileB + j>(); });
    });
  }
  unroll<kA * kB>([&](auto c) LOWBIT_LAMBDA { tile_store<c / kB * 2 + c % kB>(partial + c * kTileBytes); });
}

// y += scale * sx * C for one finished C tile; the first span starts from the bias.
void fold(const Job& job, const uint8_t* partial, int64_t group, int64_t block, int64_t span) {
  const int64_t spans = job.w.spans(), end = least(job.m, (group + 1) * kTileRows);
  const int count = static_cast<int>(least(kTileN, job.w.n - block * kTileN));
  const __m512 scale = Avx512::load_half(job.w.scales + (block * spans + span) * kTileN);
  const __m512 bias = load_bias<Avx512>(job, block);
  for (int64_t m = group * kTileRows; m < end; ++m, partial += 64) {
    float* y = job.y + m * job.y_stride + block * kTileN;
    const __m512 before = span == 0 ? bias : Avx512::load_f32(y, count);
    const __m512 total = Avx512::to_f32(Avx512::load(partial));
    const __m512 sx = Avx512::set1(job.act.scale[m * spans + span]);
    Avx512::store_f32(y, Avx512::fmadd(total, Avx512::mul(scale, sx), before), count);
  }
}

template <int kB>
void rows_of_chunk(const Job& job, const Chunk& chunk, Range groups, int64_t block, int64_t span,
                   uint8_t* partial) {
  for (int64_t group = groups.begin; group < groups.end; group += 2, partial += 4 * kTileBytes) {
    const int count = group + 1 < groups.end ? 2 : 1;
    if (count == 2) {
      multiply<2, kB>(job, chunk, group, partial);
    } else {
      multiply<1, kB>(job, chunk, group, partial);
    }
    if (!chunk.last) continue;
    for (int c = 0; c < count * kB; ++c)
      fold(job, partial + c * kTileBytes, group + c / kB, block + c % kB, span);
  }
}

int64_t rows_at_a_time(const Matrix& w) {
  const int64_t rows = kRowBytesInL2 / (w.tiles_k() * kTileK) / 32 * 32;
  return rows < 32 ? 32 : least(rows, kMaxRowsAtATime);
}

// One panel of kB blocks for some row groups.
template <int kBits, int kB>
void panel(const Job& job, int64_t block, Range groups, uint8_t* scratch) {
  const Matrix& w = job.w;
  const __m512i lut = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.levels)));
  uint8_t* partial = scratch + 2 * kChunkTiles * kTileBytes;
  for (int64_t s = 0; s < w.spans(); ++s) {
    const int64_t begin = s * w.span_tiles(), end = least(w.tiles_k(), begin + w.span_tiles());
    for (int64_t t = begin; t < end; t += kChunkTiles) {
      Chunk chunk{{}, t, least(kChunkTiles, end - t), t == begin, t + kChunkTiles >= end};
      for (int j = 0; j < kB; ++j) {
        uint8_t* to = scratch + j * kChunkTiles * kTileBytes;
        unpack_levels<kBits>(w.tiles + (block + j) * w.block_bytes() + t * tile_bytes(kBits), chunk.tiles,
                             lut, to);
        chunk.b[j] = to;
      }
      rows_of_chunk<kB>(job, chunk, groups, block, s, partial);
    }
  }
}

template <int kBits>
void amx(const Job& job, Range blocks, Range rows, uint8_t* scratch) {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = 64;
    // With fewer than 16 rows in all, shorter A and C tiles take fewer cycles.
    config.rows[i] = static_cast<uint8_t>(i < kTileB ? least(job.m, kTileRows) : kTileRows);
  }
  load_config(config);
  const int64_t step = rows_at_a_time(job.w);
  for (int64_t m = rows.begin; m < rows.end; m += step) {
    const Range groups{m / kTileRows, ceil_div(least(m + step, rows.end), kTileRows)};
    for (int64_t block = blocks.begin; block < blocks.end; block += 2) {
      if (block + 1 < blocks.end) {
        panel<kBits, 2>(job, block, groups, scratch);
      } else {
        panel<kBits, 1>(job, block, groups, scratch);
      }
    }
  }
  release_tiles();
}

int64_t scratch_bytes(const Job& job) {
  const int64_t rows = ceil_div(least(job.m, rows_at_a_time(job.w)), 32);
  return (2 * kChunkTiles + 4 * rows) * kTileBytes;
}

template <int kBits>
constexpr Panel amx_panel() {
  return {amx<kBits>, kBits == 2 || kBits == 4 ? amx<kBits> : nullptr, scratch_bytes, 2, true};
}

}  // namespace

const Panel kAmxPanels[4] = {amx_panel<1>(), amx_panel<2>(), amx_panel<4>(), amx_panel<8>()};

}  // namespace lowbit
