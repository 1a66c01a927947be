// The C exchange protocol of DLPack 1.2 (github.com/dmlc/dlpack), the part that a consumer of tensors needs: a tensor
// type publishes a table of functions, and one of them describes a live tensor without touching Python objects.
#pragma once

#include <cstdint>

namespace llmengine::dlpack {

inline constexpr const char* kCapsule = "dlpack_exchange_api";
inline constexpr const char* kAttribute = "__dlpack_c_exchange_api__";
inline constexpr uint32_t kMajor = 1;

enum DeviceType : int32_t { kCPU = 1, kCUDA = 2, kCUDAHost = 3 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct Tensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;  // in elements; may be null for a contiguous tensor
  uint64_t byte_offset;
};

struct Version {
  uint32_t major, minor;
};

struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*tensor_from_py_object)(void* py_object, Tensor* out);
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out);
};

}  // namespace llmengine::dlpack
