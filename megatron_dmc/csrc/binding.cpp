// The operators `torch.ops.megatron_dmc.*`: schemas, checks and the filling of parameters. Their
// versions without data are in megatron_dmc/ops/cuda/decode.py, which allocates all outputs.
#include <ATen/core/Tensor.h>
#include <Python.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <initializer_list>
#include <optional>

#include "kernels.h"

namespace {

using at::ScalarType;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kAny = -1;

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

void check_device(const Tensor& x, const char* name, const Tensor& like) {
  TORCH_CHECK_VALUE(x.is_cuda() && x.device() == like.device(), name, " is on ", x.device(),
                    "; all tensors must be on one GPU");
}

void check_indices(const Tensor& x, const char* name, int64_t size) {
  check_shape(x, name, {size});
  check_dtype(x, name, ScalarType::Long);
  check_dense(x, name);
}

void check_head_dim(int64_t dim) {
  TORCH_CHECK_VALUE(dim == 64 || dim == 96 || dim == 128 || dim == 256, "head_dim=", dim,
                    "; the kernels are built for 64, 96, 128 and 256");
}

dmc::Stored stored_as(const Tensor& pages) {
  switch (pages.scalar_type()) {
    case ScalarType::Float8_e4m3fn: return dmc::kE4m3;
    case ScalarType::Char: return dmc::kInt8;
    default: return dmc::kNumbers;
  }
}

// Checks everything about a layer's cache that the kernels rely on.
void check_cache(const Tensor& k_pages, const Tensor& v_pages, const OptionalTensor& k_scales,
                 const OptionalTensor& v_scales, const Tensor& table, const Tensor& entries,
                 ScalarType dtype, int64_t heads, int64_t dim) {
  TORCH_CHECK_VALUE(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "dtype ", dtype,
                    "; the kernels take bfloat16 and float16");
  check_head_dim(dim);
  check_shape(k_pages, "k_pages", {kAny, kAny, dim});
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
    check_device(**scales, "k_scales, v_scales", k_pages);
  }
  check_dense(k_pages, "k_pages");
  check_dense(v_pages, "v_pages");
  const int64_t page = k_pages.size(1);
  TORCH_CHECK_VALUE(page == 8 || page == 16 || page == 32 || page == 64, "page_size=", page,
                    "; the kernels take 8, 16, 32 and 64");
  check_shape(table, "block_table", {kAny, heads, kAny});
  check_dtype(table, "block_table", ScalarType::Int);
  check_last_dense(table, "block_table");
  check_shape(entries, "num_entries", {table.size(0), heads});
  check_dtype(entries, "num_entries", ScalarType::Long);
}

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}
template <class T>
T* data(const OptionalTensor& x) {
  return x ? static_cast<T*>(x->data_ptr()) : nullptr;
}

void copy_strides(int64_t (&to)[2], const Tensor& x) {
  to[0] = x.stride(0);
  to[1] = x.stride(1);
}

dmc::PagedKV paged(const Tensor& k_pages, const Tensor& v_pages, const OptionalTensor& k_scales,
                   const OptionalTensor& v_scales, const Tensor& table, const Tensor& entries) {
  return {k_pages.data_ptr(),
          v_pages.data_ptr(),
          data<float>(k_scales),
          data<float>(v_scales),
          data<int32_t>(table),
          data<int64_t>(entries),
          table.stride(0),
          table.stride(1),
          entries.stride(0),
          entries.stride(1),
          __builtin_ctzll(k_pages.size(1)),
          int(k_pages.size(2)),
          int(table.size(2)),
          stored_as(k_pages)};
}

