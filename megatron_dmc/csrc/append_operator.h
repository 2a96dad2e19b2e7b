// The operator `decode_append` of a GPU and of the CPU. For binding.cpp and cpu/binding.cpp, which define
// `launch_for(like, f)`, f(T{}) for the dtype of `like`, and `launch(params)`.
#pragma once

#include "checks.h"
#include "dmc/append.h"

namespace {

template <class Launch>
void launch_for(const Tensor& like, Launch launch);
template <class T>
void launch(const dmc::AppendParams<T>& p);

constexpr const char* kAppendSchema =
    "decode_append(Tensor? q, Tensor k, Tensor v, Tensor? is_merge, Tensor? omega, Tensor? cos, "
    "Tensor? sin, Tensor positions, Tensor(a!) k_pages, Tensor(b!) v_pages, "
    "Tensor(h!)? k_scales, Tensor(i!)? v_scales, Tensor(c!) block_table, Tensor(d!) num_entries, "
    "Tensor(e!)? segments, Tensor rows, Tensor? free_page_ids, Tensor(f!)? free_state, "
    "Tensor(j!)? late_merge, Tensor(k!)? late_omega, Tensor(g!)? q_out, bool compress, "
    "bool may_merge, float alpha_offset, int merge_window) -> ()";

float epsilon(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16: return 0x1p-7f;
    case ScalarType::Half: return 0x1p-10f;
    default: return 0x1p-23f;
  }
}

void decode_append(const OptionalTensor& q, const Tensor& k, const Tensor& v,
                   const OptionalTensor& is_merge, const OptionalTensor& omega,
                   const OptionalTensor& cos, const OptionalTensor& sin, const Tensor& positions,
                   const Tensor& k_pages, const Tensor& v_pages, const OptionalTensor& k_scales,
                   const OptionalTensor& v_scales, const Tensor& table, const Tensor& entries,
                   const OptionalTensor& segments, const Tensor& rows,
                   const OptionalTensor& free_ids, const OptionalTensor& free_state,
                   const OptionalTensor& late_merge, const OptionalTensor& late_omega,
                   const OptionalTensor& q_out, bool compress, bool may_merge, double alpha_offset,
                   int64_t merge_window) {
  check_tokens(k, v);
  const int64_t batch = k.size(0), heads = k.size(1), dim = k.size(2);
  const ScalarType dtype = k.scalar_type();
  check_cache(k_pages, v_pages, k_scales, v_scales, table, entries, dtype, heads, dim);
  check_indices(positions, "positions", batch);
  check_indices(rows, "rows", batch);
  TORCH_CHECK_VALUE(q.has_value() == q_out.has_value(), "q and q_out go together");
  int64_t group = 1;
  if (q) {
    check_shape(*q, "q", {batch, kAny, dim});
    group = checked_group(*q, heads);
    check_dtype(*q, "q", dtype);
    check_last_dense(*q, "q");
    check_shape(*q_out, "q_out", {batch, q->size(1), dim});
    check_dtype(*q_out, "q_out", dtype);
    check_last_dense(*q_out, "q_out");
  }
  check_decisions(is_merge, omega, batch, heads);
  TORCH_CHECK_VALUE(!compress || q || is_merge, "gates need q, or is_merge and omega");
  check_angles(cos, sin, dtype, dim);
  const bool merges = compress && (!late_merge || late_omega);
  TORCH_CHECK_VALUE(!merges || segments, "segments are needed when merging");
  if (merges) check_segments(*segments, table.size(0), heads, merge_window, dim);
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
  TORCH_CHECK_VALUE((late_merge || !late_omega) && (!late_merge || compress),
                    "late_merge is given when compressing, and late_omega only with it");
  if (late_merge) {
    check_shape(*late_merge, "late_merge", {table.size(0), heads, kAny});
    check_dtype(*late_merge, "late_merge", ScalarType::Bool);
    check_dense(*late_merge, "late_merge");
  }
  if (late_omega) {
    check_shape(*late_omega, "late_omega", {table.size(0), heads, late_merge->size(2)});
    check_dtype(*late_omega, "late_omega", ScalarType::Float);
    check_dense(*late_omega, "late_omega");
  }
  check_devices({{"k", k}, {"v", v}, {"positions", positions}, {"k_pages", k_pages},
                 {"v_pages", v_pages}, {"block_table", table}, {"num_entries", entries},
                 {"rows", rows}, {"q", q}, {"is_merge", is_merge}, {"omega", omega}, {"cos", cos},
                 {"sin", sin}, {"segments", segments}, {"free_page_ids", free_ids},
                 {"free_state", free_state}, {"late_merge", late_merge},
                 {"late_omega", late_omega}, {"q_out", q_out}});

  launch_for(k, [&](auto type) {
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
    p.group = int(group);
    if (q) {
      copy_strides(p.q_stride, *q);
      copy_strides(p.q_out_stride, *q_out);
    }
    copy_angles(p, cos, sin);
    if (merges) copy_segments(p, *segments);
    p.num_requests = int(batch);
    p.num_kv_heads = int(heads);
    p.merge_window = int(merge_window);
    p.late_merge_RGW = data<uint8_t>(late_merge);
    p.late_omega_RGW = data<float>(late_omega);
    p.delay = late_merge ? int(late_merge->size(2)) : 0;
    p.num_free = free_ids ? int(free_ids->size(0)) : 0;
    p.alpha_offset = float(alpha_offset);
    p.eps = epsilon(dtype);
    p.compress = compress;
    p.may_merge = may_merge;
    launch(p);
  });
}

}  // namespace
