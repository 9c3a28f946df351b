// Text to words, and N-best lists to tries: what Python does before the engine runs, for thousands of hypotheses at once.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <string>
#include <string_view>
#include <unordered_map>

#include "bindings.h"
#include "tries.h"

namespace py = pybind11;

namespace lowbit {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
Array<T> array_of(const std::vector<T>& values) {
  return Array<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

// What str.split() takes for white space, in ASCII.
bool is_space(char c) { return (c >= 0x1C && c <= 0x20) || (c >= 0x09 && c <= 0x0D); }

// The ids of words.
class WordIndex {
 public:
  WordIndex(std::vector<std::string> words, int32_t unknown) : words_(std::move(words)), unknown_(unknown) {
    ids_.reserve(words_.size());
    for (size_t i = 0; i < words_.size(); ++i) ids_.emplace(words_[i], static_cast<int32_t>(i));
  }
  WordIndex(const WordIndex&) = delete;
  WordIndex& operator=(const WordIndex&) = delete;

  // Ids of the words of all texts; where each text ends in them; how many words of each are unknown.
  py::tuple encode(const py::sequence& texts) const {
    const auto count = static_cast<py::ssize_t>(texts.size());
    std::vector<int32_t> ids;
    Array<int64_t> ends(count), unknown(count);
    for (py::ssize_t i = 0; i < count; ++i) {
      const py::object text = texts[static_cast<size_t>(i)];
      if (!PyUnicode_Check(text.ptr())) {
        throw py::type_error("text " + std::to_string(i) + " is no string but " +
                             py::str(py::type::handle_of(text)).cast<std::string>());
      }
      unknown.mutable_at(i) = add(text.ptr(), ids);
      ends.mutable_at(i) = static_cast<int64_t>(ids.size());
    }
    return py::make_tuple(array_of(ids), ends, unknown);
  }

 private:
  int64_t add(PyObject* text, std::vector<int32_t>& ids) const {
    if (!PyUnicode_IS_ASCII(text)) return add_split(text, ids);
    const char* at = static_cast<const char*>(PyUnicode_DATA(text));
    const char* const end = at + PyUnicode_GET_LENGTH(text);
    int64_t unknown = 0;
    while (true) {
      while (at < end && is_space(*at)) ++at;
      if (at == end) return unknown;
      const char* const begin = at;
      while (at < end && !is_space(*at)) ++at;
      unknown += add_word({begin, static_cast<size_t>(at - begin)}, ids);
    }
  }

  // Other alphabets have other white space: Python knows it.
  int64_t add_split(PyObject* text, std::vector<int32_t>& ids) const {
    PyObject* const split = PyUnicode_Split(text, nullptr, -1);
    if (split == nullptr) throw py::error_already_set();
    const auto words = py::reinterpret_steal<py::list>(split);
    int64_t unknown = 0;
    for (const py::handle word : words) {
      Py_ssize_t size = 0;
      const char* const bytes = PyUnicode_AsUTF8AndSize(word.ptr(), &size);
      if (bytes == nullptr) PyErr_Clear();  // a lone surrogate, which no vocabulary holds
      unknown += add_word(
          bytes == nullptr ? std::string_view(" ") : std::string_view(bytes, static_cast<size_t>(size)), ids);
    }
    return unknown;
  }

  int64_t add_word(std::string_view word, std::vector<int32_t>& ids) const {
    const auto found = ids_.find(word);
    ids.push_back(found == ids_.end() ? unknown_ : found->second);
    return found == ids_.end();
  }

  const std::vector<std::string> words_;
  const int32_t unknown_;
  std::unordered_map<std::string_view, int32_t> ids_;  // views of words_
};

py::tuple tries(const Array<int32_t>& words, const Array<int64_t>& ends, const Array<int64_t>& group_ends,
                const Array<int32_t>& prefixes, const Array<int64_t>& prefix_ends, int64_t most_words,
                int64_t most_nodes, int32_t end) {
  Tries t;
  const Lists lists{words.data(),      ends.data(),     ends.size(),       group_ends.data(),
                    group_ends.size(), prefixes.data(), prefix_ends.data()};
  {
    py::gil_scoped_release release;
    t = make_tries(lists, most_words, most_nodes, end);
  }
  return py::make_tuple(array_of(t.tokens), array_of(t.parents), array_of(t.nodes), array_of(t.targets),
                        array_of(t.paths), array_of(t.ends), array_of(t.which));
}

}  // namespace

void register_text(py::module_& m) {
  py::class_<WordIndex>(m, "WordIndex", "Ids of the words of many texts at once.")
      .def(py::init<std::vector<std::string>, int32_t>(), py::arg("words"), py::arg("unknown"))
      .def("encode", &WordIndex::encode);
  m.def("tries", &tries, "N-best lists to tries: see csrc/tries.h. Arrays are checked.");
}

}  // namespace lowbit
