// Codes as a bitstream, least significant bit first, in 32-bit words.
#pragma once

#include <cstring>

#include "core/view.h"

namespace bitwright {

// Eight codes of 4 bits, a byte each, as one word: pairs, fours, all eight.
inline std::uint32_t eight_of_four(std::uint64_t bytes) {
  bytes = (bytes | bytes >> 4) & 0x00FF00FF00FF00FFU;
  bytes = (bytes | bytes >> 8) & 0x0000FFFF0000FFFFU;
  return static_cast<std::uint32_t>(bytes | bytes >> 16);
}

// codes [count] of `bits` bits each, that fit, to ceil(count bits / 32) words.
inline void write_bits(const std::uint8_t* codes, Index count, int bits, std::uint32_t* words) {
  Index i = 0;
  for (; bits == 4 && i + 8 <= count; i += 8) {
    std::uint64_t bytes;
    std::memcpy(&bytes, codes + i, sizeof bytes);
    *words++ = eight_of_four(bytes);
  }
  std::uint64_t window = 0;
  int filled = 0;
  for (; i < count; ++i) {
    window |= static_cast<std::uint64_t>(codes[i]) << filled;
    filled += bits;
    if (filled >= 32) {
      *words++ = static_cast<std::uint32_t>(window);
      window >>= 32;
      filled -= 32;
    }
  }
  if (filled > 0) *words = static_cast<std::uint32_t>(window);
}

}  // namespace bitwright
