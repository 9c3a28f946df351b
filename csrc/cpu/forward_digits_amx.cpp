// Attention in integers of sixteen queries together, by AMX.
//
// For one head: keys and values of all tokens are packed once, 16 tokens at a time; then for every 16 queries
//
//   scores   C[query][token] = Q [query][dim] * K [dim / 4][token][4]     for every block of tokens that any query sees
//   weights  e^(score - top), as digits [query][token]
//   mix      C[query][dim]   = P [query][token] * V [token / 4][dim][4]   for every four blocks
#include <algorithm>
#include <cstring>

#include "amx-inl.h"
#include "forward_digits_alone-inl.h"
#include "workspace.h"

namespace lowbit {
namespace {

constexpr int kGroup = 4;                          // blocks of tokens in a tile of weights
constexpr int64_t kQuarter = kTileBytes / kGroup;  // bytes of a block's values in a tile

// Memory of one head.
struct Room {
  int64_t chunks, slices, blocks, groups, bytes;
  uint8_t *q, *k, *v, *scores, *weights, *mixed, *gathered;
  float *key_scale, *value_scale;

  Room(const DigitHead& h, uint8_t* at) {
    chunks = h.record.row() / kTileK;
    slices = h.record.row() / kTileN;
    blocks = ceil_div(h.tokens, kBlock);
    groups = ceil_div(h.most_blocks, kGroup);
    Bump memory{at};
    const auto take = [&](int64_t count) { return memory.take<uint8_t>(count); };
    q = take(2 * chunks * kTileBytes);              // [high, low][chunk] tiles
    k = take(blocks * 2 * chunks * kTileBytes);     // [block][high, low][chunk] tiles
    v = take(2 * slices * value_bytes());           // [high, low][slice][4 tokens] rows of 64 bytes
    scores = take(h.most_blocks * 2 * kTileBytes);  // [block][high, mixed] tiles
    weights = take(groups * 2 * kTileBytes);        // [group][high, low] tiles
    mixed = take(slices * 2 * kTileBytes);          // [slice][high, mixed] tiles
    gathered = take(2 * slices * kTileBytes);       // [high, low][slice] tiles
    key_scale = memory.take<float>(blocks * kBlock);
    value_scale = memory.take<float>(blocks * kBlock);
    bytes = memory.used;
  }
  // Of a slice; a tile from any block on stays inside.
  int64_t value_bytes() const { return (blocks + kGroup - 1) * kQuarter; }
  uint8_t* key_tile(int64_t block, int digit, int64_t chunk) const {
    return k + ((block * 2 + digit) * chunks + chunk) * kTileBytes;
  }
  uint8_t* values(int digit, int64_t slice) const { return v + (digit * slices + slice) * value_bytes(); }
};

// Keys and values of a block of tokens; the last token stands in for those that do not exist.
void pack(const DigitHead& h, const Room& room, int64_t block) {
  const int64_t row = h.record.row(), head = h.record.head(h.head);
  const uint8_t* record[kBlock];
  for (int i = 0; i < kBlock; ++i) record[i] = record_of(h, least(block * kBlock + i, h.tokens - 1));
  const Scales scales(h, record, kBlock);
  std::memcpy(room.key_scale + block * kBlock, scales.key, sizeof(scales.key));
  std::memcpy(room.value_scale + block * kBlock, scales.value, sizeof(scales.value));
  for (int digit = 0; digit < 2; ++digit) {
    for (int64_t chunk = 0; chunk < room.chunks; ++chunk) {
      const int64_t key = head + digit * row + chunk * kTileK, value = key + 2 * row;
      F32 x[16];
      unroll<16>([&](auto i) LOWBIT_LAMBDA { x[i] = _mm512_loadu_ps(record[i] + key); });
      Avx512::transpose(x);
      unroll<16>([&](auto i) LOWBIT_LAMBDA {
        _mm512_store_ps(room.key_tile(block, digit, chunk) + i * kVectorBytes, x[i]);
      });
      for (int quad = 0; quad < 4; ++quad) {
        __m512i v[4];
        for (int i = 0; i < 4; ++i) v[i] = _mm512_loadu_si512(record[4 * quad + i] + value);
        interleave(v);
        for (int i = 0; i < 4; ++i)
          _mm512_store_si512(room.values(digit, 4 * chunk + i) + block * kQuarter + quad * kVectorBytes,
                             v[i]);
      }
    }
  }
}

// Up to sixteen queries.
class Together {
 public:
  Together(const DigitHead& h, const Room& room, int64_t block)
      : h_(h),
        room_(room),
        first_(h.first[block]),
        count_(h.first[block + 1] - first_),
        q_(h.q + block * kBlock * h.q_stride),
        queries_(static_cast<int>(least(h.queries - block * kBlock, kBlock))) {
    for (int i = 0; i < kBlock; ++i) {
      for (int64_t e = 0; e < count_; ++e) wanted_[i] = wanted_[i] || seen(e, i) != 0;
    }
  }

