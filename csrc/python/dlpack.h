// The part of DLPack's binary interface (version 1) that the binding reads, by the names and layouts of its
// specification: https://dmlc.github.io/dlpack/latest/c_api.html
#pragma once

#include <cstdint>

namespace dlpack {

enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13 };

enum TypeCode : uint8_t {
  kInt = 0,
  kUInt = 1,
  kFloat = 2,
  kBfloat = 4,
  kBool = 6,
  kFloat8E4m3fn = 10,
  kFloat8E8m0fnu = 14,
  kFloat4E2m1fn = 17,
};

struct Device {
  DeviceType type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null for a compact tensor
  uint64_t byte_offset;
};

struct ManagedTensor {  // behind a capsule named "dltensor"
  Tensor tensor;
  void* manager_context;
  void (*deleter)(ManagedTensor*);
};

struct Version {
  uint32_t major, minor;
};

struct ManagedTensorVersioned {  // behind a capsule named "dltensor_versioned"
  Version version;
  void* manager_context;
  void (*deleter)(ManagedTensorVersioned*);
  uint64_t flags;
  Tensor tensor;
};

// What a tensor type carries as __dlpack_c_exchange_api__: views of a tensor, and the current stream, in plain C calls.
// Functions return 0, or -1 with a Python error set.
struct ExchangeApi {
  Version version;
  ExchangeApi* previous;  // an older version of the table
  void* managed_tensor_allocator;
  void* managed_tensor_from_object;
  void* managed_tensor_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);  // may be null
  int (*current_work_stream)(DeviceType device_type, int32_t device_id, void** stream);
};

}  // namespace dlpack
