// Checks of operator arguments, and their conversion to kernel parameters. Used by binding.cpp and
// cpu/binding.cpp only, which define their kernels' limits: `check_supported` and `check_device`.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <initializer_list>
#include <optional>

#include "dmc/paged_kv.h"

namespace {

using at::ScalarType;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kAny = -1;

void check_supported(ScalarType dtype, int64_t head_dim, int64_t page_size);
void check_device(const Tensor& x, const char* name, const Tensor& like);

void check_shape(const Tensor& x, const char* name, std::initializer_list<int64_t> sizes) {
  bool fits = x.dim() == int64_t(sizes.size());
  int i = 0;
  for (int64_t size : sizes) {
    fits = fits && (size == kAny || x.size(i) == size);
    ++i;
  }
  TORCH_CHECK_VALUE(fits, name, " has shape ", x.sizes(), ", expected ",
                    c10::IntArrayRef(sizes.begin(), sizes.size()), " (-1: any)");
}

void check_dtype(const Tensor& x, const char* name, ScalarType dtype) {
  TORCH_CHECK_VALUE(x.scalar_type() == dtype, name, " is ", x.scalar_type(), ", expected ", dtype);
}

void check_last_dense(const Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(x.size(-1) <= 1 || x.stride(-1) == 1, name,
                    ": the last dimension must be dense; call contiguous()");
}

void check_dense(const Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(x.is_contiguous(), name, " must be contiguous");
}

// For tensors that kernels copy in units of 16 bytes: a view may start anywhere.
void check_aligned(const Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0, name,
                    " must start at a multiple of 16 bytes; call clone()");
}

// A tensor by its name, or an optional one, which may be missing.
struct Argument {
  const char* name;
  const Tensor* tensor;
  Argument(const char* name, const Tensor& x) : name(name), tensor(&x) {}
  Argument(const char* name, const OptionalTensor& x) : name(name), tensor(x ? &*x : nullptr) {}
};

// All given tensors must be on the device of the first, which is never missing.
void check_devices(std::initializer_list<Argument> all) {
  for (const Argument& x : all) {
    if (x.tensor) check_device(*x.tensor, x.name, *all.begin()->tensor);
  }
}

void check_indices(const Tensor& x, const char* name, int64_t size) {
  check_shape(x, name, {size});
  check_dtype(x, name, ScalarType::Long);
  check_dense(x, name);
}

dmc::Stored stored_as(const Tensor& pages) {
  switch (pages.scalar_type()) {
    case ScalarType::Float8_e4m3fn: return dmc::kE4m3;
    case ScalarType::Char: return dmc::kInt8;
    default: return dmc::kNumbers;
  }
}

// Checks everything about a layer's pages and block table that the kernels rely on.
void check_pages(const Tensor& k_pages, const Tensor& v_pages, const OptionalTensor& k_scales,
                 const OptionalTensor& v_scales, const Tensor& table, ScalarType dtype,
                 int64_t heads, int64_t dim) {
  check_shape(k_pages, "k_pages", {kAny, kAny, dim});
  check_supported(dtype, dim, k_pages.size(1));
  check_shape(v_pages, "v_pages", {k_pages.size(0), k_pages.size(1), dim});
  const bool is_8bit = stored_as(k_pages) != dmc::kNumbers;
  if (!is_8bit) check_dtype(k_pages, "k_pages", dtype);
  check_dtype(v_pages, "v_pages", k_pages.scalar_type());
  for (const OptionalTensor* scales : {&k_scales, &v_scales}) {
    TORCH_CHECK_VALUE(scales->has_value() == is_8bit,
                      "k_scales, v_scales: given with pages of 8 bits and only with them");
    if (!is_8bit) continue;
    check_shape(**scales, "k_scales, v_scales", {k_pages.size(0), k_pages.size(1)});
    check_dtype(**scales, "k_scales, v_scales", ScalarType::Float);
    check_dense(**scales, "k_scales, v_scales");
    check_aligned(**scales, "k_scales, v_scales");
    check_device(**scales, "k_scales, v_scales", k_pages);
  }
  check_dense(k_pages, "k_pages");
  check_dense(v_pages, "v_pages");
  check_aligned(k_pages, "k_pages");
  check_aligned(v_pages, "v_pages");
  check_shape(table, "block_table", {kAny, heads, kAny});
  check_dtype(table, "block_table", ScalarType::Int);
  check_last_dense(table, "block_table");
}

void check_cache(const Tensor& k_pages, const Tensor& v_pages, const OptionalTensor& k_scales,
                 const OptionalTensor& v_scales, const Tensor& table, const Tensor& entries,
                 ScalarType dtype, int64_t heads, int64_t dim) {
  check_pages(k_pages, v_pages, k_scales, v_scales, table, dtype, heads, dim);
  check_shape(entries, "num_entries", {table.size(0), heads});
  check_dtype(entries, "num_entries", ScalarType::Long);
}

