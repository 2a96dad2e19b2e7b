// The operators of prefill. For cpu/binding.cpp, which defines `launch_for` and `kernels_of` before.
#pragma once

#include "checks.h"
#include "cpu/kernels.h"

namespace {

constexpr const char* kPrefillWriteSchema =
    "prefill_write(Tensor k, Tensor v, Tensor? is_merge, Tensor? omega, Tensor? cos, Tensor? sin, "
    "Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor block_table, Tensor(c!) num_entries, Tensor(d!)? segments, "
    "Tensor chunks, Tensor(e!)? own_k, Tensor(f!)? own_v, Tensor(g!) entry, int merge_window, int delay) -> ()";
constexpr const char* kPrefillAttentionSchema =
    "prefill_attention(Tensor q, Tensor? own_k, Tensor? own_v, Tensor entry, Tensor? cos, Tensor? sin, "
    "Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor chunks, Tensor? near_k, Tensor? near_v, Tensor? far, "
    "Tensor(a!) out, int delay, bool compress, float softmax_scale) -> ()";

// Everything but queries and outputs, of both parts of prefill.
template <class T>
dmc::cpu::PrefillParams<T> prefill_params(const Tensor& k_pages, const Tensor& v_pages, const Tensor& table,
                                          const OptionalTensor& entries, const Tensor& chunks,
                                          const OptionalTensor& own_k, const OptionalTensor& own_v,
                                          const Tensor& entry, const OptionalTensor& cos, const OptionalTensor& sin) {
  dmc::cpu::PrefillParams<T> p{};
  p.kv = paged(k_pages, v_pages, {}, {}, table, entries);
  p.own_k_TGD = data<T>(own_k);
  p.own_v_TGD = data<T>(own_v);
  p.entry_TG = data<int32_t>(entry);
  p.cos_TF = data<T>(cos);
  p.sin_TF = data<T>(sin);
  copy_angles(p, cos, sin);
  p.chunks_B3 = data<int32_t>(chunks);
  p.num_chunks = int(chunks.size(0));
  p.num_kv_heads = int(table.size(1));
  return p;
}

// What both parts check; `states` is the number of tokens that have entries.
void check_chunks(const Tensor& table, const Tensor& chunks, const OptionalTensor& own_k, const OptionalTensor& own_v,
                  const Tensor& entry, ScalarType dtype, int64_t states, int64_t dim) {
  check_ints(chunks, "chunks", {kAny, 3});
  TORCH_CHECK_VALUE(own_k.has_value() == own_v.has_value(), "own_k and own_v go together");
  if (states) check_ints(entry, "entry", {states, table.size(1)});
  for (const OptionalTensor* own : {&own_k, &own_v}) {
    if (!*own) continue;
    check_shape(**own, "own_k, own_v", {states, table.size(1), dim});
    check_dtype(**own, "own_k, own_v", dtype);
    check_dense(**own, "own_k, own_v");
  }
}

void prefill_write(const Tensor& k, const Tensor& v, const OptionalTensor& is_merge, const OptionalTensor& omega,
                   const OptionalTensor& cos, const OptionalTensor& sin, const Tensor& k_pages, const Tensor& v_pages,
                   const Tensor& table, const Tensor& entries, const OptionalTensor& segments, const Tensor& chunks,
                   const OptionalTensor& own_k, const OptionalTensor& own_v, const Tensor& entry,
                   int64_t merge_window, int64_t delay) {
  check_shape(k, "k", {kAny, kAny, kAny});
  const int64_t tokens = k.size(0), heads = k.size(1), dim = k.size(2);
  const ScalarType dtype = k.scalar_type();
  check_cache(k_pages, v_pages, {}, {}, table, entries, dtype, heads, dim);
  check_shape(v, "v", {tokens, heads, dim});
  check_dtype(v, "v", dtype);
  check_last_dense(k, "k");
  check_last_dense(v, "v");
  check_chunks(table, chunks, own_k, own_v, entry, dtype, tokens, dim);
  check_angles(cos, sin, dtype, dim);
  TORCH_CHECK_VALUE(!cos || cos->size(0) == tokens, "cos and sin must have a row for each of the ", tokens, " tokens");
  const bool compress = is_merge.has_value();
  TORCH_CHECK_VALUE(omega.has_value() == compress && own_k.has_value() == compress && segments.has_value() == compress,
                    "is_merge, omega, segments and the own states go together");
  if (compress) {
    check_shape(*is_merge, "is_merge", {tokens, heads});
    check_dtype(*is_merge, "is_merge", ScalarType::Bool);
    check_dense(*is_merge, "is_merge");
    check_shape(*omega, "omega", {tokens, heads});
    check_dtype(*omega, "omega", ScalarType::Float);
    check_dense(*omega, "omega");
    TORCH_CHECK_VALUE(merge_window >= 0, "merge_window=", merge_window, " is negative");
    check_segments(*segments, table.size(0), heads, merge_window, dim);
  }
  check_devices({{"k", k}, {"v", v}, {"is_merge", is_merge}, {"omega", omega}, {"cos", cos}, {"sin", sin},
                 {"k_pages", k_pages}, {"block_table", table}, {"num_entries", entries}, {"segments", segments},
                 {"chunks", chunks}, {"own_k", own_k}, {"entry", entry}});
  launch_for(k, [&](auto type) {
    using T = decltype(type);
    auto p = prefill_params<T>(k_pages, v_pages, table, entries, chunks, own_k, own_v, entry, cos, sin);
    p.k_TGD = data<T>(k);
    p.v_TGD = data<T>(v);
    copy_strides(p.k_stride, k);
    copy_strides(p.v_stride, v);
    p.is_merge_TG = data<bool>(is_merge);
    p.omega_TG = data<float>(omega);
    if (compress) {
      p.segments_RGUA = data<float>(segments);
      p.segments_row_stride = segments->stride(0);
      p.segments_head_stride = segments->stride(1);
    }
    p.merge_window = int(merge_window);
    p.delay = int(delay);
    kernels_of<T>().prefill_write(p);
  });
}

void prefill_attention(const Tensor& q, const OptionalTensor& own_k, const OptionalTensor& own_v, const Tensor& entry,
                       const OptionalTensor& cos, const OptionalTensor& sin, const Tensor& k_pages,
                       const Tensor& v_pages, const Tensor& table, const Tensor& chunks,
                       const OptionalTensor& near_k, const OptionalTensor& near_v, const OptionalTensor& far,
                       const Tensor& out, int64_t delay, bool compress, double softmax_scale) {
  check_shape(q, "q", {kAny, kAny, kAny});
  check_shape(table, "block_table", {kAny, kAny, kAny});
  const int64_t tokens = q.size(0), dim = q.size(2), heads = table.size(1);
  const ScalarType dtype = q.scalar_type();
  check_pages(k_pages, v_pages, {}, {}, table, dtype, heads, dim);
  const int64_t group = checked_group(q, heads);
  check_last_dense(q, "q");
  check_shape(out, "out", {tokens, q.size(1), dim});
  check_dtype(out, "out", dtype);
  check_last_dense(out, "out");
  check_chunks(table, chunks, own_k, own_v, entry, dtype, delay ? entry.size(0) : tokens, dim);
  check_angles(cos, sin, dtype, dim);
  TORCH_CHECK_VALUE(!cos || cos->size(0) == tokens, "cos and sin must have a row for each of the ", tokens, " tokens");
  TORCH_CHECK_VALUE(near_k.has_value() == (delay > 0) && near_v.has_value() == (delay > 0) &&
                        far.has_value() == (delay > 0),
                    "near_k, near_v and far are given with a delay and only with it");
  if (delay) {
    check_ints(*far, "far", {chunks.size(0), 2});
    for (const OptionalTensor* near : {&near_k, &near_v}) {
      check_shape(**near, "near_k, near_v", {tokens + delay * chunks.size(0), heads, dim});
      check_dtype(**near, "near_k, near_v", dtype);
      check_dense(**near, "near_k, near_v");
    }
  }
  check_devices({{"q", q}, {"near_k", near_k}, {"near_v", near_v}, {"far", far}, {"own_k", own_k}, {"entry", entry}, {"cos", cos}, {"sin", sin}, {"k_pages", k_pages},
                 {"block_table", table}, {"chunks", chunks}, {"out", out}});
  launch_for(q, [&](auto type) {
    using T = decltype(type);
    auto p = prefill_params<T>(k_pages, v_pages, table, {}, chunks, own_k, own_v, entry, cos, sin);
    p.q_TND = data<T>(q);
    p.out_TND = data<T>(out);
    copy_strides(p.q_stride, q);
    copy_strides(p.out_stride, out);
    p.near_k_YGD = data<T>(near_k);
    p.near_v_YGD = data<T>(near_v);
    p.far_B2 = data<int32_t>(far);
    p.delay = int(delay);
    p.compress = compress;
    p.group = int(group);
    p.scale = float(softmax_scale);
    kernels_of<T>().prefill_attention(p);
  });
}

}  // namespace
