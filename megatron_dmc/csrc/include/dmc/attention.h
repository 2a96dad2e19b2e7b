// Decode attention over pages and per-head lengths. docs/method.md, section 6.
//
// Dimension letters: B requests, N query heads, G key/value heads, X = B x G heads, D head dim,
// C workers, R query heads of a key/value head.
//
// A worker is one warp. It processes its share of tiles (schedule.h), from head to head, and prefetches
// the next tiles into its own part of shared memory; warps do not synchronize with one another.
// A tile is 16 entries. Products are S^T (16 entries x 8 queries) = K q^T and O^T (D x 8) += V^T P^T,
// so a group of up to 8 queries fills one product's columns, at the cost of a single query.
//
// Entries of 8 bits are widened in registers, which is exact; their scales multiply scores and weights.
// A register holds four bytes then: neighbouring channels of a key, or two channels of two values. The
// order of channels within a product is free, so widening reads even and odd bytes in place: products
// over 16 channels pair 4 j and 4 j + 2, 4 j + 1 and 4 j + 3, and row r of O^T is channel 2 r, or
// 2 (r - 8) + 1.
#pragma once

#include "dmc/attention_walk.h"

namespace dmc {

// Sizes of a worker's shared memory, pages of S. A row has one chunk of padding: 8 rows fall into 8 bank
// groups. A stage is keys, values and, for 8 bits, the scales of both.
template <class S, int kHeadDim>
struct Stages {
  static constexpr int kPerChunk = 16 / sizeof(S);  // channels of 16 bytes
  static constexpr int kChunks = kHeadDim / kPerChunk;
  static constexpr int kPitch = (kChunks + 1) * 16;
  static constexpr int kMatrix = kTile * kPitch;
  static constexpr int kScales = is_8bit<S> ? kTile * int(sizeof(float)) : 0;
  static constexpr int kStage = 2 * (kMatrix + kScales);
  static constexpr int kCount = is_8bit<S> ? (kHeadDim <= 96 ? 6 : kHeadDim <= 128 ? 5 : 4)
                                           : (kHeadDim <= 96 ? 4 : kHeadDim <= 128 ? 3 : 2);
  static constexpr int kBytes = kCount * kStage;
};

constexpr int kWarpsPerBlock = 2;

template <class T, class S, int kHeadDim, int kQueryBlocks>
struct Worker {
  using Sizes = Stages<S, kHeadDim>;
  static constexpr int kSteps = kHeadDim / 16;
  static constexpr int kLoads = kHeadDim * sizeof(S) / 32;  // of 32 bytes of 16 entries
  static constexpr int kHalf = kTile / 2;  // a page holds whole halves of tiles

  const AttentionParams<T>& p;
  char* stages;
  int lane;
  uint32_t q[kSteps][kQueryBlocks][2];
  float out[kSteps][kQueryBlocks][4];  // O^T: channels x queries
  float max[kQueryBlocks][2], sum[kQueryBlocks][2];  // of two queries; sums of this thread's entries

  DMC_DEVICE Worker(const AttentionParams<T>& p, char* stages)
      : p(p), stages(stages), lane(thread_index() % kWarp) {}

  // The query of column j of a block, as the products' layout gives it to this thread.
  DMC_DEVICE int query(int block, int j) const { return block * 8 + lane % 4 * 2 + j; }
  // The channel of this thread's i-th row of O^T.
  DMC_DEVICE int channel(int i) const {
    return is_8bit<S> ? i / 2 * 16 + lane / 4 * 2 + i % 2 : i * 8 + lane / 4;
  }

