// Attention of prefilled chunks over pages that hold all their entries. docs/method.md, section 6.
//
// Dimension letters: T packed tokens of B chunks, N query heads, G key/value heads, D head dim, F rotary
// channels, R query heads of a key/value head, X tiles of all chunks, W tokens of a ring, Y = T + B W.
//
// A block is a tile of tokens of a chunk and one key/value head. Its rows are the tokens' queries, token
// by token; a warp owns 16 or 32 of them from their rotation to their output. The warps of a block process
// the head's entries together and prefetch the next ones into shared memory. A token whose segment is
// entry e sees its own state, which starts its softmax, and the entries below e; in a plain cache it sees
// those up to e. e never decreases from token to token: a warp masks entries from that of its first token
// on, and skips those beyond its last token's.
//
// With a delay the state and the entries that a token sees are those of the token W before it; its near tokens,
// itself and the W - 1 before it, lie raw in a matrix, each chunk's behind what its ring held, and their tiles come
// first. Where tokens are evicted there are no states: the entries up to that of the token W before it are seen.
#pragma once

#include "dmc/append.h"
#include "dmc/attention.h"

namespace dmc {

template <class T>
struct PrefillAttentionParams {
  PagedKV kv;
  const T* q_TND;  // unrotated
  T* out_TND;
  const T* own_k_TGD;  // each token's state; null for a plain cache, and where tokens are evicted
  const T* own_v_TGD;
  const T* cos_TF;  // null: no RoPE
  const T* sin_TF;
  const int32_t* entry_TG;   // index of the entry of a token's segment
  const int32_t* chunks_B3;  // row, first packed token, number of tokens
  const int32_t* tiles_X2;   // chunk, first token within it
  const T* near_k_YGD;       // with a delay
  const T* near_v_YGD;
  const int32_t* far_B2;  // tokens of each chunk that see near ones only, and the state that the next one sees
  int64_t q_stride[2], out_stride[2], cos_stride, sin_stride;
  int num_tiles, tile_tokens, num_kv_heads, group, half;
  int delay;    // W, slots of a ring; 0: decisions take effect at once
  float scale;  // of the scores, times log2(e); above 0
};

// Rows and entries of a block, and its shared memory: queries, then stages of keys and values.
template <int kHeadDim, bool kDelayed>
struct PrefillSizes {
  static constexpr bool kSmall = kDelayed && kHeadDim == 128;  // or the near tokens' registers spill
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kRowBlocks = kHeadDim <= 128 ? 2 : 1;  // of 16 rows, of a warp
  static constexpr int kOwnRows = 16 * kRowBlocks;
  static constexpr int kRows = kWarps * kOwnRows;
  static constexpr int kEntries = kHeadDim <= 64 ? 64 : kSmall ? 16 : 32;
  static constexpr int kChunks = Stages<bf16, kHeadDim>::kChunks;  // of 16 bytes, of a row
  static constexpr int kPitch = Stages<bf16, kHeadDim>::kPitch;
  static constexpr int kMatrix = kEntries * kPitch;
  static constexpr int kStages = kSmall ? 4 : kHeadDim <= 96 ? 3 : 2;  // two blocks fit an A100's multiprocessor
  static constexpr int kBytes = kRows * kPitch + kStages * 2 * kMatrix;
  static constexpr int kBlocks = 2;  // of a multiprocessor, by registers
};

// Largest number of tokens of a tile times R.
constexpr int prefill_rows(int head_dim) { return head_dim <= 128 ? 128 : 64; }

template <class T, int kHeadDim, bool kDelayed>
struct PrefillBlock {
  using Sizes = PrefillSizes<kHeadDim, kDelayed>;
  static constexpr int kSteps = kHeadDim / 16;
  static constexpr int kColumns = kHeadDim / 8;  // of 8 channels
  static constexpr int kRowBlocks = Sizes::kRowBlocks;

