// 16-bit float words to float32, exact for every finite value; NaN stays NaN, infinity infinity.
#pragma once

#include <cstdint>
#include <cstring>

namespace bitwright {

inline float as_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float from_bf16(std::uint16_t word) {
  return as_float(static_cast<std::uint32_t>(word) << 16);
}

// Ties to even; NaN stays NaN.
inline std::uint16_t to_bf16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7FFFFFFFU) > 0x7F800000U) return static_cast<std::uint16_t>(bits >> 16 | 0x40U);
  return static_cast<std::uint16_t>((bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16);
}

// Exponent and mantissa are shifted into place and 2^112 corrects the bias, subnormals included.
inline float from_fp16(std::uint16_t word) {
  const std::uint32_t sign = static_cast<std::uint32_t>(word & 0x8000U) << 16;
  const std::uint32_t rest = static_cast<std::uint32_t>(word & 0x7FFFU) << 13;
  const bool special = (word & 0x7C00U) == 0x7C00U;
  const float scaled = as_float(rest) * 0x1p112F;
  std::uint32_t bits;
  std::memcpy(&bits, &scaled, sizeof bits);
  return as_float(sign | (special ? (rest | 0x7F800000U) : bits));
}

}  // namespace bitwright
