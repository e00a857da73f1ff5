// Scratch memory on cache-line boundaries; not initialised unless asked for. Large ones ask for
// pages of 2 MB where the system gives them on request: panels are read across many rows, and on a
// virtual machine every page that the processor has to look up costs twice.
#pragma once

#include <cstddef>
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
  explicit Buffer(std::ptrdiff_t count, bool zero = false) : data_(allocate(bytes(count))) {
    if (zero) std::memset(static_cast<void*>(data_.get()), 0, bytes(count));
  }
  T* get() { return data_.get(); }
  const T* get() const { return data_.get(); }
  T* operator+(std::ptrdiff_t offset) { return data_.get() + offset; }
  const T* operator+(std::ptrdiff_t offset) const { return data_.get() + offset; }
  T& operator[](std::ptrdiff_t i) { return data_.get()[i]; }
  const T& operator[](std::ptrdiff_t i) const { return data_.get()[i]; }

 private:
  static constexpr std::size_t kLine = 64, kPage = std::size_t{2} << 20;
  struct Free {
    std::align_val_t alignment;
    void operator()(T* p) const { ::operator delete(p, alignment); }
  };
  using Memory = std::unique_ptr<T, Free>;

  static std::size_t bytes(std::ptrdiff_t count) {
    return (static_cast<std::size_t>(count) * sizeof(T) + kLine - 1) / kLine * kLine + kLine;
  }
  static Memory allocate(std::size_t size) {
    const std::align_val_t alignment{size < 2 * kPage ? kLine : kPage};
    void* memory = ::operator new(size, alignment);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (size >= 2 * kPage) madvise(memory, size / kPage * kPage, MADV_HUGEPAGE);  // a wish
#endif
    return Memory(static_cast<T*>(memory), Free{alignment});
  }

  Memory data_;
};

}  // namespace bitwright
