// The operators of training's merge. For cpu/binding.cpp, which defines `launch_for` and `kernels_of` before.
#pragma once

#include "checks.h"
#include "cpu/kernels.h"

namespace {

constexpr const char* kMergeSchema =
    "merge(Tensor k, Tensor v, Tensor alpha, Tensor omega, Tensor(a!) out_k, Tensor(b!) out_v, int merge_window) -> ()";
constexpr const char* kMergeBackwardSchema =
    "merge_backward(Tensor k, Tensor v, Tensor alpha, Tensor omega, Tensor merged_k_grad, Tensor merged_v_grad, "
    "Tensor(a!) k_grad, Tensor(b!) v_grad, Tensor(c!) alpha_grad, Tensor(d!) omega_grad, int merge_window) -> ()";

// `rows` have strides, `outs` are dense, and so are the gates.
void check_merge(std::initializer_list<Argument> rows, std::initializer_list<Argument> outs,
                 std::initializer_list<Argument> gates, int64_t merge_window) {
  const Tensor& k = *rows.begin()->tensor;
  check_shape(k, "k", {kAny, kAny, kAny, kAny});
  check_kernel_dtype(k.scalar_type());
  TORCH_CHECK_VALUE(k.size(3) % dmc::cpu::kDimStep == 0, "k has ", k.size(3), " channels; the kernels take multiples of ",
                    dmc::cpu::kDimStep);
  TORCH_CHECK_VALUE(merge_window >= 0, "merge_window=", merge_window, " must be 0 (unlimited) or positive");
  for (const auto& [name, x] : rows) {
    check_shape(*x, name, {k.size(0), k.size(1), k.size(2), k.size(3)});
    check_dtype(*x, name, k.scalar_type());
    check_last_dense(*x, name);
    check_device(*x, name, k);
  }
  for (const auto& [name, x] : outs) {
    check_shape(*x, name, {k.size(0), k.size(1), k.size(2), k.size(3)});
    check_dtype(*x, name, k.scalar_type());
    check_dense(*x, name);
    check_device(*x, name, k);
  }
  for (const auto& [name, x] : gates) {
    check_shape(*x, name, {k.size(0), k.size(1), k.size(2)});
    check_dtype(*x, name, ScalarType::Float);
    check_dense(*x, name);
    check_device(*x, name, k);
  }
}

template <class T>
dmc::cpu::MergeParams<T> merge_params(const Tensor& k, const Tensor& v, const Tensor& alpha, const Tensor& omega,
                                      const Tensor& out_k, const Tensor& out_v, int64_t merge_window) {
  dmc::cpu::MergeParams<T> p{};
  p.k_TBGD = data<T>(k);
  p.v_TBGD = data<T>(v);
  copy_strides(p.k_stride, k);
  copy_strides(p.v_stride, v);
  p.alpha_TBG = data<float>(alpha);
  p.omega_TBG = data<float>(omega);
  p.out_k_TBGD = data<T>(out_k);
  p.out_v_TBGD = data<T>(out_v);
  p.num_tokens = k.size(0);
  p.batch = k.size(1);
  p.num_kv_heads = k.size(2);
  p.dim = k.size(3);
  p.window = merge_window;
  return p;
}

void merge(const Tensor& k, const Tensor& v, const Tensor& alpha, const Tensor& omega, const Tensor& out_k,
           const Tensor& out_v, int64_t merge_window) {
  check_merge({{"k", k}, {"v", v}}, {{"out_k", out_k}, {"out_v", out_v}}, {{"alpha", alpha}, {"omega", omega}},
              merge_window);
  launch_for(k, [&](auto type) {
    using T = decltype(type);
    kernels_of<T>().merge(merge_params<T>(k, v, alpha, omega, out_k, out_v, merge_window));
  });
}

void merge_backward(const Tensor& k, const Tensor& v, const Tensor& alpha, const Tensor& omega, const Tensor& merged_k_grad,
                    const Tensor& merged_v_grad, const Tensor& k_grad, const Tensor& v_grad, const Tensor& alpha_grad,
                    const Tensor& omega_grad, int64_t merge_window) {
  check_merge({{"k", k}, {"v", v}, {"merged_k_grad", merged_k_grad}, {"merged_v_grad", merged_v_grad}},
              {{"k_grad", k_grad}, {"v_grad", v_grad}},
              {{"alpha", alpha}, {"omega", omega}, {"alpha_grad", alpha_grad}, {"omega_grad", omega_grad}}, merge_window);
  launch_for(k, [&](auto type) {
    using T = decltype(type);
    auto p = merge_params<T>(k, v, alpha, omega, k_grad, v_grad, merge_window);
    p.grad_k_TBGD = data<T>(merged_k_grad);
    p.grad_v_TBGD = data<T>(merged_v_grad);
    copy_strides(p.grad_k_stride, merged_k_grad);
    copy_strides(p.grad_v_stride, merged_v_grad);
    p.grad_alpha_TBG = data<float>(alpha_grad);
    p.grad_omega_TBG = data<float>(omega_grad);
    kernels_of<T>().merge_backward(p);
  });
}

}  // namespace
