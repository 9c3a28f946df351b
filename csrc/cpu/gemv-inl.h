// GEMV and few rows: bound by memory, so packed weights are read once, as one linear stream, and unpacked in
// the inner loop.
//
// Shift-free: position i of a byte is masked where it stands, not moved down, and the positions i = a mod kA
// of all vectors have accumulator a. What stands at position i is the code times 2^(i * bits), so every
// partial sum of accumulator a is a multiple of 2^(a % positions * bits): one arithmetic shift at the end of
// a span is exact. Where rows need the registers, kA < positions, and vectors are moved down by kA positions
// at a time. Where kA > positions, several vectors are in flight, which hides the latency of the dot product.
#pragma once

#include "qlinear-inl.h"

namespace lowbit {
namespace {

// Bytes that are asked for ahead: into L1 (kOnce), and before that, where weights come from memory, into L2, which holds
// no fill buffer of L1 while memory answers (kTwice).
enum class Requests { kNone, kOnce, kTwice };
constexpr int64_t kPrefetch = 2048, kPrefetchFar = 3072;
// A thread's weights below this size may be in L2, where asking twice costs 5 to 25 %.
constexpr int64_t kNear = 1 << 21;
// Bytes that a stream reads on end, several blocks where they are shorter.
constexpr int64_t kRun = 1 << 16;
// With more rows than these, multiplying takes as long as memory: runs and a second request do not help.
constexpr int kMemoryRows = 2;

// kM rows of activations against kN blocks of 16 outputs: kN streams through memory.
template <class S, class Source, int kM, int kN, Requests kRequests>
struct Strip {
  static constexpr int kP = Source::kPositions;
  static constexpr int kA = S::kAccumulators < kM * kN ? 1 : S::kAccumulators / (kM * kN);
  static constexpr int kVectors = kA > kP ? kA / kP : 1;  // in flight
  static constexpr int kBytes = tile_bytes(Source::kBits);

  // Stream n is at block + n * apart; those from `end` on do not exist: they repeat the last one and are not stored.
  struct Place {
    int64_t block, apart, end;
    int64_t skip;  // blocks that a stream leaves out before its next one

    int64_t of(int64_t n) const { return block + n * apart; }
  };

  const int8_t* x[kM];
  int64_t first;  // row

  // total[m][n] = sum over tiles [begin, end) of operand * q, exact in int32. skip: bytes, see Place.
  LOWBIT_INLINE void dot(const uint8_t* const (&w)[kN], int64_t begin, int64_t end, int64_t block_bytes,
                         int64_t skip, const typename S::Lut& lut, typename S::I32 (&total)[kM][kN]) const {
    typename S::I32 acc[kM][kN][kA];
    unroll<kM * kN * kA>([&](auto i)
                             LOWBIT_LAMBDA { acc[i / (kN * kA)][i / kA % kN][i % kA] = S::zero_i32(); });
    const int64_t last = end * kBytes;
    int64_t at = begin * kBytes, k = begin * kTileK;
    // Where a stream leaves its block it may skip others; hardware prefetchers cannot know that.
    const int64_t turn = block_bytes - kPrefetch, jump = kPrefetch + skip;
    const int64_t far_turn = block_bytes - kPrefetchFar, far_jump = kPrefetchFar + skip;
    do {
      const int64_t ahead = at < turn ? kPrefetch : jump, far_ahead = at < far_turn ? kPrefetchFar : far_jump;
      unroll<kVectors>([&](auto v) LOWBIT_LAMBDA {
        typename S::Bytes raw[kN];
        unroll<kN>([&](auto n) LOWBIT_LAMBDA {
          const uint8_t* from = w[n] + at + v * kVectorBytes;
          if constexpr (kRequests != Requests::kNone) __builtin_prefetch(from + ahead);
          if constexpr (kRequests == Requests::kTwice) __builtin_prefetch(from + far_ahead, 0, 2);
          raw[n] = S::load(from);
        });
        unroll<kP>([&](auto i) LOWBIT_LAMBDA {
          constexpr int kRow = decltype(i)::value, kAt = decltype(v)::value * kP + kRow;
          typename S::Bytes codes[kN];
          unroll<kN>([&](auto n)
                         LOWBIT_LAMBDA { codes[n] = Source::template row_in_place<kRow, kA>(raw[n], lut); });
          unroll<kM>([&](auto m) LOWBIT_LAMBDA {
            const typename S::X4 four = S::broadcast4(x[m] + k + 4 * kAt);
            unroll<kN>([&](auto n) LOWBIT_LAMBDA {
              auto& a = acc[m][n][kAt % kA];
              a = S::template dot<Source::kOperand>(a, codes[n], four);
            });
          });
        });
      });
      at += kVectors * kVectorBytes;
      k += kVectors * kP * 4;
    } while (at < last);
    unroll<kM * kN>([&](auto c) LOWBIT_LAMBDA {
      auto& sums = acc[c / kN][c % kN];
      if constexpr (Source::kMaskable && kA > 1) {
        unroll<kA>([&](auto i) LOWBIT_LAMBDA {
          constexpr int kUp = decltype(i)::value % kP * Source::kBits;
          if constexpr (kUp > 0) sums[i] = S::template shift_right<kUp>(sums[i]);
        });
      }
      total[c / kN][c % kN] = sum<kA>(sums);
    });
  }

