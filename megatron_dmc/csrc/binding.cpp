// The operators `torch.ops.megatron_dmc.*`: schemas, checks and kernel parameters. Their fake
// implementations are in megatron_dmc/ops/cuda, which allocates all outputs.
#include <ATen/core/Tensor.h>
#include <Python.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "append_operator.h"
#include "checks.h"
#include "kernels.h"
#include "prefill_checks.h"

namespace {

void check_head_dim(int64_t dim) {
  TORCH_CHECK_VALUE(dim == 64 || dim == 96 || dim == 128 || dim == 256, "head_dim=", dim,
                    "; the kernels are built for 64, 96, 128 and 256");
}

void check_supported(ScalarType dtype, int64_t head_dim, int64_t page_size) {
  TORCH_CHECK_VALUE(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "dtype ", dtype,
                    "; the kernels take bfloat16 and float16");
  check_head_dim(head_dim);
  TORCH_CHECK_VALUE(page_size == 8 || page_size == 16 || page_size == 32 || page_size == 64,
                    "page_size=", page_size, "; the kernels take 8, 16, 32 and 64");
}

#ifndef DMC_DEVICE_TYPE  // tests run the kernels on a host
#define DMC_DEVICE_TYPE at::kCUDA
#endif

void check_device(const Tensor& x, const char* name, const Tensor& like) {
  TORCH_CHECK_VALUE(x.device().type() == DMC_DEVICE_TYPE && x.device() == like.device(), name,
                    " is on ", x.device(), "; all tensors must be on one GPU");
}

// On the device of `like`, launch(T{}) for its dtype; check_pages has rejected others.
template <class Launch>
void launch_for(const Tensor& like, Launch launch) {
  const c10::cuda::CUDAGuard guard(like.device());
  if (like.scalar_type() == ScalarType::BFloat16) {
    launch(dmc::bf16{});
  } else {
    launch(dmc::fp16{});
  }
}

template <class T>
void launch(const dmc::AppendParams<T>& p) {
  C10_CUDA_CHECK(dmc::launch_append(p, c10::cuda::getCurrentCUDAStream()));
}

void plan(const Tensor& entries, const Tensor& rows, const Tensor& out, int64_t ahead) {
  check_shape(entries, "num_entries", {kAny, kAny, kAny});
  check_dtype(entries, "num_entries", ScalarType::Long);
  const int64_t batch = rows.size(0);
  check_indices(rows, "rows", batch);
  check_shape(out, "plan", {entries.size(0), batch * entries.size(2) + 1});
  check_dtype(out, "plan", ScalarType::Int);
  check_dense(out, "plan");
  check_devices({{"num_entries", entries}, {"rows", rows}, {"plan", out}});
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
  const int64_t group = checked_group(q, heads);
  TORCH_CHECK_VALUE(group <= (dim == 256 ? 8 : 16), group, " query heads for each key/value head; "
                    "the kernels take 16, with head_dim 256 8");
  check_pairs(q, "q");
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
  check_devices({{"q", q}, {"k_pages", k_pages}, {"v_pages", v_pages}, {"block_table", table},
                 {"num_entries", entries}, {"rows", rows}, {"plan", plan}, {"out", out},
                 {"part", part}, {"part_lse", part_lse}});

  launch_for(q, [&](auto type) {
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
  });
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

void prefill_write(const Tensor& k, const Tensor& v, const OptionalTensor& is_merge,
                   const OptionalTensor& omega, const OptionalTensor& cos, const OptionalTensor& sin,
                   const Tensor& k_pages, const Tensor& v_pages, const Tensor& table,
                   const Tensor& entries, const OptionalTensor& segments, const Tensor& chunks,
                   const Tensor& tiles, const Tensor& tile_starts, const OptionalTensor& appends,
                   const Tensor& base, const OptionalTensor& sums, const OptionalTensor& own_k,
                   const OptionalTensor& own_v, const Tensor& entry, int64_t merge_window,
                   int64_t first_entry) {
  check_write(k, v, is_merge, omega, cos, sin, k_pages, v_pages, table, entries, segments, chunks,
              own_k, own_v, entry, merge_window);
  TORCH_CHECK_VALUE(first_entry >= 0, "first_entry=", first_entry, " is negative");
  const int64_t heads = k.size(1), num_chunks = chunks.size(0), num_tiles = tiles.size(0);
  const bool compress = is_merge.has_value();
  check_ints(tiles, "tiles", {kAny, 2});
  check_ints(tile_starts, "tile_starts", {num_chunks + 1});
  check_ints(base, "base", {compress ? num_tiles : num_chunks, heads});
  TORCH_CHECK_VALUE(compress == appends.has_value() && compress == sums.has_value(),
                    "is_merge, appends and sums go together");
  if (compress) {
    check_ints(*appends, "appends", {num_tiles, heads});
    check_shape(*sums, "sums", {merge_window ? kAny : num_tiles, heads, 2 * k.size(2) + 1});
    check_dtype(*sums, "sums", ScalarType::Float);
    check_dense(*sums, "sums");
  }
  check_devices({{"k", k}, {"tiles", tiles}, {"tile_starts", tile_starts}, {"base", base},
                 {"appends", appends}, {"sums", sums}});

  launch_for(k, [&](auto type) {
    using T = decltype(type);
    dmc::PrefillParams<T> p{};
    p.kv = paged(k_pages, v_pages, {}, {}, table, entries);
    p.k_TGD = data<T>(k);
    p.v_TGD = data<T>(v);
    p.own_k_TGD = data<T>(own_k);
    p.own_v_TGD = data<T>(own_v);
    p.cos_TF = data<T>(cos);
    p.sin_TF = data<T>(sin);
    p.is_merge_TG = data<uint8_t>(is_merge);
    p.omega_TG = data<float>(omega);
    p.chunks_B3 = data<int32_t>(chunks);
    p.tiles_X2 = data<int32_t>(tiles);
    p.starts_Y = data<int32_t>(tile_starts);
    p.appends_XG = data<int32_t>(appends);
    p.base_XG = data<int32_t>(base);
    p.sums_XGA = data<float>(sums);
    p.entry_TG = data<int32_t>(entry);
    copy_strides(p.k_stride, k);
    copy_strides(p.v_stride, v);
    copy_angles(p, cos, sin);
    if (compress) copy_segments(p, *segments);
    p.num_chunks = int(num_chunks);
    p.num_tiles = int(num_tiles);
    p.num_kv_heads = int(heads);
    p.merge_window = int(merge_window);
    p.first_entry = int(first_entry);
    C10_CUDA_CHECK(dmc::launch_prefill_write(p, c10::cuda::getCurrentCUDAStream()));
  });
}

void prefill_attention(const Tensor& q, const OptionalTensor& own_k, const OptionalTensor& own_v,
                       const Tensor& entry, const OptionalTensor& cos, const OptionalTensor& sin,
                       const Tensor& k_pages, const Tensor& v_pages, const Tensor& table,
                       const Tensor& chunks, const Tensor& tiles, const OptionalTensor& near_k,
                       const OptionalTensor& near_v, const OptionalTensor& far, const Tensor& out,
                       int64_t delay, int64_t tile_tokens, double softmax_scale) {
  check_shape(q, "q", {kAny, kAny, kAny});
  check_shape(table, "block_table", {kAny, kAny, kAny});
  const int64_t heads = table.size(1), group = checked_group(q, heads);
  const int rows = dmc::prefill_rows(int(q.size(2)));
  TORCH_CHECK_VALUE(tile_tokens > 0 && tile_tokens * group <= rows, "tile_tokens=", tile_tokens,
                    " with ", group, " query heads for each key/value head; their product must be 1 to ",
                    rows);
  TORCH_CHECK_VALUE(softmax_scale > 0, "softmax_scale=", softmax_scale, "; expected above 0");
  check_pairs(out, "out");
  check_ints(tiles, "tiles", {kAny, 2});
  check_attention(q, own_k, own_v, entry, cos, sin, k_pages, v_pages, table, chunks, near_k, near_v,
                  far, out, delay);
  check_devices({{"q", q}, {"tiles", tiles}});

  launch_for(q, [&](auto type) {
    using T = decltype(type);
    dmc::PrefillAttentionParams<T> p{};
    p.near_k_YGD = data<T>(near_k);
    p.near_v_YGD = data<T>(near_v);
    p.far_B2 = data<int32_t>(far);
    p.delay = int(delay);
    p.kv = paged(k_pages, v_pages, {}, {}, table, {});
    p.q_TND = data<T>(q);
    p.out_TND = data<T>(out);
    p.own_k_TGD = data<T>(own_k);
    p.own_v_TGD = data<T>(own_v);
    p.cos_TF = data<T>(cos);
    p.sin_TF = data<T>(sin);
    p.entry_TG = data<int32_t>(entry);
    p.chunks_B3 = data<int32_t>(chunks);
    p.tiles_X2 = data<int32_t>(tiles);
    copy_strides(p.q_stride, q);
    copy_strides(p.out_stride, out);
    copy_angles(p, cos, sin);
    p.num_tiles = int(tiles.size(0));
    p.tile_tokens = int(tile_tokens);
    p.num_kv_heads = int(heads);
    p.group = int(group);
    p.scale = float(softmax_scale * 1.4426950408889634);
    C10_CUDA_CHECK(dmc::launch_prefill_attention(p, c10::cuda::getCurrentCUDAStream()));
  });
}

int64_t count_workers(int64_t head_dim, const Tensor& pages) {
  check_head_dim(head_dim);
  int count = 0;
  C10_CUDA_CHECK(dmc::count_workers(int(head_dim), stored_as(pages), &count));
  return count;
}

}  // namespace

TORCH_LIBRARY(megatron_dmc, m) {
  m.def(kAppendSchema);
  m.def(
      "prefill_write(Tensor k, Tensor v, Tensor? is_merge, Tensor? omega, Tensor? cos, Tensor? sin, "
      "Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor block_table, Tensor(c!) num_entries, "
      "Tensor(d!)? segments, Tensor chunks, Tensor tiles, Tensor tile_starts, Tensor(e!)? appends, "
      "Tensor(f!) base, Tensor(g!)? sums, Tensor(h!)? own_k, Tensor(i!)? own_v, Tensor(j!) entry, "
      "int merge_window, int first_entry) -> ()");
  m.def(
      "prefill_attention(Tensor q, Tensor? own_k, Tensor? own_v, Tensor entry, Tensor? cos, "
      "Tensor? sin, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor chunks, "
      "Tensor tiles, Tensor? near_k, Tensor? near_v, Tensor? far, Tensor(a!) out, int delay, "
      "int tile_tokens, float softmax_scale) -> ()");
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

// Registered for every device, so that an unsupported one gets a clear error.
TORCH_LIBRARY_IMPL(megatron_dmc, CompositeExplicitAutograd, m) {
  m.impl("decode_append", &decode_append);
  m.impl("prefill_write", &prefill_write);
  m.impl("prefill_attention", &prefill_attention);
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
