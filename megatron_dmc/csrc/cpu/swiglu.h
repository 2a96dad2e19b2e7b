// The gate of an MLP: out = silu(gate) * up, where rows of x are [gate, up], and its gradient; in float32, rounded once.
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

// The gradients of gate and up for the gradient of one vector of outputs.
inline void swiglu_backward(const Vec& gate, const Vec& up, const Vec& grad, Vec& of_gate, Vec& of_up) {
  const Vec one(1.0f), sigmoid = one / (one + gate.neg().exp_u20());
  of_gate = grad * up * sigmoid * (one + gate * (one - sigmoid));
  of_up = grad * gate * sigmoid;
}

template <class T>
void swiglu_backward(const SwigluBackwardParams<T>& p) {
  const int64_t rows = std::max<int64_t>(1, kChannelsOfThread / p.num_channels);
  at::parallel_for(0, p.num_rows, rows, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const int64_t first = 2 * m * p.num_channels, second = first + p.num_channels;
      for (int64_t c = 0; c < p.num_channels; c += kStep) {
        Vec gate[2], up[2], grad[2], of_gate[2], of_up[2];
        load(p.x_MC + first + c, gate[0], gate[1]);
        load(p.x_MC + second + c, up[0], up[1]);
        load(p.grad_MC + m * p.num_channels + c, grad[0], grad[1]);
        for (int i = 0; i < 2; ++i) swiglu_backward(gate[i], up[i], grad[i], of_gate[i], of_up[i]);
        store(p.out_MC + first + c, of_gate[0], of_gate[1]);
        store(p.out_MC + second + c, of_up[0], of_up[1]);
      }
    }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace dmc::cpu
