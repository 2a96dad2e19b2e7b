// Append one decoded token of every request to the cache. docs/method.md, section 6.
//
// Dimension letters: B requests, N query heads, G key/value heads, D head dim, X rows of a table of
// angles, F rotary channels, R rows, U weighted tokens kept for an open segment, A = 2 D + 1, W tokens of a ring.
#pragma once

#include "dmc/paged_kv.h"
#include "dmc/segment.h"

namespace dmc {

template <class T>
struct AppendParams {
  PagedKV kv;
  const T* q_BND;  // null: no queries to rotate, gates are given
  const T* k_BGD;
  const T* v_BGD;
  T* q_out_BND;
  const T* cos_XF;  // null: no RoPE
  const T* sin_XF;
  const uint8_t* is_merge_BG;  // null: gates come from q and k
  const float* omega_BG;
  const int64_t* positions_B;
  const int64_t* rows_B;
  float* segments_RGUA;
  const int32_t* free_ids;  // null: pages are in the table
  int32_t* free_state;
  uint8_t* late_merge_RGW;  // decisions about the tokens in the rings, and their importances
  float* late_omega_RGW;    // null: they do not merge, but are evicted
  int64_t q_stride[2], k_stride[2], v_stride[2], q_out_stride[2];
  int64_t cos_stride, sin_stride, segments_row_stride, segments_head_stride;
  int num_requests, num_kv_heads, group, half, merge_window, num_free;
  int delay;  // W; 0: decisions take effect at once
  float alpha_offset, eps;
  bool compress, may_merge;
};

// The component of each query and key head that holds a gate's logit: `BORROWED_CHANNEL` of ops/gates.py.
template <int kHeadDim>
constexpr int kBorrowedChannel = kHeadDim - 1;

// A thread owns pairs of channels: those that RoPE rotates together, (j, j + half), then the
// non-rotary channels, paired in the same way.
template <int kHeadDim>
struct Pairs {
  static constexpr int kTotal = kHeadDim / 2;
  static constexpr int kOwn = (kTotal + kWarp - 1) / kWarp;
  int half;

  DMC_DEVICE int pair(int i) const { return thread_index() % kWarp + i * kWarp; }
  DMC_DEVICE bool owns(int i) const { return pair(i) < kTotal; }
  DMC_DEVICE int first(int i) const { return pair(i) < half ? pair(i) : half + pair(i); }
  DMC_DEVICE int second(int i) const {
    return pair(i) < half ? half + pair(i) : kTotal + pair(i);
  }
  DMC_DEVICE bool is_content(int channel) const { return channel != kBorrowedChannel<kHeadDim>; }

