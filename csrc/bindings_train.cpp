// lowbit._C: training's row kernels. tools/training/native.py has checked every address, size and dtype before.
#include <pybind11/stl.h>

#include "bindings.h"
#include "train/linear.h"
#include "train/train.h"

namespace py = pybind11;

namespace lowbit {
namespace {

using Address = std::uintptr_t;

LevelTable level_table(const std::vector<float>& levels, bool affine, float bottom) {
  LevelTable t;
  t.affine = affine;
  t.a = levels[1] - levels[0];
  t.b = levels[0];
  t.bottom = bottom;
  t.top = static_cast<float>(levels.size() - 1);
  t.count = static_cast<int>(levels.size());
  for (int i = 0; !affine && i < t.count; ++i) {
    t.level[i] = levels[static_cast<size_t>(i)];
    if (i > 0) t.boundary[i - 1] = (t.level[i - 1] + t.level[i]) / 2;
  }
  return t;
}

QuantizeJob quantize_job(const LevelTable& table, Address v, Address scale, int64_t n, int64_t k,
                         int64_t group) {
  return {table, pointer<const float>(v), pointer<float>(scale), n, k, group};
}

}  // namespace

void register_train(py::module_& m) {
  py::class_<LevelTable>(m, "LevelTable", "Levels of a quantized matrix; listed ones are 16 at most.")
      .def(py::init(&level_table), py::arg("levels"), py::arg("affine"), py::arg("bottom"));
  m.def("has_bf16_tiles", &has_bf16_tiles, "whether linear_forward and linear_backward can run");
  m.def(
      "linear_forward",
      [](int64_t rows, int64_t n, int64_t k, Address x, int64_t x_stride, Address w, Address bias, Address y,
         int64_t y_stride) {
        py::gil_scoped_release release;
        linear_forward({rows, n, k}, {pointer<const uint16_t>(x), x_stride}, pointer<const float>(w),
                       pointer<const float>(bias), {pointer<uint16_t>(y), y_stride});
      },
      "y [rows, n] = x [rows, k] W^T + bias; bf16 addresses of x and y, fp32 of W and bias");
  m.def(
      "linear_backward",
      [](int64_t rows, int64_t n, int64_t k, Address dy, int64_t dy_stride, Address x, int64_t x_stride,
         Address w, Address dx, int64_t dx_stride, Address dw, Address db) {
        py::gil_scoped_release release;
        linear_backward({rows, n, k}, {pointer<const uint16_t>(dy), dy_stride},
                        {pointer<const uint16_t>(x), x_stride}, pointer<const float>(w),
                        {pointer<uint16_t>(dx), dx_stride}, pointer<float>(dw), pointer<float>(db));
      },
      "dx bf16, dw and db fp32 from dy; dx and db may be 0");
  m.def(
      "softmax_gradient",
      [](Address logits, Address teacher, Address target, int64_t rows, int64_t n, int64_t stride,
         float distill, bool bf16, bool gradient, Address loss, Address nll) {
        py::gil_scoped_release release;
        softmax_gradient({pointer<void>(logits), pointer<const void>(teacher), pointer<const int64_t>(target),
                          rows, n, stride, distill, bf16, gradient, pointer<float>(loss),
                          pointer<float>(nll)});
      },
      "logits [rows, n] -> their gradient, losses and NLLs [rows]");
  m.def(
      "load_nearest",
      [](const LevelTable& table, Address v, Address scale, int64_t n, int64_t k, int64_t group,
         Address out) {
        py::gil_scoped_release release;
        load_nearest(quantize_job(table, v, scale, n, k, group), pointer<float>(out));
      },
      "out [n, k] = scale * level nearest to v / scale; fp32 addresses");
  m.def(
      "refine_scales",
      [](const LevelTable& table, Address v, Address scale, int64_t n, int64_t k, int64_t group,
         int iterations) {
        py::gil_scoped_release release;
        refine_scales(quantize_job(table, v, scale, n, k, group), iterations);
      },
      "scales -> least-squares scales, alternating with the nearest levels; fp32 addresses");
}

}  // namespace lowbit