  const PrefillAttentionParams<T>& p;
  char* queries;  // this warp's
  char* stages;
  int lane, head, first_row;  // first_row: of this warp
  int num_tokens;             // of the tile
  int64_t start;              // its first packed token
  int lead, states, near;  // with a delay: tokens without a state; rows of token 0's state and of its chunk's ring
  int near_begin, near_tiles;  // near rows, from `near` on; tiles of them
  const int32_t* table;
  int high;                // entries that the tile's last token sees
  int warp_low, warp_high;  // entries that this warp's first and last token see; 0, 0 without tokens
  int bound[kRowBlocks][2];
  float out[kRowBlocks][kColumns][4];
  float max[kRowBlocks][2], sum[kRowBlocks][2];  // max of scores unscaled; sums of this thread's columns

  DMC_DEVICE PrefillBlock(const PrefillAttentionParams<T>& p, char* shared, int index)
      : p(p), lane(thread_index() % kWarp), head(index % p.num_kv_heads) {
    const int warp = thread_index() / kWarp;
    first_row = warp * Sizes::kOwnRows;
    queries = shared + first_row * Sizes::kPitch;
    stages = shared + Sizes::kRows * Sizes::kPitch;
    const int x = index / p.num_kv_heads, chunk = p.tiles_X2[2 * x], first = p.tiles_X2[2 * x + 1];
    num_tokens = smaller(p.tile_tokens, p.chunks_B3[3 * chunk + 2] - first);
    start = int64_t(p.chunks_B3[3 * chunk + 1]) + first;
    near_tiles = 0;
    if constexpr (kDelayed) {
      lead = p.far_B2[2 * chunk] - first;
      states = p.far_B2[2 * chunk + 1] - lead;
      near = int(start) - first + chunk * p.delay;
      near_begin = first + larger(1, lead);
      near_tiles = (near_end() - near_begin + Sizes::kEntries - 1) / Sizes::kEntries;
    }
    table = p.kv.table(p.chunks_B3[3 * chunk], head);
    high = seen(num_tokens - 1);
    warp_low = warp_high = 0;
    if (first_row / p.group < num_tokens) {
      warp_low = seen(first_row / p.group);
      warp_high = seen(last_token());
    }
  }

  DMC_DEVICE int last_token() const {  // of this warp
    return smaller((first_row + Sizes::kOwnRows - 1) / p.group, num_tokens - 1);
  }

  // This thread's row in a block of 16, h = 0 or 1, among the tile's.
  DMC_DEVICE int row(int m, int h) const { return first_row + m * 16 + h * 8 + lane / 4; }
  DMC_DEVICE int first_entry() const { return kDelayed ? p.delay : 0; }
  DMC_DEVICE bool has_state(int t) const { return !kDelayed || t >= lead; }
  DMC_DEVICE int64_t first_state() const { return kDelayed ? states : start; }
  DMC_DEVICE int64_t state_head(int t) const { return (first_state() + t) * p.num_kv_heads + head; }
  DMC_DEVICE int seen(int t) const {  // slots below this, from `first_entry` on
    if (!has_state(t)) return first_entry();
    return p.entry_TG[state_head(t)] + (p.own_k_TGD ? 0 : 1);
  }
  DMC_DEVICE int64_t query_head(int row) const { return int64_t(head) * p.group + row % p.group; }

  // The tile's first token within the chunk, read again to free its register.
  DMC_DEVICE int first() const { return p.tiles_X2[2 * (block_index() / p.num_kv_heads) + 1]; }
  DMC_DEVICE int near_end() const { return first() + num_tokens + p.delay; }
  DMC_DEVICE bool is_near(int tile) const { return kDelayed && tile < near_tiles; }
  DMC_DEVICE int begin_of(int tile) const {  // its first near row, or its first slot
    if (is_near(tile)) return near_begin + tile * Sizes::kEntries;
    return (tile - near_tiles + first_entry() / Sizes::kEntries) * Sizes::kEntries;
  }

  // Lane i: page of the tile's entries from 8 i on, which a page holds together.
  DMC_DEVICE int page_ids(int tile) const {
    const int entry = begin_of(tile) + lane * 8, column = p.kv.column(entry);
    const bool has = lane < Sizes::kEntries / 8 && entry < high && column < p.kv.table_width;
    return has ? table[column] : kNoPage;
  }

