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

// Chunks: row of the cache, first token, number of tokens. A plain cache has no decisions and no own states; one that
// evicts has no own states. With a delay `near` are the raw tokens (Y, G, D), and own states and entries those of the
// tokens that leave the rings.
template <class T>
struct PrefillParams {
  PagedKV kv;
  const T* q_TND;
  const T* k_TGD;
  const T* v_TGD;
  const T* near_k_YGD;
  const T* near_v_YGD;
  const int32_t* far_B2;
  T* out_TND;
  T* own_k_TGD;  // dense, like all tensors (T, G, ...) without strides
  T* own_v_TGD;
  int32_t* entry_TG;
  const bool* is_merge_TG;
  const float* omega_TG;
  const T* cos_TF;
  const T* sin_TF;
  const int32_t* chunks_B3;
  float* segments_RGUA;
  int64_t q_stride[2], k_stride[2], v_stride[2], out_stride[2];
  int64_t cos_stride, sin_stride, segments_row_stride, segments_head_stride;
  int num_chunks, num_kv_heads, group, half, merge_window, delay;
  bool compress;  // of queries
  float scale;
};

// Rows of x may lie apart; `residual`, if any, and `out` are dense and may be the same. K is a multiple of kDimStep,
// N of 4.
template <class T>
struct LinearParams {
  const T* x_MK;
  const T* w_NK;
  const T* residual_MN;
  T* out_MN;
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
template <class T>
struct SwigluParams {
  const T* x_MC;  // rows of 2 C
  T* out_MC;
  int64_t num_rows, num_channels;
};

// As above; `x` and `out` have rows of 2 C, `grad` of C.
template <class T>
struct SwigluBackwardParams {
  const T* x_MC;
  const T* grad_MC;
  T* out_MC;
  int64_t num_rows, num_channels;
};

// Gates, outputs and gradients of gates are dense. Forward `out` are the merged keys and values; backward those of the
// keys and values, and `grad` are those of the merged ones. A window of 0 is unlimited. D is a multiple of kDimStep.
template <class T>
struct MergeParams {
  const T* k_TBGD;
  const T* v_TBGD;
  const float* alpha_TBG;
  const float* omega_TBG;
  const T* grad_k_TBGD;
  const T* grad_v_TBGD;
  T* out_k_TBGD;
  T* out_v_TBGD;
  float* grad_alpha_TBG;
  float* grad_omega_TBG;
  int64_t k_stride[3], v_stride[3], grad_k_stride[3], grad_v_stride[3];
  int64_t num_tokens, batch, num_kv_heads, dim, window;
};

// Rows of channels (B, heads, tokens, D) with strides; data null: none.
template <class T>
struct TokensOf {
  T* data;
  int64_t stride[3], count;
  T* row(int64_t b, int64_t h, int64_t t) const { return data + b * stride[0] + h * stride[1] + t * stride[2]; }
};

// `far` is a stock kernel's output for the last F queries, backward its gradient of them, and far_k and far_v those of
// the first keys. What forward writes backward reads: out and lse. D is a multiple of kDimStep.
template <class T>
struct NearParams {
  TokensOf<T> q, near_k, near_v, open_k, open_v, far, out;
  TokensOf<T> grad, far_k, far_v, dq, d_near_k, d_near_v, d_open_k, d_open_v;
  const float* far_lse_BNF;
  float* lse_BNT;
  int64_t batch, num_kv_heads, group, num_queries, num_keys, num_far_queries, num_far_keys, n, dim;
  float scale;
};

template <class T>
struct KernelsOf {
  void (*append)(const AppendParams<T>&);
  void (*attend)(const AttentionParams<T>&);
  void (*linear)(const LinearParams<T>&);
  void (*rms_norm)(const NormParams<T>&);
  void (*prefill_write)(const PrefillParams<T>&);
  void (*prefill_attention)(const PrefillParams<T>&);
  void (*swiglu)(const SwigluParams<T>&);
  void (*swiglu_backward)(const SwigluBackwardParams<T>&);
  void (*merge)(const MergeParams<T>&);
  void (*merge_backward)(const MergeParams<T>&);
  void (*near_join)(const NearParams<T>&);
  void (*near_gradients)(const NearParams<T>&);
};

struct Kernels {
  KernelsOf<float> of_float;
  KernelsOf<bf16> of_bf16;
};

// Limits.
constexpr int kMaxDim = 256;
constexpr int kDimStep = 32;  // head dimensions are multiples
constexpr int kMaxGroup = 32;

// Of every instruction set that setup.py builds.
extern const Kernels kernels_DEFAULT, kernels_AVX2, kernels_AVX512, kernels_AVX512_BF16;

}  // namespace dmc::cpu
