// The usual call of lowbit.linear, from tensor to tensor. A large matrix displaces from the caches what its call runs
// through; in Python (types, attributes of tensors, shapes) that took 10 to 30 us a call, so here it is C.
#include "bindings.h"
#include "cpu/qlinear.h"
#include "dlpack_abi.h"

namespace py = pybind11;

namespace lowbit {
namespace {

bool is_plain(const dlpack::Tensor& t) {
  if (t.device_type != dlpack::kCpu || t.type_code != dlpack::kFloat || t.type_bits != 32 ||
      t.type_lanes != 1) {
    return false;
  }
  bool empty = false, contiguous = true;
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; stride *= t.shape[i--]) {
    empty = empty || t.shape[i] == 0;
    contiguous = contiguous && (t.strides == nullptr || t.shape[i] <= 1 || t.strides[i] == stride);
  }
  return empty || contiguous;
}

template <class T>
T* data(const dlpack::Tensor& t) {
  return reinterpret_cast<T*>(static_cast<char*>(t.data) + t.byte_offset);
}

// What it was told of Python at import; never freed.
class TensorLinear {
 public:
  // Raises: ImportError for functions of another standard than ours.
  TensorLinear(const py::capsule& functions, py::tuple tensor_types, py::type weight_type)
      : tensor_types_(std::move(tensor_types)), weight_type_(std::move(weight_type)) {
    const auto* api =
        static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(functions.ptr(), dlpack::kCapsule));
    if (api == nullptr) throw py::error_already_set();
    while (api != nullptr && api->version.major != dlpack::kMajor) api = api->older;
    if (api == nullptr || api->view == nullptr) throw py::import_error("no DLPack 1.x functions");
    torch_ = *api;
  }

  // x W^T + bias; None where something is not as usual: contiguous fp32 tensors on the CPU whose shapes fit, a weight that
  // is packed already, "int8" or "exact". Who calls finds out what and does it, or says why not.
  py::object run(py::handle x, py::handle q, py::handle bias, py::handle compute) const {
    const bool exact = same(compute, exact_);
    if (!exact && !same(compute, int8_)) return py::none();
    const py::object weight = packed(q);
    dlpack::Tensor in{}, b{};
    if (!weight || !view(x, in) || in.ndim < 1 || in.ndim > kMostDims) return py::none();
    const Matrix& w = weight.cast<const MatrixView&>().matrix;
    if (in.shape[in.ndim - 1] != w.k) return py::none();
    if (!bias.is_none() && (!view(bias, b) || b.ndim != 1 || b.shape[0] != w.n)) return py::none();
    int64_t shape[kMostDims];
    Job job;
    job.m = 1;
    for (int i = 0; i + 1 < in.ndim; ++i) job.m *= shape[i] = in.shape[i];
    shape[in.ndim - 1] = w.n;
    dlpack::ManagedTensor* const out = allocate(in, shape);
    job.w = w;
    job.x = data<const float>(in);
    job.x_stride = w.k;
    job.bias = bias.is_none() ? nullptr : data<const float>(b);
    job.y = data<float>(out->tensor);
    job.y_stride = w.n;
    try {
      const py::gil_scoped_release release;
      qlinear(job, exact ? Compute::kExact : Compute::kInt8);
    } catch (...) {
      out->deleter(out);
      throw;
    }
    void* y = nullptr;
    if (torch_.wrap(out, &y) != 0) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(static_cast<PyObject*>(y));
  }

 private:
  static constexpr int kMostDims = 8;

  // Uninitialized fp32. torch.empty of Python would take 8 us more after a large matrix.
  dlpack::ManagedTensor* allocate(dlpack::Tensor like, int64_t* shape) const {
    like.shape = shape;
    like.strides = nullptr;
    dlpack::ManagedTensor* out = nullptr;
    const auto set_error = [](void*, const char*, const char* message) {
      PyErr_SetString(PyExc_RuntimeError, message);
    };
    if (torch_.allocate(&like, &out, nullptr, set_error) != 0) throw py::error_already_set();
    return out;
  }

  static bool same(py::handle text, const py::str& known) {
    return text.is(known) ||
           (PyUnicode_CheckExact(text.ptr()) && PyUnicode_Compare(text.ptr(), known.ptr()) == 0);
  }

  // The native view of a PackedWeight, or of the one that a QuantTensor keeps; null where there is none.
  py::object packed(py::handle q) const {
    py::object weight = py::reinterpret_borrow<py::object>(q);
    if (!py::type::handle_of(q).is(weight_type_)) {
      const auto cache = py::reinterpret_steal<py::object>(PyObject_GetAttr(q.ptr(), cache_.ptr()));
      PyObject* const found =
          cache && PyDict_Check(cache.ptr()) ? PyDict_GetItem(cache.ptr(), cpu_.ptr()) : nullptr;
      PyErr_Clear();
      if (found == nullptr || !py::type::handle_of(found).is(weight_type_)) return {};
      weight = py::reinterpret_borrow<py::object>(found);
    }
    return py::reinterpret_steal<py::object>(PyObject_GetAttr(weight.ptr(), native_.ptr()));
  }

  bool view(py::handle object, dlpack::Tensor& out) const {
    bool known = false;
    for (const py::handle type : tensor_types_) known = known || py::type::handle_of(object).is(type);
    if (!known) return false;
    if (torch_.view(object.ptr(), &out) == 0) return is_plain(out);
    PyErr_Clear();
    return false;
  }

  dlpack::ExchangeApi torch_;
  const py::tuple tensor_types_;
  const py::type weight_type_;
  const py::str int8_ = interned("int8"), exact_ = interned("exact"), cache_ = interned("_cache"),
                cpu_ = interned("cpu"), native_ = interned("_native");

  static py::str interned(const char* text) {
    return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(text));
  }
};

}  // namespace

void register_linear(py::module_& m) {
  py::class_<TensorLinear>(m, "TensorLinear",
                           "x W^T + bias from tensor to tensor: see csrc/bindings_linear.cpp.")
      .def(py::init<py::capsule, py::tuple, py::type>(), py::arg("functions"), py::arg("tensor_types"),
           py::arg("weight_type"))
      .def("run", &TensorLinear::run);
}

}  // namespace lowbit
