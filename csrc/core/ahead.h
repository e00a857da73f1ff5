// Memory that is fetched to L2 a bit at a time, while the tiles keep the core busy.
#pragma once

#include <algorithm>

#include "core/view.h"

namespace bitwright {

class Ahead {
 public:
  template <class T>
  Ahead(const T* from, Index count, Index steps)
      : at_(reinterpret_cast<const char*>(from)),
        end_(reinterpret_cast<const char*>(from + count)),
        step_(ceil_div(ceil_div(end_ - at_, kLine), std::max<Index>(steps, 1)) * kLine) {}
  void step() {
    const char* stop = end_ - at_ < step_ ? end_ : at_ + step_;
    for (; at_ < stop; at_ += kLine) __builtin_prefetch(at_, 0, 2);
  }

 private:
  static constexpr Index kLine = 64;
  const char *at_, *end_;
  Index step_;
};

}  // namespace bitwright
