// Products of a few rows whose sums stay in registers.
#pragma once

#include "cpu/vectors.h"

namespace dmc::cpu {
inline namespace CPU_CAPABILITY {

// sum += a b, in place: left to itself the compiler copies sums around and spills them.
inline void add_product(const Vec& a, const Vec& b, Vec& sum) {
#if defined(CPU_CAPABILITY_AVX512)
  __m512 x = sum;
  asm("vfmadd231ps %1, %2, %0" : "+v"(x) : "v"(__m512(a)), "v"(__m512(b)));
  sum = x;
#elif defined(CPU_CAPABILITY_AVX2)
  __m256 x = sum;
  asm("vfmadd231ps %1, %2, %0" : "+x"(x) : "x"(__m256(a)), "x"(__m256(b)));
  sum = x;
#else
  sum = at::vec::fmadd(a, b, sum);
#endif
}

// The two vectors that `load` gives for a step of channels, one at a time.
template <int I, class S>
inline Vec half(const S* w) {
  if constexpr (is_8bit<S>) {
    return widened(w + I * kLanes);
  } else {
    return Vec::loadu(w + I * kLanes);
  }
}
template <int I>
inline Vec half(const bf16* w) {
  const Ints pairs = Ints::loadu(w);
  return float_of_bits(upwards(I == 0 ? pairs : downwards(pairs)));  // a mask would take a register
}

// Add products of a half of a step's channels, of R rows of x and E rows of w: 12 sums at most are in registers.
template <int I, int R, int E, class W>
inline void add_half(const W* w, int64_t w_stride, const float* x, int64_t x_stride, Vec (&sums)[R][E]) {
  constexpr bool kHoldsRows = R < E;
  const auto row = [&](int r) { return Vec::loadu(x + r * x_stride + I * kLanes); };
  const auto weight = [&](int e) { return half<I>(w + e * w_stride); };
  Vec all[kHoldsRows ? R : E];
#pragma GCC unroll 4
  for (int i = 0; i < (kHoldsRows ? R : E); ++i) all[i] = kHoldsRows ? row(i) : weight(i);
#pragma GCC unroll 12
  for (int i = 0; i < (kHoldsRows ? E : R); ++i) {
    const Vec one = kHoldsRows ? weight(i) : row(i);
#pragma GCC unroll 4
    for (int j = 0; j < (kHoldsRows ? R : E); ++j) {
      add_product(one, all[j], kHoldsRows ? sums[j][i] : sums[i][j]);
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace dmc::cpu
