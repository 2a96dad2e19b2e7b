// Vectors of float32 channels, from what pages hold. Compiled once for each instruction set.
//
// Two vectors are loaded at once: `kStep` channels. bfloat16 pairs are split by shifts, even channels
// into the first vector and odd ones into the second, so queries are brought into that order (`arrange`),
// and sums of values out of it (`restore`).
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cmath>
#include <type_traits>

#include "cpu/numbers.h"

namespace dmc::cpu {
inline namespace CPU_CAPABILITY {

using Vec = at::vec::Vectorized<float>;
using Ints = at::vec::Vectorized<int32_t>;

constexpr int kLanes = Vec::size();
constexpr int kStep = 2 * kLanes;

inline Vec float_of_bits(const Ints& x) { return at::vec::cast<float>(x); }

inline void load(const float* p, Vec& a, Vec& b) {
  a = Vec::loadu(p);
  b = Vec::loadu(p + kLanes);
}
inline Ints upwards(const Ints& x);  // by 16 bits, and back
inline Ints downwards(const Ints& x);
inline void load(const bf16* p, Vec& a, Vec& b) {
  const Ints pairs = Ints::loadu(p);
  a = float_of_bits(upwards(pairs));
  b = float_of_bits(pairs & Ints(int32_t(0xffff0000)));
}

#if defined(CPU_CAPABILITY_AVX512)
inline Ints upwards(const Ints& x) { return _mm512_slli_epi32(x, 16); }
inline Ints downwards(const Ints& x) { return _mm512_srli_epi32(x, 16); }
inline Vec widened(const int8* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
inline Ints bytes(const e4m3* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
#elif defined(CPU_CAPABILITY_AVX2)
inline Ints upwards(const Ints& x) { return _mm256_slli_epi32(x, 16); }
inline Ints downwards(const Ints& x) { return _mm256_srli_epi32(x, 16); }
inline Vec widened(const int8* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
inline Ints bytes(const e4m3* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
#else
inline Ints upwards(const Ints& x) { return x << Ints(16); }
inline Ints downwards(const Ints& x) { return (x >> Ints(16)) & Ints(0xffff); }
inline Vec widened(const int8* p) {
  float x[kLanes];
  for (int i = 0; i < kLanes; ++i) x[i] = p[i].bits;
  return Vec::loadu(x);
}
inline Ints bytes(const e4m3* p) {
  int32_t x[kLanes];
  for (int i = 0; i < kLanes; ++i) x[i] = p[i].bits;
  return Ints::loadu(x);
}
#endif
// To the nearest bfloat16, ties to even, in the upper half of each lane.
inline Ints rounded(const Vec& x) {
  const Ints bits = at::vec::cast<int32_t>(Vec::blendv(x, Vec(NAN), x != x));
  return bits + (downwards(bits) & Ints(1)) + Ints(0x7fff);
}
inline void store(bf16* p, const Vec& a, const Vec& b) {
  (downwards(rounded(a)) | (rounded(b) & Ints(int32_t(0xffff0000)))).store(p);
}
inline void store(float* p, const Vec& a, const Vec& b) {
  a.store(p);
  b.store(p + kLanes);
}
// Exponent and mantissa where float32 has them, times 2^120 for the other bias; subnormal codes too. The
// code for NaN becomes 480: NaN is in the entry's scale.
inline Vec widened(const e4m3* p) {
  const Ints x = bytes(p);
  const Ints moved = ((x & Ints(0x7f)) << Ints(20)) | ((x & Ints(0x80)) << Ints(24));
  return float_of_bits(moved) * Vec(0x1p120f);
}
template <class S, std::enable_if_t<is_8bit<S>, int> = 0>
inline void load(const S* p, Vec& a, Vec& b) {
  a = widened(p);
  b = widened(p + kLanes);
}

template <class S>
constexpr bool kInterleaved = std::is_same_v<S, bf16>;

// Where channel c lies in the order in which `load` gives the channels of S.
template <class S>
inline int place(int c) {
  if (!kInterleaved<S>) return c;
  const int i = c % kStep;
  return c - i + i / 2 + (i % 2) * kLanes;
}
template <class S, class T>
inline void arrange(const T* from, float* to, int dim) {
  if constexpr (kInterleaved<S> && std::is_same_v<S, T>) {
    for (int c = 0; c < dim; c += kStep) {
      Vec a, b;
      load(from + c, a, b);
      store(to + c, a, b);
    }
  } else {
    for (int c = 0; c < dim; ++c) to[place<S>(c)] = to_float(from[c]);
  }
}
template <class S, class T>
inline void restore(const float* from, T* to, int dim, float scale) {
  if constexpr (kInterleaved<S> && std::is_same_v<S, T>) {
    for (int c = 0; c < dim; c += kStep)
      store(to + c, Vec::loadu(from + c) * Vec(scale), Vec::loadu(from + c + kLanes) * Vec(scale));
  } else {
    for (int c = 0; c < dim; ++c) from_float(from[place<S>(c)] * scale, to[c]);
  }
}

// The sums over the lanes of four vectors.
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
inline __m256 folded(__m256 x) { return x; }
#if defined(CPU_CAPABILITY_AVX512)
inline __m256 folded(__m512 x) {
  return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
}
#endif
inline void sum_lanes(const Vec& a, const Vec& b, const Vec& c, const Vec& d, float* out) {
  const __m256 ab = _mm256_hadd_ps(folded(a), folded(b)), cd = _mm256_hadd_ps(folded(c), folded(d));
  const __m256 sums = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
}
#else
inline void sum_lanes(const Vec& a, const Vec& b, const Vec& c, const Vec& d, float* out) {
  float lanes[4][kLanes];
  a.store(lanes[0]);
  b.store(lanes[1]);
  c.store(lanes[2]);
  d.store(lanes[3]);
  for (int i = 0; i < 4; ++i) {
    float sum = 0.0f;
    for (int j = 0; j < kLanes; ++j) sum += lanes[i][j];
    out[i] = sum;
  }
}
#endif

// Over the lanes; the largest is NaN if one is.
inline float largest(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, x);
}
inline float sum_lanes(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, x);
}

}  // namespace CPU_CAPABILITY
}  // namespace dmc::cpu