  DMC_DEVICE void fetch(const Fetching<T>& at, int stage) {
    const int entry = at.first_entry();
    // a tile of a plan made in advance may lie beyond the last entry
    const int behind = smaller(kTile, at.now.entries - entry);
    int64_t halves[2] = {0, 0};  // their first slots
    DMC_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int first = entry + h * kHalf, column = p.kv.column(first);
      if (behind > h * kHalf) {
        halves[h] = p.kv.slot(column == 0 ? at.now.page : at.now.table[column], first);
      }
    }
    char* k = stages + stage * Sizes::kStage;
    const S* k_pages = static_cast<const S*>(p.kv.k_pages_PSD);
    const S* v_pages = static_cast<const S*>(p.kv.v_pages_PSD);
    DMC_UNROLL
    for (int i = 0; i < kTile * Sizes::kChunks / kWarp; ++i) {
      const int index = lane + i * kWarp;
      const int row = index / Sizes::kChunks, chunk = index % Sizes::kChunks;
      const bool valid = row < behind;
      const int64_t half = (row < kHalf ? halves[0] : halves[1]) * kHeadDim;
      const int64_t from = valid ? half + row % kHalf * kHeadDim + chunk * Sizes::kPerChunk : 0;
      char* to = k + row * Sizes::kPitch + chunk * 16;
      copy_async(to, k_pages + from, valid);
      copy_async(to + Sizes::kMatrix, v_pages + from, valid);
    }
    if constexpr (is_8bit<S>) {
      if (lane < 8) {  // four scales each
        const int row = lane % 4 * 4;
        const bool valid = row < behind;
        const float* scales = lane < 4 ? p.kv.k_scales_PS : p.kv.v_scales_PS;
        const int64_t from = valid ? (row < kHalf ? halves[0] : halves[1]) + row % kHalf : 0;
        copy_async(k + 2 * Sizes::kMatrix + lane * 16, scales + from, valid);
      }
      sync_warp();  // the following products need all lanes converged
    }
  }

  DMC_DEVICE void begin_head(int x) {
    const int b = x / p.num_kv_heads, g = x % p.num_kv_heads;
    DMC_UNROLL
    for (int n = 0; n < kQueryBlocks; ++n) {
      const int r = n * 8 + lane / 4;
      // two pairs of channels for each product
      constexpr int kApart = is_8bit<S> ? 2 : 8;
      const T* q_D = p.q_BND + b * p.q_stride[0] + (int64_t(g) * p.group + r) * p.q_stride[1] +
                     lane % 4 * (is_8bit<S> ? 4 : 2);
      DMC_UNROLL
      for (int s = 0; s < kSteps; ++s) {
        DMC_UNROLL
        for (int h = 0; h < 2; ++h) {
          q[s][n][h] =
              r < p.group ? *reinterpret_cast<const uint32_t*>(q_D + s * 16 + h * kApart) : 0u;
        }
        if constexpr (is_8bit<S>) {
          const uint32_t first = q[s][n][0], second = q[s][n][1];
          q[s][n][0] = (first & 0xffffu) | (second << 16);
          q[s][n][1] = (first >> 16) | (second & 0xffff0000u);
        }
        DMC_UNROLL
        for (int i = 0; i < 4; ++i) out[s][n][i] = 0.0f;
      }
      DMC_UNROLL
      for (int j = 0; j < 2; ++j) {
        max[n][j] = -INFINITY;
        sum[n][j] = 0.0f;
      }
    }
  }

