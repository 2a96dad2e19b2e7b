// The operators of prefill. For cpu/binding.cpp, which defines `launch_for` and `kernels_of` before.
#pragma once

#include "cpu/kernels.h"
#include "prefill_checks.h"

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

void prefill_write(const Tensor& k, const Tensor& v, const OptionalTensor& is_merge, const OptionalTensor& omega,
                   const OptionalTensor& cos, const OptionalTensor& sin, const Tensor& k_pages, const Tensor& v_pages,
                   const Tensor& table, const Tensor& entries, const OptionalTensor& segments, const Tensor& chunks,
                   const OptionalTensor& own_k, const OptionalTensor& own_v, const Tensor& entry,
                   int64_t merge_window, int64_t delay) {
  check_write(k, v, is_merge, omega, cos, sin, k_pages, v_pages, table, entries, segments, chunks, own_k, own_v, entry,
              merge_window);
  launch_for(k, [&](auto type) {
    using T = decltype(type);
    auto p = prefill_params<T>(k_pages, v_pages, table, entries, chunks, own_k, own_v, entry, cos, sin);
    p.k_TGD = data<T>(k);
    p.v_TGD = data<T>(v);
    copy_strides(p.k_stride, k);
    copy_strides(p.v_stride, v);
    p.is_merge_TG = data<bool>(is_merge);
    p.omega_TG = data<float>(omega);
    if (segments) copy_segments(p, *segments);
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
  check_attention(q, own_k, own_v, entry, cos, sin, k_pages, v_pages, table, chunks, near_k, near_v, far, out, delay);
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
    p.group = int(checked_group(q, table.size(1)));
    p.scale = float(softmax_scale);
    kernels_of<T>().prefill_attention(p);
  });
}

}  // namespace