  void run() {
    if (count_ == 0) return;
    const F32 scale =
        split_rows(q_, h_.q_stride, queries_, h_.record.dim, [&](int i, int64_t d, const Digits& x) {
          uint8_t* at = room_.q + d / kTileK * kTileBytes + i * kTileK;
          _mm512_store_si512(at, in_order(x.high));
          _mm512_store_si512(at + room_.chunks * kTileBytes, in_order(x.low));
        });
    _mm512_store_ps(query_scale_, query_scale(scale, h_.scale));
    for (int64_t e = 0; e < count_; ++e) e % 2 == 0 ? multiply_keys<0>(e) : multiply_keys<2>(e);
    find_tops();
    for (int i = 0; i < kBlock; ++i) sums_[i] = wanted_[i] ? weigh_row(i) : _mm512_setzero_si512();
    for (int64_t s = 0; s < room_.slices; s += 2) mix(s);
    write();
  }

 private:
  int64_t block(int64_t entry) const { return h_.blocks[first_ + entry]; }
  __mmask16 seen(int64_t entry, int query) const { return h_.masks[(first_ + entry) * kBlock + query]; }
  uint8_t* score_row(int64_t entry, int tile, int query) const {
    return room_.scores + (entry * 2 + tile) * kTileBytes + query * kVectorBytes;
  }

  // Tiles: kC high * high, kC + 1 high * low; 4 and 5 the queries, 6 and 7 the keys.
  template <int kC>
  void multiply_keys(int64_t entry) {
    tile_zero<kC>();
    tile_zero<kC + 1>();
    for (int64_t c = 0; c < room_.chunks; ++c) {
      if (entry == 0 || room_.chunks > 1) {
        tile_load<4>(room_.q + c * kTileBytes);
        tile_load<5>(room_.q + (room_.chunks + c) * kTileBytes);
      }
      tile_load<6>(room_.key_tile(block(entry), 0, c));
      tile_dot<kC + 1, 5, 6>();
      tile_dot<kC, 4, 6>();
      tile_load<7>(room_.key_tile(block(entry), 1, c));
      tile_dot<kC + 1, 4, 7>();
    }
    tile_store<kC>(score_row(entry, 0, 0));
    tile_store<kC + 1>(score_row(entry, 1, 0));
  }

  // Scores, the greatest of every query, and the greatest scale of a value that it sees.
  void find_tops() {
    F32 top[16];
    __m512i most[16];
    for (int i = 0; i < kBlock; ++i) {
      const F32 query_scale = _mm512_set1_ps(query_scale_[i]);
      const uint16_t* mask = h_.masks + first_ * kBlock + i;
      const int32_t* block = h_.blocks + first_;
      uint8_t* at = score_row(0, 0, i);
      F32 t = _mm512_set1_ps(-__builtin_inff());
      __m512i m = _mm512_setzero_si512();
      for (int64_t left = wanted_[i] ? count_ : 0; left > 0;
           --left, ++block, mask += kBlock, at += 2 * kTileBytes) {
        const F32 s = score(_mm512_load_si512(at), _mm512_load_si512(at + kTileBytes),
                            _mm512_load_ps(room_.key_scale + *block * kBlock), query_scale);
        _mm512_store_ps(at, s);
        t = _mm512_mask_max_ps(t, *mask, t, s);
        m = _mm512_mask_max_epi32(m, *mask, m, _mm512_load_si512(room_.value_scale + *block * kBlock));
      }
      top[i] = t;
      most[i] = m;
    }
    top_ = combine_each(top, MaxF32());
    most_ = _mm512_castsi512_ps(combine_each(most, MaxI32()));
    _mm512_store_ps(shift_, _mm512_sub_ps(_mm512_set1_ps(static_cast<float>(h_.sum_bits)), top_));
    _mm512_store_ps(by_, weight_scale(most_, h_.sum_bits));
  }