void decode_append(const OptionalTensor& q, const Tensor& k, const Tensor& v,
                   const OptionalTensor& is_merge, const OptionalTensor& omega,
                   const OptionalTensor& cos, const OptionalTensor& sin, const Tensor& positions,
                   const Tensor& k_pages, const Tensor& v_pages, const OptionalTensor& k_scales,
                   const OptionalTensor& v_scales, const Tensor& table, const Tensor& entries,
                   const OptionalTensor& segments, const Tensor& rows,
                   const OptionalTensor& free_ids, const OptionalTensor& free_state,
                   const OptionalTensor& q_out, bool compress, bool may_merge, double alpha_offset,
                   int64_t merge_window) {
  check_shape(k, "k", {kAny, kAny, kAny});
  const int64_t batch = k.size(0), heads = k.size(1), dim = k.size(2);
  const ScalarType dtype = k.scalar_type();
  check_cache(k_pages, v_pages, k_scales, v_scales, table, entries, dtype, heads, dim);
  check_shape(v, "v", {batch, heads, dim});
  check_dtype(v, "v", dtype);
  check_last_dense(k, "k");
  check_last_dense(v, "v");
  check_indices(positions, "positions", batch);
  check_indices(rows, "rows", batch);
  TORCH_CHECK_VALUE(q.has_value() == q_out.has_value(), "q and q_out go together");
  if (q) {
    check_shape(*q, "q", {batch, kAny, dim});
    TORCH_CHECK_VALUE(q->size(1) % heads == 0, "q has ", q->size(1), " heads, not a multiple of the ",
                      heads, " key/value heads");
    check_dtype(*q, "q", dtype);
    check_last_dense(*q, "q");
    check_shape(*q_out, "q_out", {batch, q->size(1), dim});
    check_dtype(*q_out, "q_out", dtype);
    check_last_dense(*q_out, "q_out");
  }
  TORCH_CHECK_VALUE(is_merge.has_value() == omega.has_value(), "is_merge and omega go together");
  if (is_merge) {
    check_shape(*is_merge, "is_merge", {batch, heads});
    check_dtype(*is_merge, "is_merge", ScalarType::Bool);
    check_dense(*is_merge, "is_merge");
    check_shape(*omega, "omega", {batch, heads});
    check_dtype(*omega, "omega", ScalarType::Float);
    check_dense(*omega, "omega");
  }
  TORCH_CHECK_VALUE(!compress || q || is_merge, "gates need q, or is_merge and omega");
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
  TORCH_CHECK_VALUE(merge_window >= 0, "merge_window=", merge_window, " is negative");
  TORCH_CHECK_VALUE(!compress || segments, "segments are needed when compressing");
  if (compress) {
    check_shape(*segments, "segments",
                {table.size(0), heads, merge_window ? merge_window : 1, 2 * dim + 1});
    check_dtype(*segments, "segments", ScalarType::Float);
    TORCH_CHECK_VALUE(segments->stride(3) == 1 && segments->stride(2) == 2 * dim + 1,
                      "segments: the last two dimensions must be dense");
  }
  TORCH_CHECK_VALUE(free_ids.has_value() == free_state.has_value(),
                    "free_page_ids and free_state go together");
  if (free_ids) {
    check_shape(*free_ids, "free_page_ids", {kAny});
    check_dtype(*free_ids, "free_page_ids", ScalarType::Int);
    check_dense(*free_ids, "free_page_ids");
    check_shape(*free_state, "free_state", {2});
    check_dtype(*free_state, "free_state", ScalarType::Int);
    check_dense(*free_state, "free_state");
  }
  const Tensor* all[] = {&k, &v, &positions, &k_pages, &v_pages, &table, &entries, &rows};
  const char* names[] = {"k", "v", "positions", "k_pages", "v_pages", "block_table", "num_entries",
                         "rows"};
  for (int i = 0; i < 8; ++i) check_device(*all[i], names[i], k);
  const OptionalTensor* optional[] = {&q,   &is_merge, &omega,    &cos,       &sin,
                                      &segments, &free_ids, &free_state, &q_out};
  const char* optional_names[] = {"q",        "is_merge",      "omega",      "cos",  "sin",
                                  "segments", "free_page_ids", "free_state", "q_out"};
  for (int i = 0; i < 9; ++i) {
    if (*optional[i]) check_device(**optional[i], optional_names[i], k);
  }

  const auto launch = [&](auto type) {
    using T = decltype(type);
    dmc::AppendParams<T> p{};
    p.kv = paged(k_pages, v_pages, k_scales, v_scales, table, entries);
    p.q_BND = data<T>(q);
    p.k_BGD = data<T>(k);
    p.v_BGD = data<T>(v);
    p.q_out_BND = data<T>(q_out);
    p.cos_XF = data<T>(cos);
    p.sin_XF = data<T>(sin);
    p.is_merge_BG = data<uint8_t>(is_merge);
    p.omega_BG = data<float>(omega);
    p.positions_B = data<int64_t>(positions);
    p.rows_B = data<int64_t>(rows);
    p.free_ids = data<int32_t>(free_ids);
    p.free_state = data<int32_t>(free_state);
    copy_strides(p.k_stride, k);
    copy_strides(p.v_stride, v);
    p.group = 1;
    if (q) {
      copy_strides(p.q_stride, *q);
      copy_strides(p.q_out_stride, *q_out);
      p.group = int(q->size(1) / heads);
    }
    if (cos) {
      p.cos_stride = cos->stride(0);
      p.sin_stride = sin->stride(0);
      p.half = int(cos->size(1) / 2);
    }
    if (compress) {
      p.segments_RGUA = data<float>(segments);
      p.segments_row_stride = segments->stride(0);
      p.segments_head_stride = segments->stride(1);
    }
    p.num_requests = int(batch);
    p.num_kv_heads = int(heads);
    p.merge_window = int(merge_window);
    p.num_free = free_ids ? int(free_ids->size(0)) : 0;
    p.alpha_offset = float(alpha_offset);
    p.eps = dtype == ScalarType::BFloat16 ? 0.0078125f : 0.0009765625f;
    p.compress = compress;
    p.may_merge = may_merge;
    C10_CUDA_CHECK(dmc::launch_append(p, c10::cuda::getCurrentCUDAStream()));
  };
  const c10::cuda::CUDAGuard guard(k.device());
  if (dtype == ScalarType::BFloat16) {
    launch(dmc::bf16{});
  } else {
    launch(dmc::fp16{});
  }
}

