// Chunks of prompts into the cache, and their attention. docs/method.md, section 6.
//
// Writing goes token by token, heads over threads. Attention is divided into items: the queries of one
// key/value head for some tokens of a chunk. Queries lie side by side in vectors, so that maxima and sums over
// entries need nothing from another lane: scores are K Q^T and outputs V^T P^T, a tile of entries at a time, both by
// `add_outer`. A token whose segment is entry e sees the entries below e and its own state; in a plain cache the
// entries up to e. Without a delay tiles begin at the same entries for every query, so an output depends on neither the
// chunks nor the other requests. With a delay W the state and the entries are those of the token W before, and the
// token itself and the W - 1 before it lie raw in `near`.
//
// Dimension letters as in `ops.paged.prefill`; M queries of an item, side by side.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/products.h"
#include "cpu/rows.h"

namespace dmc::cpu {
inline namespace CPU_CAPABILITY {

constexpr int kQueries = 96;       // of an item, if a token has fewer heads
constexpr int kEntriesOfTile = 64;
constexpr int kRowsOfOuter = 6;    // times two vectors: the sums in registers

template <class T>
inline Angles<T> angles(const PrefillParams<T>& p, int64_t t) {
  return {p.cos_TF + t * p.cos_stride, p.sin_TF + t * p.sin_stride, p.half};
}

template <class T>
struct ChunkWriter {
  const PrefillParams<T>& p;
  const int dim;

  explicit ChunkWriter(const PrefillParams<T>& p) : p(p), dim(p.kv.head_dim) {}

  void run() const {
    at::parallel_for(0, p.num_chunks * p.num_kv_heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t x = begin; x < end; ++x) write(p.chunks_B3 + x / p.num_kv_heads * 3, int(x % p.num_kv_heads));
    });
  }

  void write(const int32_t* chunk, int g) const {
    const int64_t row = chunk[0];
    int64_t& num_entries = *p.kv.num_entries(row, g);
    num_entries = std::max<int64_t>(num_entries, p.delay);  // the ring's slots come first
    const int32_t* table = p.kv.table(row, g);
    const bool compress = p.is_merge_TG;
    const OpenSegment segment{
        compress ? p.segments_RGUA + row * p.segments_row_stride + g * p.segments_head_stride : nullptr, dim,
        p.merge_window};
    for (int64_t t = chunk[1]; t < chunk[1] + chunk[2]; ++t) {
      float kv[2 * kMaxDim];
      read(p.k_TGD + t * p.k_stride[0] + g * p.k_stride[1], kv, dim, compress);
      read(p.v_TGD + t * p.v_stride[0] + g * p.v_stride[1], kv + dim, dim, false);
      const int64_t at = t * p.num_kv_heads + g;
      const bool is_merge = compress && p.is_merge_TG[at] && num_entries > p.delay;
      if (compress) segment.take(kv, p.omega_TG[at], is_merge);
      turn(kv, dim, angles(p, t), compress);
      const int entry = int(num_entries) - is_merge;
      num_entries = entry + 1;
      p.entry_TG[at] = entry;
      if (compress) {
        for (int c = 0; c < dim; ++c) from_float(kv[c], p.own_k_TGD[at * dim + c]);
        for (int c = 0; c < dim; ++c) from_float(kv[dim + c], p.own_v_TGD[at * dim + c]);
        // a state that the next token replaces is not written
        if (t + 1 < chunk[1] + chunk[2] && p.is_merge_TG[at + p.num_kv_heads]) continue;
      }
      const int column = p.kv.column(entry);
      if (column >= p.kv.table_width || table[column] < 0) continue;
      write_entry<T>(p.kv, p.kv.slot(table[column], entry), kv);
    }
  }
};

