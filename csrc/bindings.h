// What the files of lowbit._C share: addresses, and a matrix made of them.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "layout.h"

namespace lowbit {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A Matrix with the level table that kernels want: 16 entries. The tiles and scales belong to the caller.
struct MatrixView {
  alignas(16) int8_t levels[16] = {};
  Matrix matrix;

  MatrixView(std::uintptr_t tiles, std::uintptr_t scales, std::uintptr_t table, int64_t n, int64_t k,
             int bits, int64_t span) {
    matrix = Matrix{pointer<const uint8_t>(tiles), pointer<const uint16_t>(scales), levels, n, k, span, bits};
    const int8_t* level = pointer<const int8_t>(table);
    const int count = 1 << bits;
    matrix.a = level[1] - level[0];
    matrix.b = level[0];
    for (int c = 0; c < count; ++c) matrix.lookup |= level[c] != matrix.a * c + matrix.b;
    if (bits < 8) {
      for (int i = 0; i < 16; ++i) levels[i] = level[i % count];
    }
  }
  MatrixView(const MatrixView&) = delete;
  MatrixView& operator=(const MatrixView&) = delete;
};

void register_engine(pybind11::module_& m);  // bindings_engine.cpp
void register_linear(pybind11::module_& m);  // bindings_linear.cpp
void register_text(pybind11::module_& m);    // bindings_text.cpp
void register_train(pybind11::module_& m);   // bindings_train.cpp

}  // namespace lowbit
