// The operators of training's near tokens and open states. For cpu/binding.cpp, which defines `launch_for` and
// `kernels_of` before.
#pragma once

#include "checks.h"
#include "cpu/kernels.h"

namespace {

constexpr const char* kNearJoinSchema =
    "near_join(Tensor q, Tensor? near_k, Tensor? near_v, Tensor? open_k, Tensor? open_v, Tensor? far_out, "
    "Tensor? far_lse, Tensor(a!) out, Tensor(b!) lse, int n, float softmax_scale) -> ()";
constexpr const char* kNearGradientsSchema =
    "near_gradients(Tensor grad, Tensor q, Tensor out, Tensor lse, Tensor? near_k, Tensor? near_v, Tensor? open_k, "
    "Tensor? open_v, Tensor? far_q, Tensor? far_k, Tensor? far_v, Tensor(a!) q_grad, Tensor(b!)? near_k_grad, "
    "Tensor(c!)? near_v_grad, Tensor(d!)? open_k_grad, Tensor(e!)? open_v_grad, int n, float softmax_scale) -> ()";

// (B, heads, at most `most` tokens, D) like q; a missing tensor is none.
template <class T>
dmc::cpu::TokensOf<T> tokens_of(const Argument& argument, const Tensor& q, int64_t heads, int64_t most) {
  if (!argument.tensor) return {};
  const auto& [name, x] = argument;
  check_shape(*x, name, {q.size(0), heads, kAny, q.size(3)});
  TORCH_CHECK_VALUE(x->size(2) <= most, name, " has ", x->size(2), " tokens, more than ", most);
  check_dtype(*x, name, q.scalar_type());
  check_last_dense(*x, name);
  check_device(*x, name, q);
  dmc::cpu::TokensOf<T> tokens{data<T>(*x), {}, x->size(2)};
  copy_strides(tokens.stride, *x);
  return tokens;
}

// All of them, for all tokens.
template <class T>
dmc::cpu::TokensOf<T> all_tokens_of(const Argument& argument, const Tensor& q, int64_t heads, int64_t count) {
  const auto tokens = tokens_of<T>(argument, q, heads, count);
  TORCH_CHECK_VALUE(!tokens.data || tokens.count == count, argument.name, " has ", tokens.count, " tokens, expected ", count);
  return tokens;
}

void check_float(const Tensor& x, const char* name, const Tensor& q, int64_t tokens) {
  check_shape(x, name, {q.size(0), q.size(1), tokens});
  check_dtype(x, name, ScalarType::Float);
  check_dense(x, name);
  check_device(x, name, q);
}

// Queries, keys and outputs of both operators.
template <class T>
dmc::cpu::NearParams<T> near_params(const Tensor& q, const OptionalTensor& near_k, const OptionalTensor& near_v,
                                    const OptionalTensor& open_k, const OptionalTensor& open_v, const Tensor& out,
                                    const Tensor& lse, int64_t n, double softmax_scale) {
  check_shape(q, "q", {kAny, kAny, kAny, kAny});
  const OptionalTensor& k = near_k ? near_k : open_k;
  TORCH_CHECK_VALUE(k && bool(near_k) == (n > 0) && bool(near_k) == bool(near_v) && bool(open_k) == bool(open_v),
                    "n=", n, ": near keys and values where n is positive, and one kind of keys at least");
  check_shape(*k, "keys", {q.size(0), kAny, kAny, q.size(3)});
  const int64_t heads = k->size(1), queries = q.size(2), keys = k->size(2);
  TORCH_CHECK_VALUE(queries <= keys && heads > 0 && q.size(1) % heads == 0, "q has ", q.size(1), " heads and ", queries,
                    " tokens, the keys ", heads, " and ", keys);
  dmc::cpu::NearParams<T> p{};
  p.q = all_tokens_of<T>({"q", q}, q, q.size(1), queries);
  p.out = all_tokens_of<T>({"out", out}, q, q.size(1), queries);
  p.near_k = all_tokens_of<T>({"near_k", near_k}, q, heads, keys);
  p.near_v = all_tokens_of<T>({"near_v", near_v}, q, heads, keys);
  p.open_k = all_tokens_of<T>({"open_k", open_k}, q, heads, keys);
  p.open_v = all_tokens_of<T>({"open_v", open_v}, q, heads, keys);
  check_float(lse, "lse", q, queries);
  p.lse_BNT = data<float>(lse);
  p.batch = q.size(0);
  p.num_kv_heads = heads;
  p.group = q.size(1) / heads;
  p.num_queries = queries;
  p.num_keys = keys;
  p.n = n;
  p.dim = q.size(3);
  p.scale = float(softmax_scale);
  return p;
}

void check_near(const Tensor& q) {
  check_kernel_dtype(q.scalar_type());
  TORCH_CHECK_VALUE(q.size(-1) % dmc::cpu::kDimStep == 0, "q has ", q.size(-1), " channels; the kernels take multiples of ",
                    dmc::cpu::kDimStep);
}

void near_join(const Tensor& q, const OptionalTensor& near_k, const OptionalTensor& near_v, const OptionalTensor& open_k,
               const OptionalTensor& open_v, const OptionalTensor& far_out, const OptionalTensor& far_lse,
               const Tensor& out, const Tensor& lse, int64_t n, double softmax_scale) {
  check_near(q);
  launch_for(q, [&](auto type) {
    using T = decltype(type);
    auto p = near_params<T>(q, near_k, near_v, open_k, open_v, out, lse, n, softmax_scale);
    p.far = tokens_of<T>({"far_out", far_out}, q, q.size(1), p.num_queries);
    p.num_far_queries = p.far.count;
    TORCH_CHECK_VALUE(bool(far_out) == bool(far_lse), "far_out and far_lse: both or none");
    if (far_lse) check_float(*far_lse, "far_lse", q, p.num_far_queries);
    p.far_lse_BNF = data<float>(far_lse);
    kernels_of<T>().near_join(p);
  });
}

void near_gradients(const Tensor& grad, const Tensor& q, const Tensor& out, const Tensor& lse, const OptionalTensor& near_k,
                    const OptionalTensor& near_v, const OptionalTensor& open_k, const OptionalTensor& open_v,
                    const OptionalTensor& far_q, const OptionalTensor& far_k, const OptionalTensor& far_v,
                    const Tensor& q_grad, const OptionalTensor& near_k_grad, const OptionalTensor& near_v_grad,
                    const OptionalTensor& open_k_grad, const OptionalTensor& open_v_grad, int64_t n,
                    double softmax_scale) {
  check_near(q);
  launch_for(q, [&](auto type) {
    using T = decltype(type);
    auto p = near_params<T>(q, near_k, near_v, open_k, open_v, out, lse, n, softmax_scale);
    const int64_t heads = p.num_kv_heads, queries = p.num_queries, keys = p.num_keys;
    p.grad = all_tokens_of<T>({"grad", grad}, q, q.size(1), queries);
    p.far = tokens_of<T>({"far_q", far_q}, q, q.size(1), queries);
    p.far_k = tokens_of<T>({"far_k", far_k}, q, heads, keys);
    p.far_v = tokens_of<T>({"far_v", far_v}, q, heads, p.far_k.count);
    TORCH_CHECK_VALUE(p.far_v.count == p.far_k.count && bool(far_q) == bool(far_k),
                      "far_q, far_k and far_v: all or none, as many keys as values");
    p.num_far_queries = p.far.count;
    p.num_far_keys = p.far_k.count;
    p.dq = all_tokens_of<T>({"q_grad", q_grad}, q, q.size(1), queries);
    p.d_near_k = all_tokens_of<T>({"near_k_grad", near_k_grad}, q, heads, keys);
    p.d_near_v = all_tokens_of<T>({"near_v_grad", near_v_grad}, q, heads, keys);
    p.d_open_k = all_tokens_of<T>({"open_k_grad", open_k_grad}, q, heads, keys);
    p.d_open_v = all_tokens_of<T>({"open_v_grad", open_v_grad}, q, heads, keys);
    TORCH_CHECK_VALUE(bool(near_k_grad) == bool(near_k) && bool(near_v_grad) == bool(near_k) &&
                          bool(open_k_grad) == bool(open_k) && bool(open_v_grad) == bool(open_k),
                      "a gradient for each of the keys and values that are given");
    kernels_of<T>().near_gradients(p);
  });
}

}  // namespace
