// Scratch memory on cache-line boundaries; not initialised unless asked for. What is large asks the
// system for large pages: fewer faults when it is first touched, fewer look-ups of addresses after.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bitwright {

template <class T>
class Buffer {
 public:
  explicit Buffer(std::ptrdiff_t count, bool zero = false)
      : data_(static_cast<T*>(::operator new(bytes(count), std::align_val_t{kLine}))) {
    large_pages(data_.get(), bytes(count));
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
  static void large_pages([[maybe_unused]] T* data, [[maybe_unused]] std::size_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr std::uintptr_t kPage = 4096, kLarge = std::uintptr_t{1} << 22;
    if (size < kLarge) return;
    const std::uintptr_t begin =
        (reinterpret_cast<std::uintptr_t>(data) + kPage - 1) / kPage * kPage;
    const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(data) + size) / kPage * kPage;
    ::madvise(reinterpret_cast<void*>(begin), end - begin,
              MADV_HUGEPAGE);  // advice: may be refused
#endif
  }
  std::unique_ptr<T, Free> data_;
};

}  // namespace bitwright
