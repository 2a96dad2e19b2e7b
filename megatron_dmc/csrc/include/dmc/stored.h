// Entries of 8 bits with a scale each; megatron_dmc/ops/paged/kv_pages.py defines the rule. The written
// bytes are identical on every GPU and on a host.
#pragma once

#include "dmc/platform.h"

namespace dmc {

struct e4m3 {
  uint8_t bits;
};
struct int8 {
  int8_t bits;
};

// Storage types of a cache's pages.
enum Stored : int { kNumbers, kE4m3, kInt8 };

template <class S>
constexpr bool is_8bit = sizeof(S) == 1;

template <class S>
constexpr float kLargest = 0.0f;
template <>
constexpr float kLargest<e4m3> = 448.0f;
template <>
constexpr float kLargest<int8> = 127.0f;

// An entry's scale, from the bits of its largest |x|: as an integer NaN is larger than any number.
template <class S>
DMC_DEVICE float scale_of(uint32_t most) {
  constexpr uint32_t kSmallest = 0x0d800000u;  // 2^-100
  return bits_float(most > kSmallest ? most : kSmallest) * (1.0f / kLargest<S>);
}

// x over its entry's scale, to the nearest code, ties to even.
DMC_DEVICE void encode(float x, e4m3& out) {
  const uint32_t bits = float_bits(x), magnitude = bits & 0x7fffffffu;
  uint32_t code;
  if (magnitude < 0x3c800000u) {  // below 2^-6 codes are steps of 2^-9, the last bit of 2^14
    code = float_bits(bits_float(magnitude) + 16384.0f) - 0x46800000u;
  } else {  // the exponent's bias from 127 to 7, and 20 of 23 bits rounded away
    code = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - 960u;
    code = code < 0x7fu ? code : 0x7fu;
  }
  out.bits = uint8_t(code | ((bits >> 24) & 0x80u));
}
DMC_DEVICE void encode(float x, int8& out) {
  // adding 1.5 * 2^23 leaves a whole number in the low bits
  out.bits = int8_t(uint8_t(float_bits(x + 12582912.0f) - 0x4b400000u));
}

// A code without its entry's scale.
DMC_DEVICE float to_float(e4m3 x) {
  const uint32_t bits = (x.bits & 0x7fu) << 20 | (x.bits & 0x80u) << 24;
  return bits_float(bits) * 0x1p120f;
}
DMC_DEVICE float to_float(int8 x) { return float(x.bits); }

// Four bytes to two pairs of T, exactly: bytes 0 and 2, and bytes 1 and 3, in units of `unit`.
// For fp16 the unit keeps codes near 1, so that a weight times scale and unit does not become subnormal.
DMC_DEVICE void widen(uint32_t x, uint32_t& even, uint32_t& odd, e4m3, bf16) {
  const auto one = [](uint32_t high) {  // codes in the upper bytes
    const uint32_t tiny = (high & 0x80008000u) | ((high >> 4) & 0x07f007f0u);
    return multiply_add_pairs(tiny, 0x7b807b80u, 0x80008000u, bf16{});  // 2^120; -0
  };
  even = one(x << 8);
  odd = one(x);
}
DMC_DEVICE void widen(uint32_t x, uint32_t& even, uint32_t& odd, e4m3, fp16) {
  const auto one = [](uint32_t high) {
    return (high & 0x80008000u) | ((high >> 1) & 0x3f803f80u);
  };
  even = one(x << 8);
  odd = one(x);
}
DMC_DEVICE void widen(uint32_t x, uint32_t& even, uint32_t& odd, int8, bf16) {
  const auto one = [](uint32_t low) {  // 128 + seven bits, minus 128, or 256 if the sign is set
    return multiply_add_pairs((low & 0x007f007fu) | 0x43004300u, 0x3f803f80u,
                              (low & 0x00800080u) | 0xc300c300u, bf16{});
  };
  even = one(x);
  odd = one(x >> 8);
}
DMC_DEVICE void widen(uint32_t x, uint32_t& even, uint32_t& odd, int8, fp16) {
  const auto one = [](uint32_t low) {  // (1152 + x) / 128 - 9
    return multiply_add_pairs((low & 0x00ff00ffu) ^ 0x64806480u, 0x20002000u, 0xc880c880u, fp16{});
  };
  even = one(x);
  odd = one(x >> 8);
}

template <class S, class T>
constexpr float unit = 1.0f;
template <>
constexpr float unit<e4m3, fp16> = 256.0f;
template <>
constexpr float unit<int8, fp16> = 128.0f;

}  // namespace dmc
