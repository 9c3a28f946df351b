// lowbit._CUDA: raw device addresses and a stream in, GIL released. lowbit.kernels.cuda has checked everything before.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "api.h"

namespace py = pybind11;

namespace lowbit::gpu {
namespace {

const void* read(std::uintptr_t address) { return reinterpret_cast<const void*>(address); }
void* write(std::uintptr_t address) { return reinterpret_cast<void*>(address); }

Weight make_weight(std::uintptr_t codes, std::uintptr_t scales, const std::vector<int>& levels, int n, int k,
                   int bits, int group, bool lookup) {
  Weight w{read(codes), read(scales), {}, n, k, bits, group, lookup};
  for (std::size_t i = 0; i < levels.size() && i < 16; ++i) w.levels[i] = static_cast<int8_t>(levels[i]);
  return w;
}

}  // namespace
}  // namespace lowbit::gpu

PYBIND11_MODULE(_CUDA, m) {
  using namespace lowbit::gpu;
  m.doc() = "CUDA kernels of lowbit; use lowbit.kernels, which checks arguments.";

  py::class_<Weight>(m, "Weight", "A view of a matrix in GPU memory (csrc/cuda/layout.cuh); owns nothing.")
      .def(py::init(&make_weight), py::arg("codes"), py::arg("scales"), py::arg("levels"), py::arg("n"),
           py::arg("k"), py::arg("bits"), py::arg("group"), py::arg("lookup"));

  m.def(
      "linear",
      [](const Weight& w, std::uintptr_t x, int64_t x_stride, int rows, bool bf16, std::uintptr_t bias,
         std::uintptr_t residual, int activation, std::uintptr_t y, int64_t y_stride, bool y_fp32, bool early,
         int tile_m, int splits, std::uintptr_t partial, std::uintptr_t arrived, std::uintptr_t packed_x,
         int device, std::uintptr_t stream) {
        py::gil_scoped_release release;
        const Linear call{w,          read(x),        read(bias),     read(residual),
                          write(y),   write(partial), write(arrived), write(packed_x),
                          x_stride,   y_stride,       rows,           splits,
                          activation, bf16,           y_fp32,         early,
                          tile_m};
        linear(call, Queue{device, write(stream)});
      },
      "y = residual + activation(x W^T + bias)");
  m.def(
      "rows",
      [](const Weight& w, std::uintptr_t ids, int64_t count, std::uintptr_t out, int device,
         std::uintptr_t stream) {
        py::gil_scoped_release release;
        rows(w, read(ids), count, write(out), Queue{device, write(stream)});
      },
      "fp32 rows of W");
  m.def(
      "panel",
      [](const Weight& w, bool bf16, int first_row, int count, std::uintptr_t out, int device,
         std::uintptr_t stream) {
        py::gil_scoped_release release;
        panel(w, bf16, first_row, count, write(out), Queue{device, write(stream)});
      },
      "dense rows [first_row, first_row + count) of W, multiples of 64, inputs padded to 64");
  m.attr("built_for_wgmma") = built_for_wgmma();
  m.def("has_wgmma", &has_wgmma, "whether linear() may be given packed_x on a device");
  m.def(
      "recording",
      [](int device, std::uintptr_t stream) {
        py::gil_scoped_release release;
        return recording(Queue{device, write(stream)});
      },
      "number of the graph that is being recorded on a stream, or 0");
}
