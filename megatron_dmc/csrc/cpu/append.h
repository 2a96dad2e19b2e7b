// One decoded token of every request into the cache. docs/method.md, section 6.
//
// First, in order of requests and heads, gates and pages; then, over threads, everything else.
//
// Dimension letters as in dmc/append.h.
#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace dmc::cpu {
inline namespace CPU_CAPABILITY {

constexpr int kHeadsOfThread = 16;  // fewer are not worth one

template <class T>
struct Append {
  const AppendParams<T>& p;
  const int dim;
  struct Place {
    bool is_merge;
    int entry;
    int32_t page_id;
  };
  std::vector<Place> places;

  explicit Append(const AppendParams<T>& p)
      : p(p), dim(p.kv.head_dim), places(size_t(p.num_requests) * p.num_kv_heads) {}

  void run() {
    const int heads = int(places.size());
    for (int x = 0; x < heads; ++x) places[x] = place_of(x / p.num_kv_heads, x % p.num_kv_heads);
    at::parallel_for(0, heads, kHeadsOfThread, [&](int64_t begin, int64_t end) {
      for (int x = int(begin); x < end; ++x) {
        const int b = x / p.num_kv_heads, g = x % p.num_kv_heads;
        if (p.rows_B[b] < 0) continue;
        if (p.q_BND) rotate_queries(b, g);
        if (places[x].page_id >= 0) write(b, g, places[x]);
      }
    });
  }

  const T* key(int b, int g) const {
    return p.k_BGD + b * p.k_stride[0] + g * p.k_stride[1];
  }
  const T* query(int b, int g) const {
    return p.q_BND + b * p.q_stride[0] + int64_t(g) * p.group * p.q_stride[1];
  }
  Angles<T> angles(int64_t x) const {
    return {p.cos_XF + x * p.cos_stride, p.sin_XF + x * p.sin_stride, p.half};
  }

  // Decide, count the entry, and take a page if it needs one; page -1: the head is left as it was.
  Place place_of(int b, int g) const {
    const int64_t row = p.rows_B[b];
    if (row < 0) return {false, 0, kNoPage};
    int64_t& num_entries = *p.kv.num_entries(row, g);
    bool is_merge = false;
    // the first entry's token does not merge, but it may be evicted
    if (p.compress && num_entries >= p.delay + !evicts()) {
      const bool is_late = p.delay > int(evicts());  // else the new token says it
      is_merge = is_late ? p.late_merge_RGW[late(b, g) + ring(b)] : merges(b, g);
    }
    const int entry = int(num_entries) - is_merge, column = p.kv.column(entry);
    if (column >= p.kv.table_width) return {is_merge, entry, kNoPage};
    int32_t& page_id = p.kv.table(row, g)[column];
    if (page_id < 0 && p.free_ids) {
      const int taken = p.free_state[0]++;
      if (taken < p.num_free) {
        page_id = p.free_ids[taken];
      } else {
        p.free_state[1] = 1;
      }
    }
    if (page_id >= 0) num_entries = entry + 1;
    return {is_merge, entry, page_id};
  }

  // The new token's own decision.
  bool merges(int b, int g) const {
    if (p.is_merge_BG) return p.is_merge_BG[int64_t(b) * p.num_kv_heads + g];
    return p.may_merge && to_float(key(b, g)[borrowed_channel(dim)]) - p.alpha_offset > 0.0f;
  }

  bool evicts() const { return p.delay && !p.late_omega_RGW; }
  int ring(int b) const { return int(p.positions_B[b] % p.delay); }
  int64_t late(int b, int g) const { return (p.rows_B[b] * p.num_kv_heads + g) * p.delay; }

  // The new token `kv` into its ring, raw, so that turning it back loses nothing. `kv` and `omega` become those of
  // the token that leaves; false: none does, or it is evicted or copied as it is stored.
  bool pass_ring(int b, int g, const Place& place, float* kv, float& omega) const {
    const bool leaves = place.entry + place.is_merge >= p.delay;
    const int32_t page = p.kv.table(p.rows_B[b], g)[p.kv.column(ring(b))];
    const int64_t slot = p.kv.slot(page, ring(b)), at = late(b, g);
    float old[2 * kMaxDim], old_omega = 0.0f;
    if (evicts()) {
      if (leaves && !place.is_merge) copy_entry<T>(p.kv, slot, p.kv.slot(place.page_id, place.entry));
      p.late_merge_RGW[at + (p.positions_B[b] + p.delay - 1) % p.delay] = merges(b, g);
    } else {
      if (leaves) read_entry<T>(p.kv, slot, old);
      old_omega = p.late_omega_RGW[at + ring(b)];
      p.late_merge_RGW[at + ring(b)] = merges(b, g);
      p.late_omega_RGW[at + ring(b)] = omega;
    }
    turn(kv, dim, angles(p.positions_B[b]), false);
    write_entry<T>(p.kv, slot, kv);
    if (!leaves || evicts()) return false;
    turn(old, dim, angles(p.positions_B[b] - p.delay), true, -1.0f);
    std::copy_n(old, 2 * dim, kv);
    omega = old_omega;
    return true;
  }

  void rotate_queries(int b, int g) const {
    T* to = p.q_out_BND + b * p.q_out_stride[0] + int64_t(g) * p.group * p.q_out_stride[1];
    for (int r = 0; r < p.group; ++r) {
      float x[kMaxDim];
      read(query(b, g) + r * p.q_stride[1], x, dim, p.compress);
      turn(x, dim, angles(p.positions_B[b]), p.compress);
      for (int c = 0; c < dim; ++c) from_float(x[c], to[r * p.q_out_stride[1] + c]);
    }
  }

  float omega(int b, int g) const {
    if (p.omega_BG) return p.omega_BG[int64_t(b) * p.num_kv_heads + g];
    float logit = 0.0f;
    for (int r = 0; r < p.group; ++r)
      logit += to_float(query(b, g)[r * p.q_stride[1] + borrowed_channel(dim)]);
    return sigmoid(logit / float(p.group) + p.alpha_offset) + p.eps;
  }

  void write(int b, int g, const Place& place) const {
    const T* v_D = p.v_BGD + b * p.v_stride[0] + g * p.v_stride[1];
    float kv[2 * kMaxDim];
    read(key(b, g), kv, dim, p.compress);
    read(v_D, kv + dim, dim, false);
    float weight = p.compress ? omega(b, g) : 1.0f;
    if (p.delay && !pass_ring(b, g, place, kv, weight)) return;
    if (p.compress) {
      float* kept = p.segments_RGUA + p.rows_B[b] * p.segments_row_stride +
                    g * p.segments_head_stride;
      OpenSegment{kept, dim, p.merge_window}.take(kv, weight, place.is_merge);
    }
    turn(kv, dim, angles(p.positions_B[b] - p.delay), p.compress);
    write_entry<T>(p.kv, p.kv.slot(place.page_id, place.entry), kv);
  }
};

template <class T>
void append(const AppendParams<T>& p) {
  Append<T>(p).run();
}

}  // namespace CPU_CAPABILITY
}  // namespace dmc::cpu
