// The gate of an MLP: out = silu(gate) * up, where rows of x are [gate, up]; in float32, rounded once.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/norm.h"
#include "cpu/vectors.h"

namespace dmc::cpu {
inline namespace CPU_CAPABILITY {

inline Vec silu_times(const Vec& gate, const Vec& up) { return gate * up / (Vec(1.0f) + gate.neg().exp_u20()); }

template <class T>
void swiglu(const SwigluParams<T>& p) {
  const int64_t rows = std::max<int64_t>(1, kChannelsOfThread / p.num_channels);
  at::parallel_for(0, p.num_rows, rows, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const T* gate = p.x_MC + 2 * m * p.num_channels;
      const T* up = gate + p.num_channels;
      T* out = p.out_MC + m * p.num_channels;
      for (int64_t c = 0; c < p.num_channels; c += kStep) {
        Vec a, b, u, v;
        load(gate + c, a, b);
        load(up + c, u, v);
        store(out + c, silu_times(a, u), silu_times(b, v));
      }
    }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace dmc::cpu