  template <int kCount, int kSize>
  static LOWBIT_INLINE typename S::I32 sum(typename S::I32 (&a)[kSize]) {
    if constexpr (kCount > 1) {
      unroll<kCount / 2>([&](auto i) LOWBIT_LAMBDA { a[i] = S::add(a[i], a[i + kCount / 2]); });
      return sum<kCount / 2>(a);
    }
    return a[0];
  }

  LOWBIT_INLINE void multiply(const Job& job, const Place& place, const typename S::Lut& lut) const {
    const Matrix& w = job.w;
    const int64_t spans = w.spans(), span_tiles = w.span_tiles(), tiles = w.tiles_k();
    const int32_t a = Source::kOperand == Operand::kCode ? w.a : 1;
    const int32_t b = Source::kOperand == Operand::kCode ? w.b : -128;
    const uint8_t* weights[kN];
    const uint16_t* scales[kN];
    typename S::F32 y[kM][kN];
    unroll<kN>([&](auto n) LOWBIT_LAMBDA {
      const int64_t at = least(place.of(n), place.end - 1);
      weights[n] = w.tiles + at * w.block_bytes();
      scales[n] = w.scales + at * spans * kTileN;
      const typename S::F32 bias = load_bias<S>(job, at);
      unroll<kM>([&](auto m) LOWBIT_LAMBDA { y[m][n] = bias; });
    });
    for (int64_t s = 0; s < spans; ++s) {
      typename S::I32 total[kM][kN];
      dot(weights, s * span_tiles, least(tiles, (s + 1) * span_tiles), w.block_bytes(),
          place.skip * w.block_bytes(), lut, total);
      typename S::F32 scale[kN];
      unroll<kN>([&](auto n) LOWBIT_LAMBDA {
        __builtin_prefetch(scales[n] + (s + (1 + place.skip) * spans) * kTileN);  // this stream's next block
        scale[n] = S::load_half(scales[n] + s * kTileN);
      });
      unroll<kM>([&](auto m) LOWBIT_LAMBDA {
        const int64_t at = (first + m) * spans + s;
        const typename S::F32 sx = S::set1(job.act.scale[at]);
        const uint32_t offset = static_cast<uint32_t>(b) * static_cast<uint32_t>(job.act.sum[at]);
        unroll<kN>([&](auto n) LOWBIT_LAMBDA {
          auto& t = total[m][n];
          if constexpr (Source::kOperand != Operand::kLevel)
            t = S::affine(t, a, static_cast<int32_t>(offset));
          y[m][n] = S::fmadd(S::to_f32(t), S::mul(scale[n], sx), y[m][n]);
        });
      });
    }
    unroll<kM * kN>([&](auto c) LOWBIT_LAMBDA {
      constexpr int m = decltype(c)::value / kN, n = decltype(c)::value % kN;
      if (place.of(n) >= place.end) return;
      const int64_t column = place.of(n) * kTileN;
      S::store_f32(job.y + (first + m) * job.y_stride + column, y[m][n],
                   static_cast<int>(least(kTileN, w.n - column)));
    });
  }

  static void run(const Job& job, Range blocks, int64_t first, const typename S::Lut& lut) {
    Strip strip;
    strip.first = first;
    for (int m = 0; m < kM; ++m) strip.x[m] = job.act.at(first + m, 0);
    const int64_t fitting = kRun / job.w.block_bytes(), run = kM <= kMemoryRows && fitting > 1 ? fitting : 1;
    for (int64_t block = blocks.begin; block < blocks.end; block += kN * run) {
      const int64_t apart = least(run, ceil_div(blocks.end - block, kN));
      for (int64_t i = 0; i < apart; ++i) {
        const int64_t skip = i + 1 < apart ? 0 : (kN - 1) * apart;
        strip.multiply(job, {block + i, apart, blocks.end, skip}, lut);
      }
    }
  }
};

template <class S, class Source, int kM>
void strips(const Job& job, Range blocks, int64_t first, const typename S::Lut& lut) {
  constexpr int kN = S::blocks(kM, Source::kPositions);
  if constexpr (kM <= kMemoryRows) {
    if (!requests_weights()) return Strip<S, Source, kM, kN, Requests::kNone>::run(job, blocks, first, lut);
    // At 1 bit a line takes long enough to multiply.
    if (Source::kBits > 1 && blocks.size() * job.w.block_bytes() >= kNear) {
      return Strip<S, Source, kM, kN, Requests::kTwice>::run(job, blocks, first, lut);
    }
  }
  Strip<S, Source, kM, kN, Requests::kOnce>::run(job, blocks, first, lut);
}

constexpr int64_t kBlocksAtATime = 4;  // their packed weights stay in L2 while all rows pass

template <class S, int kBits, bool kLookup>
void int8_small(const Job& job, Range blocks, Range rows, uint8_t* /*scratch*/) {
  using Source = Packed<S, kBits, kLookup>;
  typename S::Lut lut{};
  if constexpr (kLookup) lut = S::load_lut(job.w.levels);
  const int64_t step = rows.size() <= S::kMaxRows ? blocks.size() : kBlocksAtATime;
  for (int64_t block = blocks.begin; block < blocks.end; block += step) {
    const Range some{block, least(block + step, blocks.end)};
    for (int64_t m = rows.begin; m < rows.end; m += S::kMaxRows) {
      with_constant<1, S::kMaxRows>(least(rows.end - m, S::kMaxRows),
                                    [&](auto count) { strips<S, Source, count>(job, some, m, lut); });
    }
  }
}

}  // namespace
}  // namespace lowbit
