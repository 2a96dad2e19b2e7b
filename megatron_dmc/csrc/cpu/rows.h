// What happens to one key, value or query: RoPE, the open segment, and the entry that a page holds.
//
// Loops over channels are left to the compiler's vectors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/numbers.h"
#include "dmc/paged_kv.h"

namespace dmc::cpu {
inline namespace CPU_CAPABILITY {

// `BORROWED_CHANNEL` of ops/gates.py.
inline int borrowed_channel(int dim) { return dim - 1; }

// The channels in float32; when compressing the borrowed one is 0.
template <class T>
inline void read(const T* from, float* to, int dim, bool compress) {
  for (int c = 0; c < dim; ++c) to[c] = to_float(from[c]);
  if (compress) to[borrowed_channel(dim)] = 0.0f;
}

// Cosines and sines of a position, for pairs of channels (j, j + half).
template <class T>
struct Angles {
  const T* cos;
  const T* sin;
  int half;
};

// RoPE, half-split, or with direction -1 back; afterwards the borrowed channel is 0 again.
template <class T>
inline void turn(float* x, int dim, const Angles<T>& by, bool compress, float direction = 1.0f) {
  for (int j = 0; j < by.half; ++j) {
    const float a = x[j], b = x[j + by.half], cos = to_float(by.cos[j]);
    const float sin = direction * to_float(by.sin[j]);
    x[j] = a * cos - b * sin;
    x[j + by.half] = b * cos + a * sin;
  }
  if (compress) x[borrowed_channel(dim)] = 0.0f;
}

// Rows of [omega k, omega v, omega]: one sum, or with a merge window its latest tokens.
struct OpenSegment {
  float* kept_UA;
  int dim, merge_window;

  int size() const { return 2 * dim + 1; }

  // Merge a token, or open a new segment with it; `kv` becomes the segment's state.
  void take(float* kv, float omega, bool is_merge) const {
    const int a = size(), rows = merge_window ? merge_window : 1;
    float* newest = kept_UA + (rows - 1) * a;
    if (!is_merge) std::fill_n(kept_UA, rows * a, 0.0f);
    if (merge_window) {
      std::copy(kept_UA + a, kept_UA + rows * a, kept_UA);
      std::fill_n(newest, a, 0.0f);
    }
    for (int c = 0; c < 2 * dim; ++c) newest[c] += omega * kv[c];
    newest[2 * dim] += omega;
    emit(kv);
  }

  void emit(float* kv) const {
    const int a = size();
    float omega = 0.0f;
    std::fill_n(kv, 2 * dim, 0.0f);
    for (int u = 0; u < std::max(merge_window, 1); ++u) {
      const float* row = kept_UA + u * a;
      for (int c = 0; c < 2 * dim; ++c) kv[c] += row[c];
      omega += row[2 * dim];
    }
    const float scale = 1.0f / omega;
    for (int c = 0; c < 2 * dim; ++c) kv[c] *= scale;
  }
};

template <class S>
inline void write_row(const float* x, void* pages, float* scales, int64_t slot, int dim) {
  S* to = static_cast<S*>(pages) + slot * dim;
  if constexpr (is_8bit<S>) {
    uint32_t most = 0;
    for (int c = 0; c < dim; ++c) most = std::max(most, float_bits(x[c]) & 0x7fffffffu);
    const float scale = scales[slot] = scale_of<S>(most);
    for (int c = 0; c < dim; ++c) encode(x[c] / scale, to[c]);
  } else {
    for (int c = 0; c < dim; ++c) from_float(x[c], to[c]);
  }
}

// A key and the value behind it, as the pages hold them.
template <class T>
inline void write_entry(const PagedKV& kv, int64_t slot, const float* x) {
  const auto both = [&](auto stored) {
    using S = decltype(stored);
    write_row<S>(x, kv.k_pages_PSD, kv.k_scales_PS, slot, kv.head_dim);
    write_row<S>(x + kv.head_dim, kv.v_pages_PSD, kv.v_scales_PS, slot, kv.head_dim);
  };
  switch (kv.stored) {
    case kE4m3: return both(e4m3{});
    case kInt8: return both(int8{});
    default: return both(T{});
  }
}

template <class S>
inline void read_row(float* x, const void* pages, const float* scales, int64_t slot, int dim) {
  const S* from = static_cast<const S*>(pages) + slot * dim;
  const float scale = is_8bit<S> ? scales[slot] : 1.0f;
  for (int c = 0; c < dim; ++c) x[c] = to_float(from[c]) * scale;
}

// The inverse of `write_entry`.
template <class T>
inline void read_entry(const PagedKV& kv, int64_t slot, float* x) {
  const auto both = [&](auto stored) {
    using S = decltype(stored);
    read_row<S>(x, kv.k_pages_PSD, kv.k_scales_PS, slot, kv.head_dim);
    read_row<S>(x + kv.head_dim, kv.v_pages_PSD, kv.v_scales_PS, slot, kv.head_dim);
  };
  switch (kv.stored) {
    case kE4m3: return both(e4m3{});
    case kInt8: return both(int8{});
    default: return both(T{});
  }
}

// From one slot to another, as it is stored.
template <class T>
inline void copy_entry(const PagedKV& kv, int64_t from, int64_t to) {
  const int64_t bytes = kv.head_dim * (kv.stored == kNumbers ? sizeof(T) : 1);
  for (void* pages : {kv.k_pages_PSD, kv.v_pages_PSD})
    std::memcpy(static_cast<char*>(pages) + to * bytes, static_cast<char*>(pages) + from * bytes, bytes);
  if (kv.stored == kNumbers) return;
  for (float* scales : {kv.k_scales_PS, kv.v_scales_PS}) scales[to] = scales[from];
}

}  // namespace CPU_CAPABILITY
}  // namespace dmc::cpu
