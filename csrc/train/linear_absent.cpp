// Architectures without bf16 tiles: has_bf16_tiles() says so, and nobody calls these.
#include <stdexcept>

#include "linear.h"

namespace lowbit {

void linear_forward(const LinearShape&, Rows<const uint16_t>, const float*, const float*, Rows<uint16_t>) {
  throw std::logic_error("linear_forward: no bf16 tiles");
}

void linear_backward(const LinearShape&, Rows<const uint16_t>, Rows<const uint16_t>, const float*,
                     Rows<uint16_t>, float*, float*) {
  throw std::logic_error("linear_backward: no bf16 tiles");
}

}  // namespace lowbit
