// What we need of DLPack 1.x (dmlc.github.io/dlpack): how the C code of two libraries hands over tensors. Names are ours,
// the layout is the standard's.
#pragma once

#include <cstdint>

namespace lowbit::dlpack {

constexpr uint32_t kMajor = 1;
constexpr int32_t kCpu = 1;
constexpr uint8_t kFloat = 2;
constexpr const char* kCapsule = "dlpack_exchange_api";

struct Version {
  uint32_t major, minor;
};

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;  // in elements; null: C order
  uint64_t byte_offset;
};

struct ManagedTensor {
  Version version;
  void* context;
  void (*deleter)(ManagedTensor*);
  uint64_t flags;
  Tensor tensor;
};

// What a tensor type offers as its attribute __dlpack_c_exchange_api__. Functions return 0, or set an error.
struct ExchangeApi {
  Version version;
  ExchangeApi* older;
  int (*allocate)(Tensor* like, ManagedTensor** out, void* context,
                  void (*set_error)(void* context, const char* kind, const char* message));
  int (*own)(void* object, ManagedTensor** out);
  int (*wrap)(ManagedTensor* tensor, void** object);  // takes the tensor over
  int (*view)(void* object, Tensor* out);             // null where a library does not offer it
  int (*stream)(int32_t device_type, int32_t device_id, void** out);
};

}  // namespace lowbit::dlpack
