// What the operators hand to the CPU's kernels, and the kernels of one instruction set.
//
// Numbers T are float or bf16. Dimension letters as in dmc/attention.h.
#pragma once

#include "dmc/append.h"
#include "dmc/paged_kv.h"

namespace dmc::cpu {

template <class T>
struct AttentionParams {
  PagedKV kv;
  const T* q_BND;
  T* out_BND;
  const int64_t* rows_B;
  int64_t q_stride[2], out_stride[2];
  int num_requests, num_kv_heads, group;
  float scale;
};

// Rows of x may lie apart; `residual`, if any, and `out` are dense and may be the same. K is a multiple of kDimStep,
// N of 4.
struct LinearParams {
  const bf16* x_MK;
  const bf16* w_NK;
  const bf16* residual_MN;
  bf16* out_MN;
  int64_t num_rows, num_inputs, num_outputs, x_stride;
};

// Rows of x may lie apart, and `out` is dense.
template <class T>
struct NormParams {
  const T* x_MC;
  const T* weight_C;
  T* out_MC;
  int64_t num_rows, num_channels, x_stride;
  float eps;
};

// Dense. C is a multiple of kDimStep.
struct SwigluParams {
  const bf16* x_MC;  // rows of 2 C
  bf16* out_MC;
  int64_t num_rows, num_channels;
};

template <class T>
struct KernelsOf {
  void (*append)(const AppendParams<T>&);
  void (*attend)(const AttentionParams<T>&);
  void (*rms_norm)(const NormParams<T>&);
};

struct Kernels {
  KernelsOf<float> of_float;
  KernelsOf<bf16> of_bf16;
  void (*linear)(const LinearParams&);
  void (*swiglu)(const SwigluParams&);
};

// Limits.
constexpr int kMaxDim = 256;
constexpr int kDimStep = 32;  // head dimensions are multiples
constexpr int kMaxGroup = 32;

// Of every instruction set that setup.py builds.
extern const Kernels kernels_DEFAULT, kernels_AVX2, kernels_AVX512, kernels_AVX512_BF16;

}  // namespace dmc::cpu