  DMC_DEVICE void fetch(int tile, int stage, int pages) const {
    char* to = stages + stage * 2 * Sizes::kMatrix;
    const T* k_pages = static_cast<const T*>(p.kv.k_pages_PSD);
    const T* v_pages = static_cast<const T*>(p.kv.v_pages_PSD);
    DMC_UNROLL
    for (int i = 0; i < Sizes::kEntries * Sizes::kChunks / Sizes::kThreads; ++i) {
      const int index = thread_index() + i * Sizes::kThreads;
      const int at = index / Sizes::kChunks, chunk = index % Sizes::kChunks;
      const int entry = begin_of(tile) + at, page = shuffle(pages, at / 8);
      char* row = to + at * Sizes::kPitch + chunk * 16;
      if (is_near(tile)) {
        const bool valid = entry < near_end();
        int64_t from = int64_t(near + entry) * p.num_kv_heads + head;
        from = valid ? from * kHeadDim + chunk * 8 : 0;
        copy_async(row, p.near_k_YGD + from, valid);
        copy_async(row + Sizes::kMatrix, p.near_v_YGD + from, valid);
        continue;
      }
      const bool valid = entry >= first_entry() && entry < high && page >= 0;
      const int64_t from = valid ? p.kv.slot(page, entry) * kHeadDim + chunk * 8 : 0;
      copy_async(row, k_pages + from, valid);
      copy_async(row + Sizes::kMatrix, v_pages + from, valid);
    }
  }

  // This warp's queries, rotated, into shared memory; zeros for rows without one.
  DMC_DEVICE void rotate_queries() const {
    using Own = Pairs<kHeadDim>;
    constexpr int kAtOnce = 4;  // rows whose loads are in flight together
    const Own own{p.half};
    const bool compress = kDelayed || p.own_k_TGD != nullptr;
    for (int i = 0; i < Sizes::kOwnRows; i += kAtOnce) {
      float q[kAtOnce][2 * Own::kOwn] = {}, cos[kAtOnce][Own::kOwn], sin[kAtOnce][Own::kOwn];
      DMC_UNROLL
      for (int j = 0; j < kAtOnce; ++j) {
        const int row = first_row + i + j;
        const int64_t t = start + smaller(row / p.group, num_tokens - 1);
        if (row / p.group < num_tokens) {
          own.load(q[j], p.q_TND + t * p.q_stride[0] + query_head(row) * p.q_stride[1], compress);
        }
        own.load_angles(cos[j], sin[j], p.cos_TF + t * p.cos_stride, p.sin_TF + t * p.sin_stride);
      }
      DMC_UNROLL
      for (int j = 0; j < kAtOnce; ++j) {
        own.turn(q[j], cos[j], sin[j], compress);
        own.store(q[j], reinterpret_cast<T*>(queries + (i + j) * Sizes::kPitch));
      }
    }
    sync_warp();
  }

  // Start each row's softmax with its token's own state, or empty.
  DMC_DEVICE void begin() {
    DMC_UNROLL
    for (int m = 0; m < kRowBlocks; ++m) {
      DMC_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int t = row(m, h) / p.group;
        const bool has_token = t < num_tokens, has_own = has_token && has_state(t) && p.own_k_TGD;
        bound[m][h] = has_token ? seen(t) : 0;
        const int64_t own = has_own ? state_head(t) * kHeadDim + lane % 4 * 2 : 0;
        const char* q_row = queries + (row(m, h) - first_row) * Sizes::kPitch + lane % 4 * 4;
        float score = 0.0f;
        DMC_UNROLL
        for (int n = 0; n < kColumns; ++n) {
          float k[2] = {}, v[2] = {}, q[2];
          if (has_own) {
            unpack(*reinterpret_cast<const uint32_t*>(p.own_k_TGD + own + n * 8), k);
            unpack(*reinterpret_cast<const uint32_t*>(p.own_v_TGD + own + n * 8), v);
          }
          unpack(*reinterpret_cast<const uint32_t*>(q_row + n * 16), q);
          score += q[0] * k[0] + q[1] * k[1];
          out[m][n][2 * h] = v[0];
          out[m][n][2 * h + 1] = v[1];
        }
        score += shuffle_xor(score, 1);
        score += shuffle_xor(score, 2);
        max[m][h] = has_own ? score : -INFINITY;
        sum[m][h] = has_own && lane % 4 == 0 ? 1.0f : 0.0f;
      }
    }
  }

