// From run-time descriptions to kernels: the same for the GPU's launchers and for the host test's machine.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "api.h"
#include "qgemm.cuh"
#include "qgemv.cuh"
#include "qwgmma.cuh"
#include "rows.cuh"

namespace lowbit::gpu {

template <int kValue>
using Int = std::integral_constant<int, kValue>;
template <bool kValue>
using Bool = std::integral_constant<bool, kValue>;

template <class F>
void with_bool(bool value, const F& f) {
  value ? f(Bool<true>{}) : f(Bool<false>{});
}

// f(Int<bits>, Bool<lookup>), for the combinations that exist.
template <class F>
void with_format(const Weight& w, const F& f) {
  if (w.lookup && w.bits == 2) return f(Int<2>{}, Bool<true>{});
  if (w.lookup && w.bits == 4) return f(Int<4>{}, Bool<true>{});
  if (w.lookup) throw std::runtime_error("only 2 and 4 bits have look-up tables");
  switch (w.bits) {
    case 1:
      return f(Int<1>{}, Bool<false>{});
    case 2:
      return f(Int<2>{}, Bool<false>{});
    case 4:
      return f(Int<4>{}, Bool<false>{});
    case 8:
      return f(Int<8>{}, Bool<false>{});
    default:
      throw std::runtime_error("bits must be 1, 2, 4 or 8");
  }
}

// The tiles of the GEMM by rows of x. Where scales are grouped the sums of a group are folded into a second set: the
// largest tile then has more warps with half as many outputs each.
template <int kBits, bool kLookup, class T, bool kGrouped, int kTileM>
using GemmTile = std::conditional_t<
    kTileM == 32, GemmShape<kBits, kLookup, T, kGrouped, 2, 4, 4, 1, 4, 3>,
    std::conditional_t<kTileM == 64, GemmShape<kBits, kLookup, T, kGrouped, 2, 8, 4, 1, 4, 2>,
                       std::conditional_t<kGrouped, GemmShape<kBits, kLookup, T, kGrouped, 2, 8, 4, 2, 3, 1>,
                                          GemmShape<kBits, kLookup, T, kGrouped, 4, 8, 2, 2, 3, 2>>>>;

template <int kBits, bool kLookup, class T, bool kGrouped, class F>
void with_gemm_tile(int tile_m, const F& f) {
  if (tile_m == 32) return f(GemmTile<kBits, kLookup, T, kGrouped, 32>{});
  if (tile_m == 64) return f(GemmTile<kBits, kLookup, T, kGrouped, 64>{});
  if (tile_m != 128) throw std::runtime_error("a GEMM tile has 32, 64 or 128 rows");
  f(GemmTile<kBits, kLookup, T, kGrouped, 128>{});
}

inline bool grouped(const Weight& w) { return w.group < w.k; }

template <class T, class F>
void with_gemm_shape(const Linear& call, const F& f) {
  with_format(call.w, [&](auto bits, auto lookup) {
    with_bool(grouped(call.w),
              [&](auto kGrouped) { with_gemm_tile<bits, lookup, T, kGrouped>(call.tile_m, f); });
  });
}

template <class T, class F>
void with_gemv_shape(const Linear& call, const F& f) {
  with_format(call.w, [&](auto bits, auto lookup) {
    with_bool(grouped(call.w), [&](auto kGrouped) {
      with_bool(call.m > 8, [&](auto wide) { f(GemvShape<bits, lookup, T, wide ? 2 : 1, kGrouped>{}); });
    });
  });
}

template <class T, class F>
void with_wgmma_shape(const Linear& call, const F& f) {
  with_format(call.w, [&](auto bits, auto lookup) {
    with_bool(grouped(call.w), [&](auto kGrouped) { f(WgmmaShape<bits, lookup, T, kGrouped>{}); });
  });
}

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
inline int chunks_of(const Weight& w) { return ceil_div(w.k, kChunk); }
inline int padded_rows(const Weight& w) { return ceil_div(w.n, kRowPad) * kRowPad; }
inline int group_chunks(const Weight& w) { return grouped(w) ? w.group / kChunk : chunks_of(w); }

template <class T>
Args args_of(const Linear& call) {
  Args p{};
  p.codes = static_cast<const Vec4*>(call.w.codes);
  p.scales = static_cast<const uint16_t*>(call.w.scales);
  p.x = static_cast<const uint16_t*>(call.x);
  p.bias = static_cast<const float*>(call.bias);
  p.residual = call.residual;
  p.y = call.y;
  p.partial = static_cast<float*>(call.partial);
  p.arrived = static_cast<int*>(call.arrived);
  p.x_stride = call.x_stride, p.y_stride = call.y_stride;
  p.m = call.m, p.n = call.w.n, p.k = call.w.k;
  p.n_padded = padded_rows(call.w), p.chunks = chunks_of(call.w), p.group_chunks = group_chunks(call.w);
  p.y_fp32 = call.y_fp32;
  p.activation = static_cast<Activation>(call.activation);
  p.book = codebook(T{}, call.w.bits, call.w.levels);
  return p;
}

template <class S>
int gemv_blocks(const Args& p) {
  return p.n_padded / S::kRows;
}
template <class S>
int gemm_blocks(const Args& p) {
  return ceil_div(p.m, S::kMaxM) * ceil_div(p.n_padded, S::kRows);
}

template <class T>
WgmmaArgs wgmma_args(const Linear& call) {
  return {args_of<T>(call), static_cast<const Vec4*>(call.packed_x)};
}
inline PackArgs pack_args(const Linear& call) {
  const int chunks = chunks_of(call.w);
  const int64_t units = int64_t{ceil_div(call.m, kPackRows)} * chunks * kPackUnits;
  return {static_cast<const uint32_t*>(call.x),
          static_cast<Vec4*>(call.packed_x),
          call.x_stride / 2,
          units,
          call.m,
          call.w.k,
          chunks};
}
inline int pack_blocks(const PackArgs& p) { return static_cast<int>(p.units / kPackThreads); }

inline RowsArgs rows_args(const Weight& w, const void* ids, int64_t count, void* out) {
  RowsArgs p{};
  p.codes = static_cast<const uint32_t*>(w.codes);
  p.scales = static_cast<const uint16_t*>(w.scales);
  p.ids = static_cast<const int64_t*>(ids);
  p.out = static_cast<float*>(out);
  p.count = count;
  p.n_padded = padded_rows(w), p.k = w.k, p.chunks = chunks_of(w), p.group_chunks = group_chunks(w),
  p.bits = w.bits;
  for (int i = 0; i < 16; ++i) p.levels[i] = w.levels[i];
  return p;
}

// `first_row` and `rows` are multiples of 64.
template <class T>
PanelArgs panel_args(const Weight& w, int first_row, int rows, void* out) {
  PanelArgs p{};
  p.codes = static_cast<const Vec4*>(w.codes);
  p.scales = static_cast<const uint16_t*>(w.scales);
  p.out = static_cast<Vec4*>(out);
  p.first_block = first_row / block_rows(w.bits);
  p.chunks = chunks_of(w);
  p.units = rows / block_rows(w.bits) * p.chunks;
  p.n_padded = padded_rows(w), p.group_chunks = group_chunks(w);
  p.book = codebook(T{}, w.bits, w.levels);
  return p;
}

}  // namespace lowbit::gpu
