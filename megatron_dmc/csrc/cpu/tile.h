// Products of queries with a tile of entries, while the next tile is fetched into the cache.
//
// Dimension letters as in dmc/attention.h.
#pragma once

#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/products.h"

namespace dmc::cpu {
inline namespace CPU_CAPABILITY {

constexpr int kTile = 64;  // entries
constexpr int kOctet = 8;  // entries that lie side by side: a page holds whole octets
constexpr int kOctets = kTile / kOctet;

// A tile's entries as octets of slots.
struct Octets {
  int64_t slot[kOctets];
  int count;  // entries

  Octets(const PagedKV& kv, const int32_t* table, int first, int count) : count(count) {
    for (int o = 0; o * kOctet < count; ++o) {
      const int entry = first + o * kOctet;
      slot[o] = kv.slot(table[kv.column(entry)], entry);
    }
  }
};

// Into the cache, E steps of channels one after the other; null: nothing. A few at a time among the products that
// do not need them: many at once wait for each other. In the order of memory: in that of the products, which take a
// part of every row at a time, it took up to a tenth longer. GCC drops calls of a function that only prefetches.
template <int E, class S>
[[gnu::always_inline]] inline void fetch(const S* next) {
  if (!next) return;
#pragma GCC unroll 8
  for (int e = 0; e < E; ++e) __builtin_prefetch(next + e * kDimStep, 0, 3);
}

// Four entries' products with each of R queries: out[r * kTile + e]; `next` are four to fetch.
template <class S, int R>
inline void dot_four(const S* k, int dim, const float* q_RD, float* out, const S* next) {
  Vec sums[R][4];
#pragma GCC unroll 3
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int e = 0; e < 4; ++e) sums[r][e] = Vec(0.0f);
  for (int c = 0; c < dim; c += kDimStep) {
    fetch<4>(next ? next + 4 * c : nullptr);
    for (int i = c; i < c + kDimStep; i += kStep) {
      add_half<0>(k + i, dim, q_RD + i, dim, sums);
      add_half<1>(k + i, dim, q_RD + i, dim, sums);
    }
  }
#pragma GCC unroll 3
  for (int r = 0; r < R; ++r)
    sum_lanes(sums[r][0], sums[r][1], sums[r][2], sums[r][3], out + r * kTile);
}

#ifdef __AVX512BF16__
// The same with queries in bfloat16, channels as they lie.
template <int R>
inline void dot_four(const bf16* k, int dim, const bf16* q_RD, float* out, const bf16* next) {
  __m512 sums[R][4];
  for (auto& row : sums)
    for (auto& sum : row) sum = _mm512_setzero_ps();
  for (int c = 0; c < dim; c += 32) {
    fetch<4>(next ? next + 4 * c : nullptr);
#pragma GCC unroll 4
    for (int e = 0; e < 4; ++e) {
      const auto key = (__m512bh)_mm512_loadu_si512(k + e * dim + c);
#pragma GCC unroll 3
      for (int r = 0; r < R; ++r) {
        const auto query = (__m512bh)_mm512_loadu_si512(q_RD + r * dim + c);
        sums[r][e] = _mm512_dpbf16_ps(sums[r][e], key, query);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    sum_lanes(sums[r][0], sums[r][1], sums[r][2], sums[r][3], out + r * kTile);
}
#endif

// A tile's products with each of R queries; the keys of `ahead` are fetched. Not inlined, here and below: among the
// code of `attend` the compiler is short of registers for the sums.
template <class S, int R, class Q>
[[gnu::noinline]] void dot_tile(const S* k_pages, const Octets& tile, const Octets& ahead, int dim, const Q* q_RD,
                                float* out) {
  for (int o = 0; o * kOctet < tile.count; ++o) {
    const S* k = k_pages + tile.slot[o] * dim;
    const S* next = o * kOctet < ahead.count ? k_pages + ahead.slot[o] * dim : nullptr;
    for (int e = 0; e < kOctet; e += 4) {
      const S* fetched = next ? next + e * dim : nullptr;
      if constexpr (std::is_same_v<Q, float>) {
        dot_four<S, R>(k + e * dim, dim, q_RD, out + o * kOctet + e, fetched);
      } else {
        dot_four<R>(k + e * dim, dim, q_RD, out + o * kOctet + e, fetched);
      }
    }
  }
}

// kDimStep channels of R outputs: out = out * decay + sum over a tile's entries of weight * value. Even and odd entries
// have sums of their own where registers are left. The values of `ahead` are fetched.
template <class S, int R>
[[gnu::noinline]] void add_values(const S* v_pages, const Octets& tile, const Octets& ahead, int dim, int channel,
                                  const float* weights, const float* decay, float* out_RD) {
  constexpr int kVectors = kDimStep / kLanes, kSets = R * kVectors > 6 ? 1 : 2;
  Vec sums[kSets][R][kVectors];
#pragma GCC unroll 3
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      sums[0][r][i] = Vec::loadu(out_RD + r * dim + channel + i * kLanes) * Vec(decay[r]);
      if (kSets == 2) sums[kSets - 1][r][i] = Vec(0.0f);
    }
  const auto add = [&](const S* v, const float* weight, Vec(&to)[R][kVectors]) {
    Vec w[R];
#pragma GCC unroll 3
    for (int r = 0; r < R; ++r) w[r] = Vec(weight[r * kTile]);
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; i += 2) {
      const Vec a = half<0>(v + i * kLanes);
#pragma GCC unroll 3
      for (int r = 0; r < R; ++r) add_product(a, w[r], to[r][i]);
      const Vec b = half<1>(v + i * kLanes);
#pragma GCC unroll 3
      for (int r = 0; r < R; ++r) add_product(b, w[r], to[r][i + 1]);
    }
  };
  for (int o = 0; o * kOctet < tile.count; ++o) {
    const S* v = v_pages + tile.slot[o] * dim + channel;
    const float* weight = weights + o * kOctet;
    const S* next = o * kOctet < ahead.count ? v_pages + ahead.slot[o] * dim + channel * kOctet : nullptr;
    if ((o + 1) * kOctet <= tile.count) {
#pragma GCC unroll 8
      for (int e = 0; e < kOctet; ++e) {
        fetch<1>(next ? next + e * kDimStep : nullptr);
        add(v + e * dim, weight + e, sums[e % kSets]);
      }
    } else {  // slots without entries hold anything
      for (int e = 0; o * kOctet + e < tile.count; ++e) add(v + e * dim, weight + e, sums[0]);
    }
  }
#pragma GCC unroll 3
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      const Vec sum = kSets == 2 ? sums[0][r][i] + sums[kSets - 1][r][i] : sums[0][r][i];
      sum.store(out_RD + r * dim + channel + i * kLanes);
    }
}

}  // namespace CPU_CAPABILITY
}  // namespace dmc::cpu