  DMC_DEVICE void attend(const Cursor<T>& at, int stage) {
    const char* k = stages + stage * Sizes::kStage;
    float scores[kQueryBlocks][4] = {};
    const char* k_row = k + lane % 16 * Sizes::kPitch + lane / 16 * 16;
    DMC_UNROLL
    for (int s = 0; s < kLoads; ++s) {
      uint32_t loaded[4], a[4];
      load_matrices(loaded, k_row + s * 32);
      DMC_UNROLL
      for (int h = 0; h < kSteps / kLoads; ++h) {
        if constexpr (is_8bit<S>) {
          widen(loaded[2 * h], a[0], a[2], S{}, T{});
          widen(loaded[2 * h + 1], a[1], a[3], S{}, T{});
        }
        DMC_UNROLL
        for (int n = 0; n < kQueryBlocks; ++n) {
          multiply_add(scores[n], is_8bit<S> ? a : loaded, q[s * (kSteps / kLoads) + h][n], T{});
        }
      }
    }
    const int entry = at.first_entry() + lane / 4;
    float k_scale[2] = {p.scale, p.scale}, v_scale[2];  // of this thread's two entries
    if constexpr (is_8bit<S>) {
      const float* scales = reinterpret_cast<const float*>(k + 2 * Sizes::kMatrix) + lane / 4;
      DMC_UNROLL
      for (int i = 0; i < 2; ++i) {
        k_scale[i] *= unit<S, T> * scales[8 * i];
        v_scale[i] = entry + 8 * i < at.entries ? unit<S, T> * scales[kTile + 8 * i] : 0.0f;
      }
    }
    uint32_t weights[kQueryBlocks][2];
    DMC_UNROLL
    for (int n = 0; n < kQueryBlocks; ++n) {
      float decay[2];
      DMC_UNROLL
      for (int j = 0; j < 2; ++j) {
        float& upper = scores[n][j];
        float& lower = scores[n][2 + j];
        upper = entry < at.entries ? upper * k_scale[0] : -INFINITY;
        lower = entry + 8 < at.entries ? lower * k_scale[1] : -INFINITY;
        float most = fmaxf(upper, lower);
        most = fmaxf(most, shuffle_xor(most, 4));
        most = fmaxf(most, shuffle_xor(most, 8));
        most = fmaxf(fmaxf(most, shuffle_xor(most, 16)), max[n][j]);
        const float base = most == -INFINITY ? 0.0f : most;
        decay[j] = exp2_fast(max[n][j] - base);
        upper = exp2_fast(upper - base);
        lower = exp2_fast(lower - base);
        sum[n][j] = sum[n][j] * decay[j] + upper + lower;
        max[n][j] = most;
        if constexpr (is_8bit<S>) {
          upper *= v_scale[0];
          lower *= v_scale[1];
        }
      }
      if (count_lanes(decay[0] != 1.0f || decay[1] != 1.0f)) {
        DMC_UNROLL
        for (int s = 0; s < kSteps; ++s) {
          DMC_UNROLL
          for (int i = 0; i < 4; ++i) out[s][n][i] *= decay[i % 2];
        }
      }
      weights[n][0] = transpose_matrix(pack<T>(scores[n][0], scores[n][1]));
      weights[n][1] = transpose_matrix(pack<T>(scores[n][2], scores[n][3]));
    }
    const char* v_row = k + Sizes::kMatrix + (lane % 8 + lane / 16 * 8) * Sizes::kPitch +
                        lane / 8 % 2 * 16;
    DMC_UNROLL
    for (int s = 0; s < kLoads; ++s) {
      uint32_t loaded[4], a[4];
      load_matrices_transposed(loaded, v_row + s * 32);
      DMC_UNROLL
      for (int h = 0; h < kSteps / kLoads; ++h) {
        if constexpr (is_8bit<S>) {
          widen(loaded[h], a[0], a[1], S{}, T{});
          widen(loaded[h + 2], a[2], a[3], S{}, T{});
        }
        DMC_UNROLL
        for (int n = 0; n < kQueryBlocks; ++n) {
          multiply_add(out[s * (kSteps / kLoads) + h][n], is_8bit<S> ? a : loaded, weights[n], T{});
        }
      }
    }
  }

  // Write the head's output, or this worker's part of it.
  DMC_DEVICE void end_head(int x, bool is_whole, int64_t part) {
    const int b = x / p.num_kv_heads, g = x % p.num_kv_heads;
    DMC_UNROLL
    for (int n = 0; n < kQueryBlocks; ++n) {
      DMC_UNROLL
      for (int j = 0; j < 2; ++j) {
        float total = sum[n][j];
        total += shuffle_xor(total, 4);
        total += shuffle_xor(total, 8);
        total += shuffle_xor(total, 16);
        const int r = query(n, j);
        if (r >= p.group) continue;
        const float scale = total > 0.0f ? 1.0f / total : 0.0f;
        T* out_D = p.out_BND + b * p.out_stride[0] + (int64_t(g) * p.group + r) * p.out_stride[1];
        float* part_D = p.part_C2RD + (part * p.group + r) * kHeadDim;
        if (is_whole) {
          DMC_UNROLL
          for (int i = 0; i < 2 * kSteps; ++i) {
            from_float(out[i / 2][n][i % 2 * 2 + j] * scale, out_D[channel(i)]);
          }
        } else {
          DMC_UNROLL
          for (int i = 0; i < 2 * kSteps; ++i) {
            part_D[channel(i)] = out[i / 2][n][i % 2 * 2 + j] * scale;
          }
          if (lane < 4) p.part_lse_C2R[part * p.group + r] = max[n][j] + log2_fast(total);
        }
      }
    }
  }