// sums = sums * decay + A B: rows of `sums` and B are M numbers, and A's element (r, x) lies at r * row + x * step.
template <int R>
inline void add_outer(const float* a, int64_t row, int64_t step, const float* b, int count, const float* decay,
                      float* sums, int num_queries) {
  for (int m = 0; m < num_queries; m += kStep) {
    Vec of[R][2];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < 2; ++i)
        of[r][i] = decay ? Vec::loadu(sums + r * num_queries + m + i * kLanes) * Vec::loadu(decay + m + i * kLanes)
                         : Vec(0.0f);
    const float* from = a;
    for (int x = 0; x < count; ++x, from += step) {
      const Vec b0 = Vec::loadu(b + x * num_queries + m), b1 = Vec::loadu(b + x * num_queries + m + kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const Vec one(from[r * row]);
        add_product(one, b0, of[r][0]);
        add_product(one, b1, of[r][1]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < 2; ++i) of[r][i].store(sums + r * num_queries + m + i * kLanes);
  }
}

inline void add_all_outer(const float* a, int64_t row, int64_t step, const float* b, int count, const float* decay,
                          float* sums, int num_rows, int num_queries) {
  int r = 0;
  for (; r + kRowsOfOuter <= num_rows; r += kRowsOfOuter)
    add_outer<kRowsOfOuter>(a + r * row, row, step, b, count, decay, sums + r * num_queries, num_queries);
  for (; r + 2 <= num_rows; r += 2)
    add_outer<2>(a + r * row, row, step, b, count, decay, sums + r * num_queries, num_queries);
  if (r < num_rows) add_outer<1>(a + r * row, row, step, b, count, decay, sums + r * num_queries, num_queries);
}

template <class T>
struct ChunkAttention {
  const PrefillParams<T>& p;
  const int dim, group, tokens_of_item;
  struct Item {
    int chunk, first;  // token of the chunk
  };
  std::vector<Item> items;

  // An item's numbers, columns of queries.
  struct Scratch {
    std::vector<float> q_DM, out_DM, scores_EM, k_ED, v_ED;
    std::vector<float> max_M, sum_M, decay_M;
    std::vector<float> first_M, end_M;  // of the keys that a query sees
  };

  explicit ChunkAttention(const PrefillParams<T>& p)
      : p(p), dim(p.kv.head_dim), group(p.group), tokens_of_item(std::max(1, kQueries / p.group)) {}

  void run() {
    for (int b = 0; b < p.num_chunks; ++b)
      for (int t = 0; t < p.chunks_B3[b * 3 + 2]; t += tokens_of_item) items.push_back({b, t});
    // the longest first
    std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.first > b.first; });
    const int count = int(items.size()) * p.num_kv_heads;
    std::atomic<int> next{0};
    at::parallel_for(0, std::min(count, at::get_num_threads()), 1, [&](int64_t, int64_t) {
      static thread_local Scratch scratch;
      for (int x = next++; x < count; x = next++) attend(scratch, items[x / p.num_kv_heads], x % p.num_kv_heads);
    });
  }

  void attend(Scratch& s, const Item& item, int g) const {
    const int32_t* chunk = p.chunks_B3 + item.chunk * 3;
    const int num_tokens = std::min(tokens_of_item, chunk[2] - item.first);
    const int num_queries = (num_tokens * group + kStep - 1) / kStep * kStep;
    prepare(s, item, num_tokens, g, num_queries);
    if (p.delay) {
      const int64_t heads = int64_t(p.num_kv_heads) * dim;
      const int64_t first = (chunk[1] + int64_t(item.chunk) * p.delay) * heads + int64_t(g) * dim;
      const int lead = p.far_B2[item.chunk * 2], end = item.first + num_tokens + p.delay;
      for (int y = std::max(item.first + 1, lead); y < end; y += kEntriesOfTile) {
        const int count = std::min(kEntriesOfTile, end - y);
        for (int e = 0; e < count; ++e)
          widen(p.near_k_YGD + first + (y + e) * heads, p.near_v_YGD + first + (y + e) * heads, e, s);
        add_tile(s, y, count, num_queries, true);
      }
    }
    see_entries(s, item, num_tokens, g);
    const int32_t* table = p.kv.table(chunk[0], g);
    const T* k_pages = static_cast<const T*>(p.kv.k_pages_PSD);
    const T* v_pages = static_cast<const T*>(p.kv.v_pages_PSD);
    const int least = visible(item, 0, g), most = visible(item, num_tokens - 1, g);
    for (int first = p.delay; first < most; first += kEntriesOfTile) {
      const int count = std::min(kEntriesOfTile, most - first);
      for (int e = 0; e < count; ++e) {
        const int64_t slot = p.kv.slot(table[p.kv.column(first + e)], first + e) * dim;
        widen(k_pages + slot, v_pages + slot, e, s);
      }
      add_tile(s, first, count, num_queries, first + count > least);
    }
    write(s, chunk[1] + int64_t(item.first), num_tokens, g, num_queries);
  }

  // The row of the state that a token of an item sees; -1: none.
  int64_t state(const Item& item, int t) const {
    const int of_chunk = item.first + t;
    if (!p.delay) return int64_t(p.chunks_B3[item.chunk * 3 + 1]) + of_chunk;
    const int32_t* far = p.far_B2 + item.chunk * 2;
    return of_chunk < far[0] ? -1 : int64_t(far[1]) + of_chunk - far[0];
  }

  // The slots up to that of the last entry that it sees.
  int visible(const Item& item, int t, int g) const {
    const int64_t row = state(item, t);
    return row < 0 ? p.delay : p.entry_TG[row * p.num_kv_heads + g] + !p.own_k_TGD;
  }

  // Queries, the softmax with each token's own state alone, and the near rows that it sees.
  void prepare(Scratch& s, const Item& item, int num_tokens, int g, int num_queries) const {
    s.q_DM.assign(size_t(dim) * num_queries, 0.0f);
    s.out_DM.assign(size_t(dim) * num_queries, 0.0f);
    s.scores_EM.resize(size_t(kEntriesOfTile) * num_queries);
    s.k_ED.resize(size_t(kEntriesOfTile) * dim);
    s.v_ED.resize(size_t(kEntriesOfTile) * dim);
    s.max_M.assign(num_queries, -INFINITY);
    s.sum_M.assign(num_queries, 0.0f);
    s.decay_M.resize(num_queries);
    s.first_M.assign(num_queries, 0.0f);
    s.end_M.assign(num_queries, 0.0f);
    const int64_t first = int64_t(p.chunks_B3[item.chunk * 3 + 1]) + item.first;
    for (int t = 0; t < num_tokens; ++t) {
      const int64_t row = state(item, t), at = row * p.num_kv_heads + g;
      for (int r = 0; r < group; ++r) {
        const int m = t * group + r;
        float q[kMaxDim];
        read(p.q_TND + (first + t) * p.q_stride[0] + (int64_t(g) * group + r) * p.q_stride[1], q, dim, p.compress);
        turn(q, dim, angles(p, first + t), p.compress);
        for (int c = 0; c < dim; ++c) {
          T rounded;
          from_float(q[c], rounded);  // as the cache's keys are
          q[c] = to_float(rounded) * p.scale;
          s.q_DM[size_t(c) * num_queries + m] = q[c];
        }
        s.first_M[m] = float(item.first + t + 1);
        s.end_M[m] = float(item.first + t + 1 + p.delay);
        if (!p.own_k_TGD || row < 0) continue;
        float score = 0.0f;
        for (int c = 0; c < dim; ++c) score += q[c] * to_float(p.own_k_TGD[at * dim + c]);
        s.max_M[m] = score;
        s.sum_M[m] = 1.0f;
        for (int c = 0; c < dim; ++c) s.out_DM[size_t(c) * num_queries + m] = to_float(p.own_v_TGD[at * dim + c]);
      }
    }
  }

  // From here on `first_M` and `end_M` are those of entries.
  void see_entries(Scratch& s, const Item& item, int num_tokens, int g) const {
    std::fill(s.first_M.begin(), s.first_M.end(), 0.0f);
    for (int t = 0; t < num_tokens; ++t)
      std::fill_n(s.end_M.begin() + t * group, group, float(visible(item, t, g)));
  }

  void widen(const T* k, const T* v, int e, Scratch& s) const {
    for (int c = 0; c < dim; ++c) s.k_ED[size_t(e) * dim + c] = to_float(k[c]);
    for (int c = 0; c < dim; ++c) s.v_ED[size_t(e) * dim + c] = to_float(v[c]);
  }

  // The tile of keys and values in `s`, of which the first is the number `first`.
  void add_tile(Scratch& s, int first, int count, int num_queries, bool is_masked) const {
    add_all_outer(s.k_ED.data(), dim, 1, s.q_DM.data(), dim, nullptr, s.scores_EM.data(), count, num_queries);
    weigh(s, first, count, num_queries, is_masked);
    add_all_outer(s.v_ED.data(), 1, dim, s.scores_EM.data(), count, s.decay_M.data(), s.out_DM.data(), dim,
                  num_queries);
  }

  // Scores of a tile become weights, and `decay_M` what earlier sums are multiplied by.
  void weigh(Scratch& s, int first, int count, int num_queries, bool is_masked) const {
    for (int m = 0; m < num_queries; m += kLanes) {
      float* scores = s.scores_EM.data() + m;
      const Vec begin = Vec::loadu(s.first_M.data() + m), end = Vec::loadu(s.end_M.data() + m);
      const Vec least(-INFINITY);
      const Vec before = Vec::loadu(s.max_M.data() + m);
      Vec most = before;
      for (int e = 0; e < count; ++e) {
        Vec score = Vec::loadu(scores + size_t(e) * num_queries);
        if (is_masked) {
          const Vec number(float(first + e));
          score = Vec::blendv(score, least, (number < begin) | (number >= end));
          score.store(scores + size_t(e) * num_queries);
        }
        most = at::vec::maximum(most, score);
      }
      // a query that has seen nothing: its weights are exp(-inf)
      const Vec base = Vec::blendv(most, Vec(0.0f), most == least);
      const Vec decay = (before - base).exp_u20();
      Vec sum = Vec::loadu(s.sum_M.data() + m) * decay;
      for (int e = 0; e < count; ++e) {
        const Vec score = Vec::loadu(scores + size_t(e) * num_queries);
        Vec weight = (score - base).exp_u20();
        if (is_masked) weight = Vec::blendv(weight, Vec(0.0f), score == least);
        weight.store(scores + size_t(e) * num_queries);
        sum = sum + weight;
      }
      most.store(s.max_M.data() + m);
      sum.store(s.sum_M.data() + m);
      decay.store(s.decay_M.data() + m);
    }
  }

  void write(const Scratch& s, int64_t first, int num_tokens, int g, int num_queries) const {
    for (int t = 0; t < num_tokens; ++t)
      for (int r = 0; r < group; ++r) {
        const int m = t * group + r;
        // of NaN `exp_u20` makes a number, and the maximum keeps it
        const float scale = 1.0f / s.sum_M[m] + 0.0f * s.max_M[m];
        T* out = p.out_TND + (first + t) * p.out_stride[0] + (int64_t(g) * group + r) * p.out_stride[1];
        for (int c = 0; c < dim; ++c) from_float(s.out_DM[size_t(c) * num_queries + m] * scale, out[c]);
      }
  }
};

template <class T>
void prefill_write(const PrefillParams<T>& p) {
  ChunkWriter<T>(p).run();
}
template <class T>
void prefill_attention(const PrefillParams<T>& p) {
  ChunkAttention<T>(p).run();
}

}  // namespace CPU_CAPABILITY
}  // namespace dmc::cpu
