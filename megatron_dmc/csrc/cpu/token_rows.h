// Rows of a token's channels to and from float32, in the order in which `load` gives the channels.
#pragma once

#include "cpu/vectors.h"

namespace dmc::cpu {
inline namespace CPU_CAPABILITY {

template <class T>
inline void load_row(const T* x, int dim, float* out_D) {
  for (int c = 0; c < dim; c += kStep) {
    Vec a, b;
    load(x + c, a, b);
    a.store(out_D + c);
    b.store(out_D + c + kLanes);
  }
}
template <class T>
inline void store_row(const float* x_D, int dim, T* out) {
  for (int c = 0; c < dim; c += kStep) store(out + c, Vec::loadu(x_D + c), Vec::loadu(x_D + c + kLanes));
}
template <class T>
inline void add_row(const T* x, int dim, float* out_D) {
  for (int c = 0; c < dim; c += kStep) {
    Vec a, b;
    load(x + c, a, b);
    (Vec::loadu(out_D + c) + a).store(out_D + c);
    (Vec::loadu(out_D + c + kLanes) + b).store(out_D + c + kLanes);
  }
}

// GCC drops calls of a function that only prefetches.
template <class T>
[[gnu::always_inline]] inline void fetch_row(const T* x, int dim) {
  for (int c = 0; c < dim; c += 64 / int(sizeof(T))) __builtin_prefetch(x + c);
}

}  // namespace CPU_CAPABILITY
}  // namespace dmc::cpu
