// One way to refuse input: a sentence that says what was wanted and what came.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace bitwright {

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// Throws std::invalid_argument (ValueError in Python) with the parts joined, unless `ok`.
template <class... Parts>
void require(bool ok, const Parts&... parts) {
  if (!ok) throw std::invalid_argument(text(parts...));
}

}  // namespace bitwright
