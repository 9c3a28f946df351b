#include "api.h"

#include "launch.cuh"

namespace lowbit::gpu {

void linear(const Linear& call, void* stream) {
  if (call.tile_m <= 16) {
    call.bf16 ? launch_gemv<Bf16>(call, stream) : launch_gemv<Fp16>(call, stream);
  } else {
    call.bf16 ? launch_gemm<Bf16>(call, stream) : launch_gemm<Fp16>(call, stream);
  }
}

void rows(const Weight& w, const void* ids, int64_t count, void* out, void* stream) {
  const RowsArgs p = rows_args(w, ids, count, out);
  launch<&rows_kernel<kRowsThreads>>(dim3(static_cast<unsigned>(count)), kRowsThreads, 0, stream, p, "rows");
}

template <class T>
void launch_panel(const Weight& w, int first_row, int count, void* out, void* stream) {
  const PanelArgs p = panel_args<T>(w, first_row, count, out);
  with_format(w, [&](auto bits, auto lookup) {
    constexpr int kBits = decltype(bits)::value;
    constexpr bool kLookup = decltype(lookup)::value;
    launch<&panel_kernel<kBits, kLookup, T>>(dim3(ceil_div(p.units, kPanelThreads / 32)), kPanelThreads, 0,
                                             stream, p, "panel");
  });
}

void panel(const Weight& w, bool bf16, int first_row, int count, void* out, void* stream) {
  bf16 ? launch_panel<Bf16>(w, first_row, count, out, stream)
       : launch_panel<Fp16>(w, first_row, count, out, stream);
}

}  // namespace lowbit::gpu
