// RMSNorm of rows, in float32: out = x / sqrt(mean(x^2) + eps) * weight.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

#include "cpu/kernels.h"
#include "cpu/vectors.h"

namespace dmc::cpu {
inline namespace CPU_CAPABILITY {

constexpr int64_t kChannelsOfThread = 1 << 15;  // fewer are not worth one

template <class T>
void rms_norm(const NormParams<T>& p) {
  const int64_t rows = std::max<int64_t>(1, kChannelsOfThread / p.num_channels);
  at::parallel_for(0, p.num_rows, rows, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const T* x = p.x_MC + m * p.x_stride;
      T* out = p.out_MC + m * p.num_channels;
      Vec a, b, sums(0.0f);
      int64_t c = 0;
      for (; c + kStep <= p.num_channels; c += kStep) {
        load(x + c, a, b);
        sums = at::vec::fmadd(a, a, at::vec::fmadd(b, b, sums));
      }
      float sum = sum_lanes(sums);
      for (; c < p.num_channels; ++c) sum += to_float(x[c]) * to_float(x[c]);
      const float scale = 1.0f / std::sqrt(sum / float(p.num_channels) + p.eps);
      for (c = 0; c + kStep <= p.num_channels; c += kStep) {
        Vec w, u;
        load(x + c, a, b);
        load(p.weight_C + c, w, u);
        store(out + c, a * Vec(scale) * w, b * Vec(scale) * u);
      }
      for (; c < p.num_channels; ++c)
        from_float(to_float(x[c]) * scale * to_float(p.weight_C[c]), out[c]);
    }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace dmc::cpu
