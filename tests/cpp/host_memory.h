// The arrays of device_memory.h in host memory, for a run without a GPU, in which launches are observed and not made.
#pragma once

#include <algorithm>
#include <cstddef>
#include <utility>
#include <vector>

namespace engine {

// Is told of every array's memory.
inline void (*on_host_memory)(void* data, size_t bytes) = nullptr;

template <typename T>
class HostArray {
 public:
  explicit HostArray(std::vector<T> values) : values_(std::move(values)) {
    if (on_host_memory) on_host_memory(data(), values_.size() * sizeof(T));
  }
  HostArray(const HostArray&) = delete;
  HostArray& operator=(const HostArray&) = delete;

  T* data() const { return values_.data(); }
  const std::vector<T>& read() const { return values_; }
  void write(const std::vector<T>& values) const { std::copy(values.begin(), values.end(), values_.begin()); }

 private:
  mutable std::vector<T> values_;
};

}  // namespace engine