  // Leaves the weights of a query as digits, and returns their sum in 16 parts.
  __m512i weigh_row(int i) {
    const F32 shift = _mm512_set1_ps(shift_[i]), by = _mm512_set1_ps(by_[i]);
    const uint16_t* mask = h_.masks + first_ * kBlock + i;
    const int32_t* block = h_.blocks + first_;
    const uint8_t* at = score_row(0, 0, i);
    uint8_t* to = room_.weights + i * kVectorBytes;
    __m512i sum = _mm512_setzero_si512();
    for (int64_t left = count_; left > 0; left -= kGroup, to += 2 * kTileBytes) {
      __m512i x[kGroup];
      unroll<kGroup>([&](auto e) LOWBIT_LAMBDA {
        x[e] = _mm512_setzero_si512();
        if (e >= left) return;
        x[e] = weigh(_mm512_load_ps(at), shift, *mask, _mm512_load_ps(room_.value_scale + *block * kBlock),
                     by, sum);
        at += 2 * kTileBytes;
        mask += kBlock;
        ++block;
      });
      const Digits p = digits(x);
      _mm512_store_si512(to, in_order(p.high));
      _mm512_store_si512(to + kTileBytes, in_order(p.low));
    }
    return sum;
  }

  // Values of the blocks of a group, two slices of 16 dims from s on: where they lie, or gathered.
  const uint8_t* values_of(int64_t g, int digit, int64_t s) const {
    const int64_t first = block(g), last = least(g + kGroup, count_) - 1;
    if (block(last) - first == last - g) return room_.values(digit, s) + first * kQuarter;
    uint8_t* to = room_.gathered + (digit * room_.slices + s) * kTileBytes;
    for (int64_t e = g; e <= last; ++e) {
      const uint8_t* from = room_.values(digit, s) + block(e) * kQuarter;
      unroll<4>([&](auto i) LOWBIT_LAMBDA {
        _mm512_store_si512(to + (e - g) * kQuarter + i * kVectorBytes,
                           _mm512_load_si512(from + i * kVectorBytes));
      });
    }
    return to;
  }

  // Two slices. Tiles: 0 and 2 high * high, 1 and 3 high * low; 4 and 5 the weights, 6 and 7 the values.
  void mix(int64_t s) {
    unroll<4>([](auto c) LOWBIT_LAMBDA { tile_zero<c>(); });
    for (int64_t g = 0; g < count_; g += kGroup) {
      const uint8_t* weights = room_.weights + g / kGroup * 2 * kTileBytes;
      tile_load<4>(weights);
      tile_load<5>(weights + kTileBytes);
      unroll<2>([&](auto j) LOWBIT_LAMBDA {
        tile_load<6>(values_of(g, 0, s + j));
        tile_dot<2 * j + 1, 5, 6>();
        tile_dot<2 * j, 4, 6>();
        tile_load<7>(values_of(g, 1, s + j));
        tile_dot<2 * j + 1, 4, 7>();
      });
    }
    uint8_t* to = room_.mixed + s * 2 * kTileBytes;
    unroll<4>([&](auto c) LOWBIT_LAMBDA { tile_store<c>(to + c * kTileBytes); });
  }

  void write() {
    alignas(64) float factor[kBlock];
    const __m512i sum = combine_each(sums_, AddI32());
    _mm512_store_ps(factor, output_scale(most_, sum, top_, _mm512_load_ps(query_scale_), h_.sum_bits));
    for (int i = 0; i < queries_; ++i) {
      if (!wanted_[i]) continue;
      const F32 by = _mm512_set1_ps(factor[i]);
      const uint8_t* at = room_.mixed + i * kVectorBytes;
      float* y = q_ + i * h_.q_stride;
      for (int64_t left = h_.record.dim; left > 0; left -= kTileN, at += 2 * kTileBytes, y += kTileN) {
        const F32 found = _mm512_mul_ps(value(_mm512_load_si512(at), _mm512_load_si512(at + kTileBytes)), by);
        store_part(y, found, left);
      }
    }
  }

  const DigitHead& h_;
  const Room& room_;
  const int64_t first_, count_;  // blocks of tokens
  float* q_;
  const int queries_;
  bool wanted_[kBlock] = {};
  F32 top_, most_;
  __m512i sums_[16];
  alignas(64) float query_scale_[kBlock], shift_[kBlock], by_[kBlock];
};

void attend_together(const DigitHead& h, Range blocks, uint8_t* memory) {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = 64;
    config.rows[i] = kTileRows;
  }
  load_config(config);
  const Room room(h, memory);
  for (int64_t b = 0; b < room.blocks; ++b) {
    if (h.used[b] != 0) pack(h, room, b);
  }
  for (int64_t b = blocks.begin; b < blocks.end; ++b) Together(h, room, b).run();
  release_tiles();
}

void attend(const DigitHead& h, uint8_t* room) { Alone(h, room).run(); }

int64_t room_bytes(const DigitHead& h) { return std::max(Alone::room(h), Room(h, nullptr).bytes); }

}  // namespace

const DigitOps kAmxDigitOps = {keep, attend, attend_together, room_bytes};

}  // namespace lowbit