  DMC_DEVICE void walk(int worker, int begin, int end) {
    Cursor<T> at;
    at.start(p, begin);
    Fetching<T> ahead;
    ahead.start(p, at, end);
    DMC_UNROLL
    for (int s = 0; s < Sizes::kCount - 1; ++s) {
      if (ahead.tile < end) {
        fetch(ahead, s);
        ahead.advance(p, end);
      }
      copy_async_commit();
    }
    int stage = 0;
    while (at.tile < end) {
      if (at.tile == begin || at.tile == at.first) begin_head(at.x);
      copy_async_wait<Sizes::kCount - 2>();
      sync_warp();  // the tile is here for all lanes, and all are done with the one before
      if (ahead.tile < end) {
        fetch(ahead, stage == 0 ? Sizes::kCount - 1 : stage - 1);
        ahead.advance(p, end);
      }
      copy_async_commit();
      attend(at, stage);
      if (at.tile + 1 == at.last || at.tile + 1 == end) {
        // a worker's first head leaves part 0, another one part 1
        const bool is_whole = at.first >= begin && at.last <= end;
        end_head(at.x, is_whole, int64_t(worker) * 2 + (at.first > begin ? 1 : 0));
      }
      at.advance(p, end);
      stage = stage + 1 == Sizes::kCount ? 0 : stage + 1;
    }
  }
};

// `shared` holds kWarpsPerBlock times Stages<S, kHeadDim>::kBytes.
template <class T, class S, int kHeadDim, int kQueryBlocks>
DMC_DEVICE void attend_stretch(const AttentionParams<T>& p, char* shared) {
  const int warp = thread_index() / kWarp;
  const int worker = block_index() * kWarpsPerBlock + warp;
  const Stretches stretches(p.plan_Y[p.num_requests * p.num_kv_heads], p.num_workers);
  if (worker >= stretches.num_workers) return;
  const int begin = stretches.begin(worker), end = stretches.begin(worker + 1);
  if (begin == end) return;
  Worker<T, S, kHeadDim, kQueryBlocks> own(p, shared + warp * Stages<S, kHeadDim>::kBytes);
  own.walk(worker, begin, end);
}

// One warp for each query head: join the parts, or write zeros for a head without tiles.
template <class T, int kHeadDim>
DMC_DEVICE void join_parts(const AttentionParams<T>& p, int index) {
  const int x = index / p.group, r = index % p.group;
  const int b = x / p.num_kv_heads, g = x % p.num_kv_heads, lane = thread_index() % kWarp;
  const int first = p.plan_Y[x] + kHeadCost, last = p.plan_Y[x + 1];
  const Stretches stretches(p.plan_Y[p.num_requests * p.num_kv_heads], p.num_workers);
  const bool is_empty = last < first;
  const int begin = is_empty ? 0 : stretches.worker_of(first);
  const int end = is_empty ? 0 : stretches.worker_of(last - 1) + 1;
  if (end - begin == 1) return;  // written already
  const auto part = [&](int worker) {
    return (int64_t(worker) * 2 + (first > stretches.begin(worker) ? 1 : 0)) * p.group + r;
  };
  float most = -INFINITY;
  for (int c = begin + lane; c < end; c += kWarp) most = fmaxf(most, p.part_lse_C2R[part(c)]);
  for (int mask = 16; mask; mask /= 2) most = fmaxf(most, shuffle_xor(most, mask));
  const float base = most == -INFINITY ? 0.0f : most;
  constexpr int kOwn = kHeadDim / kWarp;
  float out[kOwn] = {}, sum = 0.0f;
  for (int c = begin; c < end; ++c) {
    const float weight = exp2_fast(p.part_lse_C2R[part(c)] - base);
    sum += weight;
    DMC_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      out[i] += weight * p.part_C2RD[part(c) * kHeadDim + lane + i * kWarp];
    }
  }
  T* out_D = p.out_BND + b * p.out_stride[0] + (int64_t(g) * p.group + r) * p.out_stride[1];
  DMC_UNROLL
  for (int i = 0; i < kOwn; ++i) {
    from_float(sum > 0.0f ? out[i] / sum : 0.0f, out_D[lane + i * kWarp]);
  }
}

}  // namespace dmc
