// Decode attention over pages and per-head lengths. docs/method.md, section 6.
//
// Work is divided into items: up to kItem entries of one key/value head. The cut depends on the head's
// own length alone, so an output does not depend on the number of threads or on the rest of the
// batch. Threads take items in order from one counter; the thread that finishes a head's last item joins its parts.
// An item is a row of tiles of kTile entries; while one is computed the next one is fetched into the
// cache. Query heads of a group share a tile, up to three at a time in registers.
//
// Dimension letters as in dmc/attention.h.
#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <memory>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "cpu/tile.h"

namespace dmc::cpu {
inline namespace CPU_CAPABILITY {

constexpr int kItem = 256;  // a multiple of kTile
constexpr int64_t kAlone = 1 << 15;  // bytes that are not worth a second thread

struct Item {
  int head;       // request * num_kv_heads + key/value head
  int first, count;  // entries
  int part;       // its place among the parts; -1: it is the whole head
};

#ifdef __AVX512BF16__
template <class S>
constexpr bool kProductsOfBf16 = std::is_same_v<S, bf16>;
#else
template <class S>
constexpr bool kProductsOfBf16 = false;
#endif

// The running softmax of a head's queries over an item. Channels as `load` orders them.
template <class S>
struct State {
  using Query = std::conditional_t<kProductsOfBf16<S>, bf16, float>;
  alignas(64) Query q[kMaxGroup * kMaxDim];  // bf16: in their own order
  alignas(64) float out[kMaxGroup * kMaxDim];  // not divided by `sum` yet
  alignas(64) float scores[kMaxGroup * kTile];
  float k_scales[kTile], v_scales[kTile];  // of entries of 8 bits
  float max[kMaxGroup], sum[kMaxGroup], decay[kMaxGroup];
};

// f(r, count) for queries r to r + count, where `count` is a constant of 1 to 3.
template <class F>
inline void by_threes(int group, F f) {
  int r = 0;
  for (; group - r == 3 || group - r > 4; r += 3) f(r, std::integral_constant<int, 3>{});
  for (; group - r >= 2; r += 2) f(r, std::integral_constant<int, 2>{});
  if (r < group) f(r, std::integral_constant<int, 1>{});
}

template <class S, class T>
struct Attention {
  const AttentionParams<T>& p;
  const S* k_pages;
  const S* v_pages;
  const int dim, group;
  std::vector<Item> items;
  std::unique_ptr<std::atomic<int>[]> left;  // of a head, items that are not done
  std::unique_ptr<float[]> parts;            // of R (D + 2): out, max, sum
  std::vector<int> first_part;               // of a head; -1: it has none

  explicit Attention(const AttentionParams<T>& p)
      : p(p),
        k_pages(static_cast<const S*>(p.kv.k_pages_PSD)),
        v_pages(static_cast<const S*>(p.kv.v_pages_PSD)),
        dim(p.kv.head_dim),
        group(p.group) {}

  int64_t part_size() const { return int64_t(group) * (dim + 2); }
  T* out_of(int head) const {
    const int b = head / p.num_kv_heads, g = head % p.num_kv_heads;
    return p.out_BND + b * p.out_stride[0] + int64_t(g) * group * p.out_stride[1];
  }

  void run() {
    const int64_t bytes = divide() * dim * 2 * int64_t(sizeof(S));
    std::atomic<int> next{0};
    const auto work = [&](int64_t, int64_t) {
      static thread_local State<S> state;
      for (int at = next++; at < int(items.size());) {
        const int then = next++;
        attend(state, items[at], then < int(items.size()) ? &items[then] : nullptr);
        at = then;
      }
    };
    if (bytes <= kAlone) {
      work(0, 1);
    } else {
      at::parallel_for(0, at::get_num_threads(), 1, work);
    }
  }

  // The items, and zeros for heads without entries; returns the number of entries.
  int64_t divide() {
    const int heads = p.num_requests * p.num_kv_heads;
    int64_t total = 0;
    int num_parts = 0;
    left = std::make_unique<std::atomic<int>[]>(heads);
    first_part.assign(heads, -1);
    for (int x = 0; x < heads; ++x) {
      const int64_t row = p.rows_B[x / p.num_kv_heads];
      const int n = row < 0 ? 0 : int(*p.kv.num_entries(row, x % p.num_kv_heads));
      const int num_items = (n + kItem - 1) / kItem;
      total += n;
      left[x].store(num_items, std::memory_order_relaxed);
      if (num_items > 1) first_part[x] = num_parts;
      for (int i = 0; i < num_items; ++i) {
        const int first = i * kItem;
        items.push_back({x, first, std::min(kItem, n - first), num_items > 1 ? num_parts++ : -1});
      }
      if (n) continue;
      for (int r = 0; r < group; ++r) {
        T* out = out_of(x) + r * p.out_stride[1];
        for (int c = 0; c < dim; ++c) from_float(0.0f, out[c]);
      }
    }
    parts.reset(new float[num_parts * part_size()]);
    return total;
  }

  const int32_t* table_of(int head) const {
    return p.kv.table(p.rows_B[head / p.num_kv_heads], head % p.num_kv_heads);
  }
  Octets tile_of(const Item& item, int at) const {
    return {p.kv, table_of(item.head), item.first + at, std::min(kTile, item.count - at)};
  }

  void attend(State<S>& s, const Item& item, const Item* then) {
    const int b = item.head / p.num_kv_heads, g = item.head % p.num_kv_heads;
    const T* q = p.q_BND + b * p.q_stride[0] + int64_t(g) * group * p.q_stride[1];
    for (int r = 0; r < group; ++r) {
      if constexpr (kProductsOfBf16<S>) {
        std::copy_n(q + r * p.q_stride[1], dim, s.q + r * dim);
      } else {
        arrange<S>(q + r * p.q_stride[1], s.q + r * dim, dim);
      }
      s.max[r] = -INFINITY;
      s.sum[r] = 0.0f;
    }
    std::fill_n(s.out, group * dim, 0.0f);
    Octets tile = tile_of(item, 0);
    for (int at = 0; at < item.count; at += kTile) {
      const bool is_last = at + kTile >= item.count;
      const Octets ahead = !is_last ? tile_of(item, at + kTile)
                           : then   ? tile_of(*then, 0)
                                    : Octets(p.kv, nullptr, 0, 0);
      score(s, tile, ahead);
      if constexpr (is_8bit<S>) {
        gather(p.kv.k_scales_PS, tile, ahead, s.k_scales);
        gather(p.kv.v_scales_PS, tile, ahead, s.v_scales);
      }
      for (int r = 0; r < group; ++r) weigh(s, r, tile);
      add(s, tile, ahead);
      tile = ahead;
    }
    if (item.part < 0) {
      write(s.out, s.sum, out_of(item.head));
      return;
    }
    float* part = parts.get() + item.part * part_size();
    std::copy_n(s.out, group * dim, part);
    std::copy_n(s.max, group, part + group * dim);
    std::copy_n(s.sum, group, part + group * dim + group);
    if (--left[item.head] == 0) join(s, item.head);
  }

  void score(State<S>& s, const Octets& tile, const Octets& ahead) const {
    const Octets nothing(p.kv, nullptr, 0, 0);
    by_threes(group, [&](int r, auto count) {
      dot_tile<S, decltype(count)::value>(k_pages, tile, r == 0 ? ahead : nothing, dim, s.q + r * dim,
                                          s.scores + r * kTile);
    });
  }

  // The scales of a tile's entries, in order.
  static void gather(const float* scales_PS, const Octets& tile, const Octets& ahead, float* to) {
    for (int o = 0; o * kOctet < tile.count; ++o) {
      std::copy_n(scales_PS + tile.slot[o], kOctet, to + o * kOctet);
      if (o * kOctet < ahead.count) __builtin_prefetch(scales_PS + ahead.slot[o], 0, 3);
    }
  }

  // Scores of a query become weights.
  void weigh(State<S>& s, int r, const Octets& tile) const {
    float* x = s.scores + r * kTile;
    const Vec scale(p.scale);
    const int end = (tile.count + kLanes - 1) / kLanes * kLanes;
    Vec most_of(-INFINITY);
    for (int e = 0; e < end; e += kLanes) {
      Vec score = Vec::loadu(x + e) * scale;
      if constexpr (is_8bit<S>) score = score * Vec::loadu(s.k_scales + e);
      score.store(x + e);
      if (e + kLanes <= tile.count) most_of = at::vec::maximum(most_of, score);
    }
    float most = largest(most_of);
    for (int e = tile.count / kLanes * kLanes; e < tile.count; ++e)
      most = x[e] > most || x[e] != x[e] ? x[e] : most;
    for (int e = tile.count; e < end; ++e) x[e] = -INFINITY;
    most = most <= s.max[r] ? s.max[r] : most;
    const float base = most == -INFINITY ? 0.0f : most;
    Vec sums(0.0f);
    for (int e = 0; e < end; e += kLanes) {
      Vec weight = (Vec::loadu(x + e) - Vec(base)).exp_u20();
      sums = sums + weight;
      if constexpr (is_8bit<S>) weight = weight * Vec::loadu(s.v_scales + e);
      weight.store(x + e);
    }
    s.decay[r] = std::exp(s.max[r] - base);
    // of NaN the exponential above makes a number
    s.sum[r] = base - base == 0.0f ? s.sum[r] * s.decay[r] + sum_lanes(sums) : NAN;
    s.max[r] = most;
  }

  void add(State<S>& s, const Octets& tile, const Octets& ahead) const {
    const Octets nothing(p.kv, nullptr, 0, 0);
    for (int c = 0; c < dim; c += kDimStep)
      by_threes(group, [&](int r, auto count) {
        add_values<S, decltype(count)::value>(v_pages, tile, r == 0 ? ahead : nothing, dim, c,
                                              s.scores + r * kTile, s.decay + r, s.out + r * dim);
      });
  }

  void write(const float* out_RD, const float* sum_R, T* out) const {
    for (int r = 0; r < group; ++r)
      restore<S>(out_RD + r * dim, out + r * p.out_stride[1], dim, 1.0f / sum_R[r]);
  }

  void join(State<S>& s, int head) const {
    const float* all = parts.get() + first_part[head] * part_size();
    const int64_t row = p.rows_B[head / p.num_kv_heads];
    const int count = int((*p.kv.num_entries(row, head % p.num_kv_heads) + kItem - 1) / kItem);
    std::fill_n(s.out, group * dim, 0.0f);
    for (int r = 0; r < group; ++r) {
      float most = -INFINITY;
      for (int i = 0; i < count; ++i) most = std::max(most, all[i * part_size() + group * dim + r]);
      const float base = most == -INFINITY ? 0.0f : most;
      s.sum[r] = 0.0f;
      for (int i = 0; i < count; ++i) {
        const float* part = all + i * part_size();
        const float weight = std::exp(part[group * dim + r] - base);
        s.sum[r] += weight * part[group * dim + group + r];
        for (int c = 0; c < dim; ++c) s.out[r * dim + c] += weight * part[r * dim + c];
      }
    }
    write(s.out, s.sum, out_of(head));
  }
};

template <class T>
void attend(const AttentionParams<T>& p) {
  switch (p.kv.stored) {
    case kE4m3: return Attention<e4m3, T>(p).run();
    case kInt8: return Attention<int8, T>(p).run();
    default: return Attention<T, T>(p).run();
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace dmc::cpu
