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

// And back.
inline std::uint64_t bytes_of_eight(std::uint32_t word) {
  std::uint64_t bytes = word;
  bytes = (bytes | bytes << 16) & 0x0000FFFF0000FFFFU;
  bytes = (bytes | bytes << 8) & 0x00FF00FF00FF00FFU;
  return (bytes | bytes << 4) & 0x0F0F0F0F0F0F0F0FU;
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

// Eight codes of `bits` bits each, side by side, to a byte each: halves, quarters, single ones.
class Spread {
 public:
  explicit Spread(int bits) : bits_(bits) {}
  std::uint64_t operator()(std::uint64_t codes) const {
    codes = apart(codes, 4, 0x0000000000000001U);
    codes = apart(codes, 2, 0x0000000100000001U);
    return apart(codes, 1, 0x0001000100010001U);
  }

 private:
  // Of each part the first `count` codes stay, the next move to where a byte each has them.
  std::uint64_t apart(std::uint64_t codes, int count, std::uint64_t parts) const {
    const std::uint64_t low = ((std::uint64_t{1} << count * bits_) - 1) * parts;
    return (codes & low) | (codes & low << count * bits_) << count * (8 - bits_);
  }
  int bits_;
};

// The codes of such words.
inline void read_bits(const std::uint32_t* words, Index count, int bits, std::uint8_t* codes) {
  Index i = 0;
  for (; bits == 4 && i + 8 <= count; i += 8) {
    const std::uint64_t bytes = bytes_of_eight(*words++);
    std::memcpy(codes + i, &bytes, sizeof bytes);
  }
  const auto* bytes = reinterpret_cast<const unsigned char*>(words);
  const unsigned char* end = bytes + (((count - i) * bits + 31) / 32) * 4;
  const Spread spread(bits);
  for (; i < count; i += 8, bytes += bits) {
    std::uint64_t eight = 0;
    if (end - bytes >= 8)
      std::memcpy(&eight, bytes, 8);
    else
      std::memcpy(&eight, bytes, static_cast<std::size_t>(end - bytes));
    eight = spread(eight);
    if (count - i >= 8)
      std::memcpy(codes + i, &eight, 8);
    else
      std::memcpy(codes + i, &eight, static_cast<std::size_t>(count - i));
  }
}

}  // namespace bitwright