  template <class T>
  DMC_DEVICE void load(float (&x)[2 * kOwn], const T* from, bool compress) const {
    DMC_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      const bool has_first = owns(i) && (!compress || is_content(first(i)));
      const bool has_second = owns(i) && (!compress || is_content(second(i)));
      x[2 * i] = has_first ? to_float(from[first(i)]) : 0.0f;
      x[2 * i + 1] = has_second ? to_float(from[second(i)]) : 0.0f;
    }
  }
  DMC_DEVICE void load_sums(float (&x)[2 * kOwn], const float* from) const {
    DMC_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      x[2 * i] = owns(i) ? from[first(i)] : 0.0f;
      x[2 * i + 1] = owns(i) ? from[second(i)] : 0.0f;
    }
  }
  DMC_DEVICE void store_sums(const float (&x)[2 * kOwn], float* to) const {
    DMC_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      if (!owns(i)) continue;
      to[first(i)] = x[2 * i];
      to[second(i)] = x[2 * i + 1];
    }
  }
  template <class T>
  DMC_DEVICE void store(const float (&x)[2 * kOwn], T* to) const {
    DMC_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      if (!owns(i)) continue;
      from_float(x[2 * i], to[first(i)]);
      from_float(x[2 * i + 1], to[second(i)]);
    }
  }
  // Write an entry in the pages' storage format. Called by all lanes of a warp.
  template <class S>
  DMC_DEVICE void store_entry(const float (&x)[2 * kOwn], void* pages, float* scales,
                              int64_t slot) const {
    S* to = static_cast<S*>(pages) + slot * kHeadDim;
    if constexpr (is_8bit<S>) {
      uint32_t most = 0;
      DMC_UNROLL
      for (int i = 0; i < 2 * kOwn; ++i) {
        const uint32_t magnitude = float_bits(x[i]) & 0x7fffffffu;
        most = magnitude > most ? magnitude : most;
      }
      const float scale = scale_of<S>(largest_of_warp(most));
      if (thread_index() % kWarp == 0) scales[slot] = scale;
      DMC_UNROLL
      for (int i = 0; i < kOwn; ++i) {
        if (!owns(i)) continue;
        encode(x[2 * i] / scale, to[first(i)]);
        encode(x[2 * i + 1] / scale, to[second(i)]);
      }
    } else {
      store(x, to);
    }
  }
  // The inverse of `store_entry`.
  template <class T, class S>
  DMC_DEVICE void load_entry(float (&x)[2 * kOwn], const void* pages, const float* scales,
                             int64_t slot) const {
    const S* from = static_cast<const S*>(pages) + slot * kHeadDim;
    float scale = 1.0f;
    if constexpr (is_8bit<S>) scale = scales[slot];
    DMC_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      x[2 * i] = owns(i) ? to_float(from[first(i)]) * scale : 0.0f;
      x[2 * i + 1] = owns(i) ? to_float(from[second(i)]) * scale : 0.0f;
    }
  }
  // An entry from one slot to another, as it is stored.
  template <class S>
  DMC_DEVICE void copy_entry(void* pages, float* scales, int64_t from, int64_t to) const {
    const S* from_D = static_cast<const S*>(pages) + from * kHeadDim;
    S* to_D = static_cast<S*>(pages) + to * kHeadDim;
    DMC_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      if (!owns(i)) continue;
      to_D[first(i)] = from_D[first(i)];
      to_D[second(i)] = from_D[second(i)];
    }
    if (is_8bit<S> && thread_index() % kWarp == 0) scales[to] = scales[from];
  }
  // Angles of a position's rotary channels; non-rotary pairs keep their angle of 0.
  template <class T>
  DMC_DEVICE void load_angles(float (&cos)[kOwn], float (&sin)[kOwn], const T* cos_F,
                              const T* sin_F) const {
    DMC_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      const bool turns = pair(i) < half;
      cos[i] = turns ? to_float(cos_F[pair(i)]) : 1.0f;
      sin[i] = turns ? to_float(sin_F[pair(i)]) : 0.0f;
    }
  }
  // RoPE, half-split; afterwards the borrowed channel is 0 again.
  DMC_DEVICE void turn(float (&x)[2 * kOwn], const float (&cos)[kOwn], const float (&sin)[kOwn],
                       bool compress) const {
    DMC_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = compress && !is_content(first(i)) ? 0.0f : a * cos[i] - b * sin[i];
      x[2 * i + 1] = compress && !is_content(second(i)) ? 0.0f : b * cos[i] + a * sin[i];
    }
  }
};