void plan(const Tensor& entries, const Tensor& rows, const Tensor& out, int64_t ahead) {
  check_shape(entries, "num_entries", {kAny, kAny, kAny});
  check_dtype(entries, "num_entries", ScalarType::Long);
  const int64_t batch = rows.size(0);
  check_indices(rows, "rows", batch);
  check_shape(out, "plan", {entries.size(0), batch * entries.size(2) + 1});
  check_dtype(out, "plan", ScalarType::Int);
  check_dense(out, "plan");
  check_device(rows, "rows", entries);
  check_device(entries, "num_entries", entries);
  check_device(out, "plan", entries);
  const dmc::PlanParams p{data<int64_t>(entries), data<int64_t>(rows),    data<int32_t>(out),
                          entries.stride(0),      entries.stride(1),      entries.stride(2),
                          int(entries.size(0)),   int(batch),             int(entries.size(2)),
                          int(ahead)};
  const c10::cuda::CUDAGuard guard(entries.device());
  C10_CUDA_CHECK(dmc::launch_plan(p, c10::cuda::getCurrentCUDAStream()));
}

void paged_decode_attention(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                            const OptionalTensor& k_scales, const OptionalTensor& v_scales,
                            const Tensor& table, const Tensor& entries, const Tensor& rows,
                            const Tensor& plan, const Tensor& out, const Tensor& part,
                            const Tensor& part_lse, double softmax_scale) {
  check_shape(q, "q", {kAny, kAny, kAny});
  check_shape(table, "block_table", {kAny, kAny, kAny});
  const int64_t batch = q.size(0), dim = q.size(2), heads = table.size(1);
  const ScalarType dtype = q.scalar_type();
  check_cache(k_pages, v_pages, k_scales, v_scales, table, entries, dtype, heads, dim);
  TORCH_CHECK_VALUE(heads > 0 && q.size(1) % heads == 0, "q has ", q.size(1),
                    " heads, not a multiple of the ", heads, " key/value heads");
  const int64_t group = q.size(1) / heads;
  TORCH_CHECK_VALUE(group <= (dim == 256 ? 8 : 16), group, " query heads for each key/value head; "
                    "the kernels take 16, with head_dim 256 8");
  check_last_dense(q, "q");
  TORCH_CHECK_VALUE(q.stride(0) % 2 == 0 && q.stride(1) % 2 == 0 &&
                        reinterpret_cast<uintptr_t>(q.data_ptr()) % 4 == 0,
                    "q: heads must be aligned to 4 bytes; call contiguous()");
  check_indices(rows, "rows", batch);
  check_shape(plan, "plan", {batch * heads + 1});
  check_dtype(plan, "plan", ScalarType::Int);
  check_dense(plan, "plan");
  check_shape(out, "out", {batch, q.size(1), dim});
  check_dtype(out, "out", dtype);
  check_last_dense(out, "out");
  check_shape(part, "part", {kAny, 2, group, dim});
  check_shape(part_lse, "part_lse", {part.size(0), 2, group});
  TORCH_CHECK_VALUE(part.size(0) > 0, "part has no workers");
  for (const Tensor* x : {&part, &part_lse}) {
    check_dtype(*x, "part, part_lse", ScalarType::Float);
    check_dense(*x, "part, part_lse");
  }
  const Tensor* all[] = {&q, &k_pages, &v_pages, &table, &entries, &rows, &plan, &out, &part,
                         &part_lse};
  const char* names[] = {"q",    "k_pages", "v_pages", "block_table", "num_entries",
                         "rows", "plan",    "out",     "part",        "part_lse"};
  for (int i = 0; i < 10; ++i) check_device(*all[i], names[i], q);

  const auto launch = [&](auto type) {
    using T = decltype(type);
    dmc::AttentionParams<T> p{};
    p.kv = paged(k_pages, v_pages, k_scales, v_scales, table, entries);
    p.q_BND = data<T>(q);
    p.out_BND = data<T>(out);
    p.rows_B = data<int64_t>(rows);
    p.plan_Y = data<int32_t>(plan);
    p.part_C2RD = data<float>(part);
    p.part_lse_C2R = data<float>(part_lse);
    copy_strides(p.q_stride, q);
    copy_strides(p.out_stride, out);
    p.num_requests = int(batch);
    p.num_kv_heads = int(heads);
    p.group = int(group);
    p.num_workers = int(part.size(0));
    p.scale = float(softmax_scale * 1.4426950408889634);
    C10_CUDA_CHECK(dmc::launch_attention(p, c10::cuda::getCurrentCUDAStream()));
  };
  const c10::cuda::CUDAGuard guard(q.device());
  if (dtype == ScalarType::BFloat16) {
    launch(dmc::bf16{});
  } else {
    launch(dmc::fp16{});
  }
}