  DMC_DEVICE static void unpack(uint32_t pair, float (&x)[2]) {
    x[0] = to_float(T{uint16_t(pair & 0xffffu)});
    x[1] = to_float(T{uint16_t(pair >> 16)});
  }

  DMC_DEVICE void attend(int tile, int stage) {
    constexpr int kBlocks = Sizes::kEntries / 8;
    const char* k = stages + stage * 2 * Sizes::kMatrix;
    float scores[kRowBlocks][kBlocks][4] = {};
    const char* q_row = queries + lane % 16 * Sizes::kPitch + lane / 16 * 16;
    const char* k_row =
        k + (lane % 8 + lane / 16 * 8) * Sizes::kPitch + lane / 8 % 2 * 16;
    DMC_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      uint32_t a[kRowBlocks][4];
      DMC_UNROLL
      for (int m = 0; m < kRowBlocks; ++m) {
        load_matrices(a[m], q_row + m * 16 * Sizes::kPitch + s * 32);
      }
      DMC_UNROLL
      for (int j = 0; j < kBlocks; j += 2) {
        uint32_t loaded[4];
        load_matrices(loaded, k_row + j * 8 * Sizes::kPitch + s * 32);
        multiply(scores, j, a, loaded);
      }
    }
    weigh(scores, tile);
    const char* v_row = k + Sizes::kMatrix + lane % 16 * Sizes::kPitch + lane / 16 * 16;
    DMC_UNROLL
    for (int j = 0; j < kBlocks; j += 2) {
      uint32_t a[kRowBlocks][4];
      DMC_UNROLL
      for (int m = 0; m < kRowBlocks; ++m) {
        DMC_UNROLL
        for (int i = 0; i < 4; ++i) {
          const float(&pair)[4] = scores[m][j + i / 2];
          a[m][i] = pack<T>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
        }
      }
      DMC_UNROLL
      for (int s = 0; s < kSteps; ++s) {
        uint32_t loaded[4];
        load_matrices_transposed(loaded, v_row + j * 8 * Sizes::kPitch + s * 32);
        multiply(out, 2 * s, a, loaded);
      }
    }
  }

  // c (all rows x 16 columns from 8 j on) += a b, with what was loaded of b.
  template <int kCount>
  DMC_DEVICE static void multiply(float (&c)[kRowBlocks][kCount][4], int j,
                                  const uint32_t (&a)[kRowBlocks][4], const uint32_t (&loaded)[4]) {
    const uint32_t left[2] = {loaded[0], loaded[1]}, right[2] = {loaded[2], loaded[3]};
    DMC_UNROLL
    for (int m = 0; m < kRowBlocks; ++m) {
      multiply_add(c[m][j], a[m], left, T{});
      multiply_add(c[m][j + 1], a[m], right, T{});
    }
  }

  // Turn a tile's scores into weights, and rescale earlier sums to the same base.
  template <int kBlocks>
  DMC_DEVICE void weigh(float (&scores)[kRowBlocks][kBlocks][4], int tile) {
    const int entry = begin_of(tile);
    const bool masked = is_near(tile) || entry < first_entry() || entry + kBlocks * 8 > warp_low;
    const int column = entry + lane % 4 * 2;
    DMC_UNROLL
    for (int m = 0; m < kRowBlocks; ++m) {
      float decay[2];
      DMC_UNROLL
      for (int h = 0; h < 2; ++h) {
        float most = max[m][h];
        int from = first_entry();
        unsigned seen_here = larger(bound[m][h] - from, 0);
        if (is_near(tile)) {
          const int t = row(m, h) / p.group;
          from = first() + t + 1;
          seen_here = t < num_tokens ? p.delay : 0;
        }
        DMC_UNROLL
        for (int i = 0; i < kBlocks * 2; ++i) {
          float& x = scores[m][i / 2][2 * h + i % 2];
          if (masked && unsigned(column + i / 2 * 8 + i % 2 - from) >= seen_here) x = -INFINITY;
          most = fmaxf(most, x);
        }
        most = fmaxf(most, shuffle_xor(most, 1));
        most = fmaxf(most, shuffle_xor(most, 2));
        const float base = most == -INFINITY ? 0.0f : most * p.scale;
        decay[h] = exp2_fast(max[m][h] * p.scale - base);
        max[m][h] = most;
        sum[m][h] *= decay[h];
        DMC_UNROLL
        for (int i = 0; i < kBlocks * 2; ++i) {
          float& x = scores[m][i / 2][2 * h + i % 2];
          x = exp2_fast(x * p.scale - base);
          sum[m][h] += x;
        }
      }
      if (count_lanes(decay[0] != 1.0f || decay[1] != 1.0f)) {
        DMC_UNROLL
        for (int n = 0; n < kColumns; ++n) {
          DMC_UNROLL
          for (int i = 0; i < 4; ++i) out[m][n][i] *= decay[i / 2];
        }
      }
    }
  }

  DMC_DEVICE void end() const {
    DMC_UNROLL
    for (int m = 0; m < kRowBlocks; ++m) {
      DMC_UNROLL
      for (int h = 0; h < 2; ++h) {
        float total = sum[m][h];
        total += shuffle_xor(total, 1);
        total += shuffle_xor(total, 2);
        const int t = row(m, h) / p.group;
        if (t >= num_tokens) continue;
        const float scale = 1.0f / total;  // the token has seen a key
        T* out_D = p.out_TND + (start + t) * p.out_stride[0] +
                   query_head(row(m, h)) * p.out_stride[1] + lane % 4 * 2;
        DMC_UNROLL
        for (int n = 0; n < kColumns; ++n) {
          *reinterpret_cast<uint32_t*>(out_D + n * 8) =
              pack<T>(out[m][n][2 * h] * scale, out[m][n][2 * h + 1] * scale);
        }
      }
    }
  }

  DMC_DEVICE void run() {
    constexpr int kAhead = Sizes::kStages - 1;
    int tiles = near_tiles;
    if (high > first_entry()) {
      tiles += (high + Sizes::kEntries - 1) / Sizes::kEntries - first_entry() / Sizes::kEntries;
    }
    int pages = page_ids(0);  // of the tile to fetch next
    DMC_UNROLL
    for (int s = 0; s < kAhead; ++s) {
      if (s < tiles) fetch(s, s, pages);
      copy_async_commit();
      pages = page_ids(s + 1);
    }
    rotate_queries();
    begin();
    int stage = 0;
    for (int tile = 0; tile < tiles; ++tile) {
      copy_async_wait<kAhead - 1>();
      sync_block();  // the tile is here for all warps, and all are done with the one before
      if (tile + kAhead < tiles) {
        fetch(tile + kAhead, stage == 0 ? kAhead : stage - 1, pages);
        pages = page_ids(tile + kAhead + 1);
      }
      copy_async_commit();
      bool sees = begin_of(tile) < warp_high;
      if (is_near(tile)) {
        const int begin = begin_of(tile) - first(), own = first_row / p.group + 1;
        sees = warp_high && begin <= last_token() + p.delay && begin + Sizes::kEntries > own;
      }
      if (sees) attend(tile, stage);
      stage = stage == kAhead ? 0 : stage + 1;
    }
    end();
  }
};

// One block of PrefillSizes::kThreads for each (tile, head); `shared` holds kBytes.
template <class T, int kHeadDim, bool kDelayed>
DMC_DEVICE void attend_tile(const PrefillAttentionParams<T>& p, char* shared) {
  PrefillBlock<T, kHeadDim, kDelayed>(p, shared, block_index()).run();
}

}  // namespace dmc
