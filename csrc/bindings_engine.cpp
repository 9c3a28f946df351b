// lowbit._C.Engine: the native engine. lowbit/native.py has checked everything that crosses but the tokens of extend.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "cpu/engine.h"

namespace py = pybind11;

namespace lowbit {
namespace {

using Address = std::uintptr_t;

Linear linear_of(const py::handle& pair) {  // (Matrix, address of the bias or 0)
  const auto parts = pair.cast<py::tuple>();
  return {parts[0].cast<const MatrixView&>().matrix, pointer<const float>(parts[1].cast<Address>())};
}

NormWeights norm_of(const py::handle& pair, float eps) {  // (address of the weight, of the bias)
  const auto parts = pair.cast<py::tuple>();
  return {pointer<const float>(parts[0].cast<Address>()), pointer<const float>(parts[1].cast<Address>()),
          eps};
}

Model model_of(const py::dict& spec) {
  Model m;
  m.vocab = spec["vocab"].cast<int64_t>();
  m.d = spec["d"].cast<int64_t>();
  m.heads = spec["heads"].cast<int64_t>();
  m.ffn = spec["ffn"].cast<int64_t>();
  m.max_len = spec["max_len"].cast<int64_t>();
  m.pre_norm = spec["pre_norm"].cast<bool>();
  m.rotary = spec["rotary"].cast<bool>();
  m.activation = spec["gelu"].cast<bool>() ? kGelu : kRelu;
  m.compute = spec["exact"].cast<bool>() ? Compute::kExact : Compute::kInt8;
  m.embed = spec["embed"].cast<const MatrixView&>().matrix;
  m.head = linear_of(spec["head"]);
  m.positions = pointer<const float>(spec["positions"].cast<Address>());
  const auto eps = spec["eps"].cast<float>();
  if (m.pre_norm) m.norm = norm_of(spec["norm"], eps);
  for (const auto& item : spec["layers"]) {
    const auto layer = item.cast<py::dict>();
    m.layers.push_back({linear_of(layer["q"]), linear_of(layer["k"]), linear_of(layer["v"]),
                        linear_of(layer["o"]), linear_of(layer["fc1"]), linear_of(layer["fc2"]),
                        norm_of(layer["norm1"], eps), norm_of(layer["norm2"], eps)});
  }
  return m;
}

ForestQuery query_of(int64_t nodes, Address tokens, Address parents, int64_t requests, Address request_nodes,
                     Address request_targets) {
  return {nodes,    pointer<const int32_t>(tokens),        pointer<const int32_t>(parents),
          requests, pointer<const int64_t>(request_nodes), pointer<const int64_t>(request_targets)};
}

void score(Engine& engine, const ForestQuery& query, Address out) {
  py::gil_scoped_release release;
  engine.score(query, pointer<float>(out));
}

std::vector<double> profile(Engine& engine, const ForestQuery& query, Address out) {
  py::gil_scoped_release release;
  std::vector<double> seconds(kPhases);
  engine.profile(query, pointer<float>(out), seconds.data());
  return seconds;
}

// The node of the tokens and, where it is asked for, log P of every next token. Checked here, not in Python: after a forward
// every line of Python waits for memory.
py::tuple extend(Engine& engine, std::shared_ptr<KvNode> parent, const std::vector<int32_t>& tokens,
                 bool distribution) {
  const auto count = static_cast<int64_t>(tokens.size());
  bool good = count > 0 && (parent ? parent->end : 0) + count <= engine.context();
  for (const int32_t token : tokens) good = good && token >= 0 && token < engine.vocab();
  if (!good) throw py::value_error("tokens outside the vocabulary, or too many of them");
  py::object all = py::none();
  float* out = nullptr;
  if (distribution) {
    py::array_t<float> found(engine.vocab());
    out = found.mutable_data();
    all = std::move(found);
  }
  std::shared_ptr<KvNode> node;
  {
    py::gil_scoped_release release;
    node = engine.extend(std::move(parent), tokens.data(), count, out);
  }
  return py::make_tuple(std::move(node), std::move(all));
}

py::array_t<float> log_probs(Engine& engine, const KvNode& node) {
  py::array_t<float> all(engine.vocab());
  float* out = all.mutable_data();
  py::gil_scoped_release release;
  engine.log_probs(node, out);
  return all;
}

}  // namespace

void register_engine(py::module_& m) {
  py::class_<KvNode, std::shared_ptr<KvNode>>(m, "KvNode", "Keys and values of tokens of a decoding state.");
  py::class_<ForestQuery>(m, "ForestQuery", "Views of arrays.").def(py::init(&query_of));
  py::class_<Engine>(m, "Engine", "The native forward; owns no weights.")
      .def(py::init([](const py::dict& spec, int64_t budget) {
             return std::make_unique<Engine>(model_of(spec), budget);
           }),
           py::arg("spec"), py::arg("token_budget"))
      .def("score", &score)
      .def("profile", &profile)
      .def("extend", &extend, py::arg("parent").none(true), py::arg("tokens"), py::arg("distribution"))
      .def("log_probs", &log_probs)
      .def_property_readonly("cache_slots", [](const Engine& e) { return e.cache().used(); })
      .def_property_readonly("cache_bytes", [](const Engine& e) { return e.cache().bytes(); });
}

}  // namespace lowbit