void release_pages(const Tensor& ids, const Tensor& free_ids, const Tensor& free_state,
                   const Tensor& extra_owners) {
  check_shape(ids, "page_ids", {kAny, kAny});
  check_last_dense(ids, "page_ids");
  check_shape(free_ids, "free_page_ids", {kAny});
  check_shape(free_state, "free_state", {2});
  check_shape(extra_owners, "num_extra_owners", {free_ids.size(0)});
  const Tensor* all[] = {&ids, &free_ids, &free_state, &extra_owners};
  const char* names[] = {"page_ids", "free_page_ids", "free_state", "num_extra_owners"};
  for (int i = 0; i < 4; ++i) {
    check_dtype(*all[i], names[i], ScalarType::Int);
    check_device(*all[i], names[i], ids);
    if (i) check_dense(*all[i], names[i]);
  }
  const dmc::ReleaseParams p{data<int32_t>(ids),        ids.stride(0),
                             ids.size(1),               ids.numel(),
                             data<int32_t>(free_ids),   data<int32_t>(free_state),
                             data<int32_t>(extra_owners)};
  const c10::cuda::CUDAGuard guard(ids.device());
  C10_CUDA_CHECK(dmc::launch_release(p, c10::cuda::getCurrentCUDAStream()));
}

int64_t count_workers(int64_t head_dim, const Tensor& pages) {
  check_head_dim(head_dim);
  int count = 0;
  C10_CUDA_CHECK(dmc::count_workers(int(head_dim), stored_as(pages), &count));
  return count;
}

}  // namespace

TORCH_LIBRARY(megatron_dmc, m) {
  m.def(
      "decode_append(Tensor? q, Tensor k, Tensor v, Tensor? is_merge, Tensor? omega, Tensor? cos, "
      "Tensor? sin, Tensor positions, Tensor(a!) k_pages, Tensor(b!) v_pages, "
      "Tensor(h!)? k_scales, Tensor(i!)? v_scales, Tensor(c!) block_table, Tensor(d!) num_entries, Tensor(e!)? segments, Tensor rows, "
      "Tensor? free_page_ids, Tensor(f!)? free_state, Tensor(g!)? q_out, bool compress, "
      "bool may_merge, float alpha_offset, int merge_window) -> ()");
  m.def("plan(Tensor num_entries, Tensor rows, Tensor(a!) plan, int ahead) -> ()");
  m.def(
      "paged_decode_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor? k_scales, "
      "Tensor? v_scales, Tensor block_table, Tensor num_entries, Tensor rows, Tensor plan, "
      "Tensor(a!) out, Tensor(b!) part, Tensor(c!) part_lse, float softmax_scale) -> ()");
  m.def(
      "release_pages(Tensor(a!) page_ids, Tensor(b!) free_page_ids, Tensor(c!) free_state, "
      "Tensor(d!) num_extra_owners) -> ()");
  m.def("count_workers(int head_dim, Tensor pages) -> int");
}

// For every device, so that a wrong one is refused in words.
TORCH_LIBRARY_IMPL(megatron_dmc, CompositeExplicitAutograd, m) {
  m.impl("decode_append", &decode_append);
  m.impl("plan", &plan);
  m.impl("count_workers", &count_workers);
  m.impl("paged_decode_attention", &paged_decode_attention);
  m.impl("release_pages", &release_pages);
}

// `import megatron_dmc._C` registers the operators; the module itself is empty.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