// One warp for each (request, key/value head); pages hold S. With a delay the token that leaves the head's ring
// is merged or appended, and the new one takes its slot. Where tokens are evicted, it is copied as it is stored, or
// is gone; a token decides about the one before it.
template <class T, class S, int kHeadDim, bool kDelayed>
DMC_DEVICE void append_token(const AppendParams<T>& p, int index) {
  using Own = Pairs<kHeadDim>;
  constexpr int kChannels = 2 * Own::kOwn;
  const int b = index / p.num_kv_heads, g = index % p.num_kv_heads;
  const int lane = thread_index() % kWarp;
  const Own own{p.half};
  const int64_t row = p.rows_B[b];
  const T* k_D = p.k_BGD + b * p.k_stride[0] + g * p.k_stride[1];
  const T* v_D = p.v_BGD + b * p.v_stride[0] + g * p.v_stride[1];
  const T* q_ND = nullptr;
  if (p.q_BND) q_ND = p.q_BND + b * p.q_stride[0] + int64_t(g) * p.group * p.q_stride[1];

  float cos[Own::kOwn], sin[Own::kOwn];
  const int64_t position = p.positions_B[b];
  own.load_angles(cos, sin, p.cos_XF + position * p.cos_stride, p.sin_XF + position * p.sin_stride);

  float logit = 0.0f;
  for (int r = 0; q_ND && r < p.group; ++r) {
    const T* q_D = q_ND + r * p.q_stride[1];
    float q[kChannels];
    own.load(q, q_D, p.compress);
    logit += to_float(q_D[kBorrowedChannel<kHeadDim>]);
    own.turn(q, cos, sin, p.compress);
    const int64_t n = int64_t(g) * p.group + r;
    own.store(q, p.q_out_BND + b * p.q_out_stride[0] + n * p.q_out_stride[1]);
  }
  if (row < 0) return;  // padding

  // gates
  int64_t* num_entries = p.kv.num_entries(row, g);
  const int entries = int(*num_entries);
  bool is_merge = false;
  float omega = 1.0f;
  if (p.compress && p.is_merge_BG) {
    is_merge = p.is_merge_BG[index] != 0;
    omega = p.omega_BG[index];
  } else if (p.compress) {
    is_merge = p.may_merge && to_float(k_D[kBorrowedChannel<kHeadDim>]) - p.alpha_offset > 0.0f;
    omega = sigmoid(logit / p.group + p.alpha_offset) + p.eps;
  }
  int ring = 0;  // the new token's slot in its ring
  bool new_merge = is_merge;
  float new_omega = omega;
  int64_t late = 0;
  const bool evicts = kDelayed && !p.late_omega_RGW;
  if constexpr (kDelayed) {
    ring = int(position % p.delay);
    late = (row * p.num_kv_heads + g) * p.delay;
    if (!evicts || p.delay > 1) is_merge = p.late_merge_RGW[late + ring] != 0;
    if (!evicts) omega = p.late_omega_RGW[late + ring];
  }
  // the first entry's token does not merge, but it may be evicted
  is_merge = is_merge && entries >= (kDelayed ? p.delay : 0) + !evicts;

  // the entry's page: the head's, or one from the free list
  const int entry = is_merge ? entries - 1 : entries;
  const int column = p.kv.column(entry);
  if (column >= p.kv.table_width) return;
  int32_t* in_table = p.kv.table(row, g) + column;
  int page_id = kNoPage;
  if (lane == 0) {
    page_id = *in_table;
    if (page_id < 0 && p.free_ids) {
      const int taken = atomic_add(p.free_state, 1);
      if (taken < p.num_free) {
        page_id = p.free_ids[taken];
        *in_table = page_id;
      } else {
        p.free_state[1] = 1;
      }
    }
  }
  page_id = shuffle(page_id, 0);  // also: all lanes have read `entries`, and what their ring decided
  if (page_id < 0) return;

  float k[kChannels], v[kChannels];
  own.load(k, k_D, p.compress);
  own.load(v, v_D, false);
  if constexpr (kDelayed) {
    const bool leaves = entries >= p.delay;
    const int ring_page = leaves ? p.kv.table(row, g)[p.kv.column(ring)] : page_id;
    const int64_t slot = p.kv.slot(ring_page, ring);
    float old_k[kChannels] = {}, old_v[kChannels] = {};
    if (evicts) {
      const int64_t to = p.kv.slot(page_id, entry);
      if (leaves && !is_merge) {
        own.template copy_entry<S>(p.kv.k_pages_PSD, p.kv.k_scales_PS, slot, to);
        own.template copy_entry<S>(p.kv.v_pages_PSD, p.kv.v_scales_PS, slot, to);
      }
    } else if (leaves) {
      own.template load_entry<T, S>(old_k, p.kv.k_pages_PSD, p.kv.k_scales_PS, slot);
      own.template load_entry<T, S>(old_v, p.kv.v_pages_PSD, p.kv.v_scales_PS, slot);
    }
    sync_warp();  // every lane has read the scales
    // raw, with what RoPE turns into the borrowed channel: turning back loses nothing
    own.turn(k, cos, sin, false);
    own.template store_entry<S>(k, p.kv.k_pages_PSD, p.kv.k_scales_PS, slot);
    own.template store_entry<S>(v, p.kv.v_pages_PSD, p.kv.v_scales_PS, slot);
    if (lane == 0) {
      p.late_merge_RGW[late + (evicts ? int((position + p.delay - 1) % p.delay) : ring)] = new_merge;
      if (!evicts) p.late_omega_RGW[late + ring] = new_omega;
    }
    if (!leaves || evicts) {
      if (lane == 0) *num_entries = entry + 1;
      return;
    }
    const int64_t left = position - p.delay;
    own.load_angles(cos, sin, p.cos_XF + left * p.cos_stride, p.sin_XF + left * p.sin_stride);
    DMC_UNROLL
    for (int i = 0; i < Own::kOwn; ++i) sin[i] = -sin[i];
    own.turn(old_k, cos, sin, true);
    DMC_UNROLL
    for (int i = 0; i < Own::kOwn; ++i) sin[i] = -sin[i];
    DMC_UNROLL
    for (int i = 0; i < kChannels; ++i) {
      k[i] = old_k[i];
      v[i] = old_v[i];
    }
  }
  if (p.compress) {
    float* kept = p.segments_RGUA + row * p.segments_row_stride + g * p.segments_head_stride;
    constexpr int kRow = 2 * kHeadDim + 1;
    const int num_kept = larger(p.merge_window, 1);
    Segment<kChannels> segment, token, older;
    token.open(k, v, omega);
    segment = token;
    for (int u = p.merge_window ? 1 : 0; u < num_kept; ++u) {
      if (is_merge) {
        own.load_sums(older.k_sum, kept + u * kRow);
        own.load_sums(older.v_sum, kept + u * kRow + kHeadDim);
        older.omega_sum = kept[u * kRow + 2 * kHeadDim];
        segment.merge(older);
      } else {
        const float zero[kChannels] = {};
        older.open(zero, zero, 0.0f);
      }
      if (!p.merge_window) continue;
      sync_warp();  // every lane has read the row's omega before it is overwritten
      own.store_sums(older.k_sum, kept + (u - 1) * kRow);
      own.store_sums(older.v_sum, kept + (u - 1) * kRow + kHeadDim);
      if (lane == 0) kept[(u - 1) * kRow + 2 * kHeadDim] = older.omega_sum;
    }
    sync_warp();
    float* last = kept + (num_kept - 1) * kRow;
    const Segment<kChannels> newest = p.merge_window ? token : segment;
    own.store_sums(newest.k_sum, last);
    own.store_sums(newest.v_sum, last + kHeadDim);
    if (lane == 0) last[2 * kHeadDim] = newest.omega_sum;
    segment.emit(k, v);
  }
  own.turn(k, cos, sin, p.compress);
  const int64_t slot = p.kv.slot(page_id, entry);
  own.template store_entry<S>(k, p.kv.k_pages_PSD, p.kv.k_scales_PS, slot);
  own.template store_entry<S>(v, p.kv.v_pages_PSD, p.kv.v_scales_PS, slot);
  if (lane == 0) *num_entries = entry + 1;
}

}  // namespace dmc
