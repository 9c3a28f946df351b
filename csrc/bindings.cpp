// lowbit._C: raw addresses in, GIL released. lowbit/ops.py has checked every address, size and dtype before.
#include "bindings.h"

#include <pybind11/stl.h>

#include "cpu/dispatch.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/qlinear.h"
#include "prepack.h"

namespace py = pybind11;

namespace lowbit {
namespace {

void linear(const MatrixView& w, std::uintptr_t x, int64_t m, int64_t x_stride, std::uintptr_t bias,
            std::uintptr_t y, bool exact) {
  py::gil_scoped_release release;
  Job job;
  job.w = w.matrix;
  job.x = pointer<const float>(x);
  job.x_stride = x_stride;
  job.bias = pointer<const float>(bias);
  job.y = pointer<float>(y);
  job.y_stride = w.matrix.n;
  job.m = m;
  qlinear(job, exact ? Compute::kExact : Compute::kInt8);
}

}  // namespace
}  // namespace lowbit

PYBIND11_MODULE(_C, m) {
  using namespace lowbit;
  m.doc() = "Native kernels of lowbit; use lowbit.ops, which checks arguments.";

  py::class_<MatrixView>(m, "Matrix", "A view of a prepacked matrix (csrc/layout.h); owns nothing.")
      .def(py::init<std::uintptr_t, std::uintptr_t, std::uintptr_t, int64_t, int64_t, int, int64_t>(),
           py::arg("tiles"), py::arg("scales"), py::arg("table"), py::arg("n"), py::arg("k"), py::arg("bits"),
           py::arg("span"))
      .def_property_readonly("lookup", [](const MatrixView& v) { return v.matrix.lookup; });

  m.def("linear", &linear, py::arg("w"), py::arg("x"), py::arg("m"), py::arg("x_stride"), py::arg("bias"),
        py::arg("y"), py::arg("exact"), "y[m, N] = x[m, K] W^T + bias; fp32 addresses");
  m.def(
      "prepack_tiles",
      [](std::uintptr_t rows, int64_t n, int64_t k, int bits, std::uintptr_t tiles) {
        py::gil_scoped_release release;
        prepack_tiles(pointer<const uint8_t>(rows), n, k, bits, pointer<uint8_t>(tiles));
      },
      "canonical packed rows -> tiles");
  m.def(
      "prepack_scales",
      [](std::uintptr_t groups, int64_t n, int64_t k, int64_t group, int64_t span, std::uintptr_t scales) {
        py::gil_scoped_release release;
        prepack_scales(pointer<const uint16_t>(groups), n, k, group, span, pointer<uint16_t>(scales));
      },
      "fp16 scales [N, groups] -> [blocks, spans, 16]");
  m.def("span_of", &span_of, py::arg("k"), py::arg("group"), "inputs a prepacked scale covers");
  m.def(
      "dequantize_rows",
      [](const MatrixView& w, std::uintptr_t ids, int64_t count, std::uintptr_t out) {
        py::gil_scoped_release release;
        dequantize_rows(w.matrix, pointer<const int64_t>(ids), count, pointer<float>(out));
      },
      "fp32 rows of W");

  m.def("isa", [] { return std::string(isa_name(selected_isa())); });
  m.def("set_isa", &set_isa);
  m.def("available_isas", &available_isas);
  m.def("has_vbmi", &has_vbmi);
  m.def("traits", [] {
    const Traits now = traits();
    return py::dict(py::arg("vbmi") = now.vbmi, py::arg("requests_weights") = now.requests_weights);
  });
  m.def(
      "set_traits", [](bool vbmi, bool requests_weights) { set_traits({vbmi, requests_weights}); },
      py::arg("vbmi"), py::arg("requests_weights"));
  m.def("kernel_name", [](int bits, int64_t rows, bool exact) {
    return kernel_name(selected_isa(), bits, rows, exact ? Compute::kExact : Compute::kInt8);
  });
  m.def(
      "crossover", [](const std::string& isa, int bits) { return crossover(find_isa(isa), bits); },
      "rows from which the kernel for many rows runs");
  m.def("set_crossover",
        [](const std::string& isa, int bits, int rows) { set_crossover(find_isa(isa), bits, rows); });
  m.def("set_max_threads", &set_max_threads);
  m.def("max_threads", &max_threads);
  register_engine(m);
  register_linear(m);
  register_text(m);
  register_train(m);
}
