// Device memory, streams and graphs for the example through the CUDA driver alone, found at run time: the program
// builds without a CUDA toolkit and starts without a driver. An engine has its own, and needs none of this.
#pragma once

#include <dlfcn.h>
#include <dsv4/dsv4.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

namespace engine {

using DevicePointer = unsigned long long;

// A function of libcuda.so.1 by name, typed by its use.
template <typename Function>
Function* driver(const char* name) {
  static void* const library = dlopen("libcuda.so.1", RTLD_NOW);
  void* const found = library ? dlsym(library, name) : nullptr;
  if (!found) {
    std::fprintf(stderr, "engine: the CUDA driver has no %s\n", name);
    std::exit(EXIT_FAILURE);
  }
  return reinterpret_cast<Function*>(found);
}

inline void check(int result, const char* what) {
  if (result == 0) return;
  std::fprintf(stderr, "engine: %s failed with %d\n", what, result);
  std::exit(EXIT_FAILURE);
}

// Makes device 0 current, in the context that the CUDA runtime uses too.
inline void open_device() {
  int device = 0;
  void* context = nullptr;
  check(driver<int(unsigned)>("cuInit")(0), "cuInit");
  check(driver<int(int*, int)>("cuDeviceGet")(&device, 0), "cuDeviceGet");
  check(driver<int(void**, int)>("cuDevicePrimaryCtxRetain")(&context, device), "cuDevicePrimaryCtxRetain");
  check(driver<int(void*)>("cuCtxSetCurrent")(context), "cuCtxSetCurrent");
}

inline dsv4_stream make_stream() {
  constexpr unsigned kNonBlocking = 1;  // does not wait for the legacy default stream
  dsv4_stream stream = nullptr;
  check(driver<int(dsv4_stream*, unsigned)>("cuStreamCreate")(&stream, kNonBlocking), "cuStreamCreate");
  return stream;
}

inline void wait_for(dsv4_stream stream) {
  check(driver<int(dsv4_stream)>("cuStreamSynchronize")(stream), "cuStreamSynchronize");
}

// Values in device memory.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(const std::vector<T>& values) : count_(values.size()) {
    check(driver<int(DevicePointer*, size_t)>("cuMemAlloc_v2")(&address_, bytes()), "cuMemAlloc");
    check(driver<int(DevicePointer, const void*, size_t)>("cuMemcpyHtoD_v2")(address_, values.data(), bytes()),
          "cuMemcpyHtoD");
    // The copy may still be under way, and streams that do not wait for the default one would not wait for it.
    check(driver<int()>("cuCtxSynchronize")(), "cuCtxSynchronize");
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { driver<int(DevicePointer)>("cuMemFree_v2")(address_); }

  T* data() const { return reinterpret_cast<T*>(address_); }

  // Other values in the same place, where a captured graph reads them.
  void write(const std::vector<T>& values) const {
    check(driver<int(DevicePointer, const void*, size_t)>("cuMemcpyHtoD_v2")(address_, values.data(), bytes()),
          "cuMemcpyHtoD");
    check(driver<int()>("cuCtxSynchronize")(), "cuCtxSynchronize");
  }

  std::vector<T> read() const {
    std::vector<T> values(count_);
    check(driver<int(void*, DevicePointer, size_t)>("cuMemcpyDtoH_v2")(values.data(), address_, bytes()),
          "cuMemcpyDtoH");
    return values;
  }

 private:
  size_t bytes() const { return count_ * sizeof(T); }

  size_t count_;
  DevicePointer address_ = 0;
};

// What a function enqueues on a stream, captured once, to be launched again and again.
class Graph {
 public:
  template <typename Function>
  Graph(dsv4_stream stream, Function&& function) : stream_(stream) {
    constexpr int kGlobal = 0;  // the strictest mode: forbids what is not safe in a capture, in every thread
    check(driver<int(dsv4_stream, int)>("cuStreamBeginCapture_v2")(stream, kGlobal), "cuStreamBeginCapture");
    function();
    check(driver<int(dsv4_stream, void**)>("cuStreamEndCapture")(stream, &graph_), "cuStreamEndCapture");
    check(driver<int(void**, void*, unsigned long long)>("cuGraphInstantiateWithFlags")(&executable_, graph_, 0),
          "cuGraphInstantiate");
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() {
    driver<int(void*)>("cuGraphExecDestroy")(executable_);
    driver<int(void*)>("cuGraphDestroy")(graph_);
  }

  void launch() const {
    check(driver<int(void*, dsv4_stream)>("cuGraphLaunch")(executable_, stream_), "cuGraphLaunch");
  }

 private:
  dsv4_stream stream_;
  void* graph_ = nullptr;
  void* executable_ = nullptr;
};

}  // namespace engine