void check_angles(const OptionalTensor& cos, const OptionalTensor& sin, ScalarType dtype,
                  int64_t dim) {
  TORCH_CHECK_VALUE(cos.has_value() == sin.has_value(), "cos and sin go together");
  if (cos) {
    check_shape(*cos, "cos", {kAny, kAny});
    check_shape(*sin, "sin", {cos->size(0), cos->size(1)});
    TORCH_CHECK_VALUE(cos->size(1) % 2 == 0 && cos->size(1) <= dim, "cos has ", cos->size(1),
                      " channels; expected an even number up to ", dim);
    check_dtype(*cos, "cos", dtype);
    check_dtype(*sin, "sin", dtype);
    check_last_dense(*cos, "cos");
    check_last_dense(*sin, "sin");
  }
}

// Keys and values of new tokens.
void check_tokens(const Tensor& k, const Tensor& v) {
  check_shape(k, "k", {kAny, kAny, kAny});
  check_shape(v, "v", {k.size(0), k.size(1), k.size(2)});
  check_dtype(v, "v", k.scalar_type());
  check_last_dense(k, "k");
  check_last_dense(v, "v");
}

// Decisions and importances that the caller has made for new tokens.
void check_decisions(const OptionalTensor& is_merge, const OptionalTensor& omega, int64_t tokens,
                     int64_t heads) {
  TORCH_CHECK_VALUE(is_merge.has_value() == omega.has_value(), "is_merge and omega go together");
  if (!is_merge) return;
  check_shape(*is_merge, "is_merge", {tokens, heads});
  check_dtype(*is_merge, "is_merge", ScalarType::Bool);
  check_dense(*is_merge, "is_merge");
  check_shape(*omega, "omega", {tokens, heads});
  check_dtype(*omega, "omega", ScalarType::Float);
  check_dense(*omega, "omega");
}

// Query heads of each key/value head.
int64_t checked_group(const Tensor& q, int64_t heads) {
  TORCH_CHECK_VALUE(heads > 0 && q.size(1) % heads == 0, "q has ", q.size(1),
                    " heads, not a multiple of the ", heads, " key/value heads");
  return q.size(1) / heads;
}

void check_segments(const Tensor& segments, int64_t rows, int64_t heads, int64_t merge_window,
                    int64_t dim) {
  TORCH_CHECK_VALUE(merge_window >= 0, "merge_window=", merge_window, " is negative");
  check_shape(segments, "segments", {rows, heads, merge_window ? merge_window : 1, 2 * dim + 1});
  check_dtype(segments, "segments", ScalarType::Float);
  TORCH_CHECK_VALUE(segments.stride(3) == 1 && segments.stride(2) == 2 * dim + 1,
                    "segments: the last two dimensions must be dense");
}

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}
template <class T>
T* data(const OptionalTensor& x) {
  return x ? static_cast<T*>(x->data_ptr()) : nullptr;
}

void check_ints(const Tensor& x, const char* name, std::initializer_list<int64_t> sizes) {
  check_shape(x, name, sizes);
  check_dtype(x, name, ScalarType::Int);
  check_dense(x, name);
}

// Queries or outputs that kernels access in pairs of channels.
void check_pairs(const Tensor& x, const char* name) {
  check_last_dense(x, name);
  TORCH_CHECK_VALUE(x.stride(0) % 2 == 0 && x.stride(1) % 2 == 0 &&
                        reinterpret_cast<uintptr_t>(x.data_ptr()) % 4 == 0,
                    name, ": heads must be aligned to 4 bytes; call contiguous()");
}

template <int kDims>
void copy_strides(int64_t (&to)[kDims], const Tensor& x) {
  for (int i = 0; i < kDims; ++i) to[i] = x.stride(i);
}

// Set a kernel's parameters: strides of the angle tables, and the number of rotary channels.
template <class Params>
void copy_angles(Params& p, const OptionalTensor& cos, const OptionalTensor& sin) {
  if (!cos) return;
  p.cos_stride = cos->stride(0);
  p.sin_stride = sin->stride(0);
  p.half = int(cos->size(1) / 2);
}

template <class Params>
void copy_segments(Params& p, const Tensor& segments) {
  p.segments_RGUA = data<float>(segments);
  p.segments_row_stride = segments.stride(0);
  p.segments_head_stride = segments.stride(1);
}

dmc::PagedKV paged(const Tensor& k_pages, const Tensor& v_pages, const OptionalTensor& k_scales,
                   const OptionalTensor& v_scales, const Tensor& table,
                   const OptionalTensor& entries) {
  return {k_pages.data_ptr(),
          v_pages.data_ptr(),
          data<float>(k_scales),
          data<float>(v_scales),
          data<int32_t>(table),
          data<int64_t>(entries),
          table.stride(0),
          table.stride(1),
          entries ? entries->stride(0) : 0,
          entries ? entries->stride(1) : 0,
          __builtin_ctzll(k_pages.size(1)),
          int(k_pages.size(2)),
          int(table.size(2)),
          stored_as(k_pages)};
}

}  // namespace
