// Scratch memory on cache-line boundaries; not initialised unless asked for.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace bitwright {

template <class T>
class Buffer {
 public:
  explicit Buffer(std::ptrdiff_t count, bool zero = false)
      : data_(static_cast<T*>(::operator new(bytes(count), std::align_val_t{kLine}))) {
    if (zero) std::memset(static_cast<void*>(data_.get()), 0, bytes(count));
  }
  T* get() { return data_.get(); }
  const T* get() const { return data_.get(); }
  T* operator+(std::ptrdiff_t offset) { return data_.get() + offset; }
  const T* operator+(std::ptrdiff_t offset) const { return data_.get() + offset; }
  T& operator[](std::ptrdiff_t i) { return data_.get()[i]; }
  const T& operator[](std::ptrdiff_t i) const { return data_.get()[i]; }

 private:
  static constexpr std::size_t kLine = 64;
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t{kLine}); }
  };
  static std::size_t bytes(std::ptrdiff_t count) {
    return (static_cast<std::size_t>(count) * sizeof(T) + kLine - 1) / kLine * kLine + kLine;
  }
  std::unique_ptr<T, Free> data_;
};

}  // namespace bitwright
