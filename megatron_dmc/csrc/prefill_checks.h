// The checks of prefill that GPU and CPU share. For binding.cpp and cpu/prefill_operators.h.
#pragma once

#include "checks.h"

namespace {

// Two tensors (tokens, heads, dim), given together: states, or raw tokens.
void check_states(const OptionalTensor& k, const OptionalTensor& v, const char* k_name,
                  const char* v_name, const Tensor& like, int64_t tokens, int64_t heads) {
  TORCH_CHECK_VALUE(k.has_value() == v.has_value(), k_name, " and ", v_name, " go together");
  if (!k) return;
  const Argument both[] = {{k_name, k}, {v_name, v}};
  for (const Argument& x : both) {
    check_shape(*x.tensor, x.name, {tokens, heads, like.size(2)});
    check_dtype(*x.tensor, x.name, like.scalar_type());
    check_dense(*x.tensor, x.name);
    check_aligned(*x.tensor, x.name);
  }
}

// RoPE's angles, a row for each packed token.
void check_token_angles(const OptionalTensor& cos, const OptionalTensor& sin, const Tensor& like) {
  check_angles(cos, sin, like.scalar_type(), like.size(2));
  TORCH_CHECK_VALUE(!cos || cos->size(0) == like.size(0), "cos and sin must have a row for each of the ",
                    like.size(0), " tokens");
}

// Of chunks that are written: (tokens, heads, dim) packed keys and values, and what belongs to them.
void check_write(const Tensor& k, const Tensor& v, const OptionalTensor& is_merge,
                 const OptionalTensor& omega, const OptionalTensor& cos, const OptionalTensor& sin,
                 const Tensor& k_pages, const Tensor& v_pages, const Tensor& table,
                 const Tensor& entries, const OptionalTensor& segments, const Tensor& chunks,
                 const OptionalTensor& own_k, const OptionalTensor& own_v, const Tensor& entry,
                 int64_t merge_window) {
  check_tokens(k, v);
  const int64_t tokens = k.size(0), heads = k.size(1), dim = k.size(2);
  check_cache(k_pages, v_pages, {}, {}, table, entries, k.scalar_type(), heads, dim);
  check_ints(chunks, "chunks", {kAny, 3});
  check_ints(entry, "entry", {tokens, heads});
  check_token_angles(cos, sin, k);
  check_decisions(is_merge, omega, tokens, heads);
  TORCH_CHECK_VALUE(is_merge.has_value() == segments.has_value() &&
                        is_merge.has_value() == own_k.has_value(),
                    "is_merge, segments and own_k go together");
  check_states(own_k, own_v, "own_k", "own_v", k, tokens, heads);
  if (segments) check_segments(*segments, table.size(0), heads, merge_window, dim);
  check_devices({{"k", k}, {"v", v}, {"is_merge", is_merge}, {"omega", omega}, {"cos", cos},
                 {"sin", sin}, {"k_pages", k_pages}, {"v_pages", v_pages}, {"block_table", table},
                 {"num_entries", entries}, {"segments", segments}, {"chunks", chunks},
                 {"own_k", own_k}, {"own_v", own_v}, {"entry", entry}});
}

// Of queries (tokens, query heads, dim) over chunks that are written.
void check_attention(const Tensor& q, const OptionalTensor& own_k, const OptionalTensor& own_v,
                     const Tensor& entry, const OptionalTensor& cos, const OptionalTensor& sin,
                     const Tensor& k_pages, const Tensor& v_pages, const Tensor& table,
                     const Tensor& chunks, const OptionalTensor& near_k,
                     const OptionalTensor& near_v, const OptionalTensor& far, const Tensor& out,
                     int64_t delay) {
  check_shape(q, "q", {kAny, kAny, kAny});
  check_shape(table, "block_table", {kAny, kAny, kAny});
  const int64_t tokens = q.size(0), heads = table.size(1), dim = q.size(2);
  check_pages(k_pages, v_pages, {}, {}, table, q.scalar_type(), heads, dim);
  checked_group(q, heads);
  check_last_dense(q, "q");
  check_shape(out, "out", {tokens, q.size(1), dim});
  check_dtype(out, "out", q.scalar_type());
  check_last_dense(out, "out");
  check_ints(chunks, "chunks", {kAny, 3});
  TORCH_CHECK_VALUE(near_k.has_value() == (delay > 0) && near_v.has_value() == (delay > 0) &&
                        far.has_value() == (delay > 0),
                    "near_k, near_v and far are given with a delay and only with it");
  check_states(near_k, near_v, "near_k", "near_v", q, tokens + delay * chunks.size(0), heads);
  if (far) check_ints(*far, "far", {chunks.size(0), 2});
  const int64_t states = delay ? entry.size(0) : tokens;  // of tokens that have left the ring
  check_states(own_k, own_v, "own_k", "own_v", q, states, heads);
  check_ints(entry, "entry", {states, heads});
  check_token_angles(cos, sin, q);
  check_devices({{"q", q}, {"own_k", own_k}, {"own_v", own_v}, {"entry", entry}, {"cos", cos},
                 {"sin", sin}, {"k_pages", k_pages}, {"v_pages", v_pages}, {"block_table", table},
                 {"chunks", chunks}, {"near_k", near_k}, {"near_v", near_v}, {"far", far},
                 {"out", out}});
}

}  // namespace
