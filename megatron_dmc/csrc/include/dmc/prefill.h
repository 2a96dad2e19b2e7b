// Write chunks of several requests to the cache: merge scan from the open segment on, RoPE, and entries
// into pages. docs/method.md, sections 2 and 6.
//
// Dimension letters: T packed tokens of B chunks, Y = B + 1, G key/value heads, D head dim, F rotary
// channels, R rows, U weighted tokens kept for an open segment, A = 2 D + 1, X tiles of all chunks.
//
// With hard decisions a tile depends on earlier tokens only through the sums of the segment that is open
// at its start, so tiles run in parallel: `sum_tail` of each, `carry_sums` from tile to tile of a chunk,
// `write_tile`. A merge window needs no sums: a token looks back at most W - 1 tokens, and `keep_latest`
// stores the chunk's last tokens afterwards.
#pragma once

#include "dmc/append.h"

namespace dmc {

constexpr int kTileTokens = kWarp;  // a lane for each token's decision

template <class T>
struct PrefillParams {
  PagedKV kv;
  const T* k_TGD;
  const T* v_TGD;
  T* own_k_TGD;  // each token's state; null for a plain cache
  T* own_v_TGD;
  const T* cos_TF;  // null: no RoPE
  const T* sin_TF;
  const uint8_t* is_merge_TG;  // null: plain cache, every token is an entry
  const float* omega_TG;
  const int32_t* chunks_B3;  // row, first packed token, number of tokens
  const int32_t* tiles_X2;   // chunk, first token within it
  const int32_t* starts_Y;   // tiles before each chunk
  float* segments_RGUA;
  int32_t* appends_XG;
  int32_t* base_XG;  // entries before each tile; plain: base_BG, before each chunk
  float* sums_XGA;   // of each tile's open end; after the carry, the sums at the tile's start
  int32_t* entry_TG;  // index of the entry of a token's segment
  int64_t k_stride[2], v_stride[2], cos_stride, sin_stride;
  int64_t segments_row_stride, segments_head_stride;
  int num_chunks, num_tiles, num_kv_heads, half, merge_window;
  int first_entry;  // slots of a head's ring, which hold no entries
};

// One chunk and head: addresses of its tokens, and their decisions.
template <class T>
struct ChunkHead {
  const PrefillParams<T>& p;
  int head, num_tokens;
  int64_t row, start;
  bool has_entry;  // before the chunk

  DMC_DEVICE ChunkHead(const PrefillParams<T>& p, int chunk, int head)
      : p(p), head(head), num_tokens(p.chunks_B3[3 * chunk + 2]), row(p.chunks_B3[3 * chunk]),
        start(p.chunks_B3[3 * chunk + 1]), has_entry(false) {}

  DMC_DEVICE const T* k(int t) const {
    return p.k_TGD + (start + t) * p.k_stride[0] + head * p.k_stride[1];
  }
  DMC_DEVICE const T* v(int t) const {
    return p.v_TGD + (start + t) * p.v_stride[0] + head * p.v_stride[1];
  }
  DMC_DEVICE int64_t index(int t) const { return (start + t) * p.num_kv_heads + head; }
  DMC_DEVICE float omega(int t) const { return p.omega_TG[index(t)]; }
  // If the head has no entry yet, the chunk's first token opens one.
  DMC_DEVICE bool merges(int t) const {
    return p.is_merge_TG[index(t)] != 0 && (t > 0 || has_entry);
  }
  DMC_DEVICE float* kept() const {
    return p.segments_RGUA + row * p.segments_row_stride + head * p.segments_head_stride;
  }
};

template <class T, int kHeadDim>
struct PrefillTile {
  using Own = Pairs<kHeadDim>;
  static constexpr int kChannels = 2 * Own::kOwn;
  static constexpr int kRow = 2 * kHeadDim + 1;
  using Sums = Segment<kChannels>;

  Own own;
  int lane;

  DMC_DEVICE explicit PrefillTile(const PrefillParams<T>& p)
      : own{p.half}, lane(thread_index() % kWarp) {}

  // The weighted token t.
  DMC_DEVICE void open(Sums& token, const ChunkHead<T>& at, int t) const {
    float k[kChannels], v[kChannels];
    own.load(k, at.k(t), true);
    own.load(v, at.v(t), false);
    token.open(k, v, at.omega(t));
  }
  DMC_DEVICE void load(Sums& sums, const float* from) const {
    own.load_sums(sums.k_sum, from);
    own.load_sums(sums.v_sum, from + kHeadDim);
    sums.omega_sum = from[2 * kHeadDim];
  }
  DMC_DEVICE void store(const Sums& sums, float* to) const {
    own.store_sums(sums.k_sum, to);
    own.store_sums(sums.v_sum, to + kHeadDim);
    if (lane == 0) to[2 * kHeadDim] = sums.omega_sum;
  }
  // Add the contribution of the segment's earlier tokens within a window of W to the token at t.
  DMC_DEVICE void add_window(Sums& sums, const ChunkHead<T>& at, int t) const {
    Sums older;
    const int window = at.p.merge_window;
    for (int j = t; t - j + 1 < window && (j < 0 || at.merges(j));) {
      --j;
      if (j >= 0) {
        open(older, at, j);
      } else {
        load(older, at.kept() + (window + j) * kRow);
      }
      sums.merge(older);
    }
  }
};

// One warp for each (tile, head).
template <class T, int kHeadDim>
DMC_DEVICE void sum_tail(const PrefillParams<T>& p, int index) {
  const PrefillTile<T, kHeadDim> tile(p);
  const int x = index / p.num_kv_heads, chunk = p.tiles_X2[2 * x], first = p.tiles_X2[2 * x + 1];
  ChunkHead<T> at(p, chunk, index % p.num_kv_heads);
  at.has_entry = *p.kv.num_entries(at.row, at.head) > p.first_entry;
  const int size = smaller(kTileTokens, at.num_tokens - first);
  const int appends = tile.lane < size && !at.merges(first + tile.lane);
  const int total = count_lanes(appends != 0);
  if (tile.lane == 0) p.appends_XG[index] = total;
  if (p.merge_window) return;
  typename PrefillTile<T, kHeadDim>::Sums sums, token;
  tile.open(sums, at, first + size - 1);
  for (int i = size - 1; i > 0 && !shuffle(appends, i); --i) {
    tile.open(token, at, first + i - 1);
    sums.merge(token);
  }
  tile.store(sums, p.sums_XGA + int64_t(index) * tile.kRow);
}

constexpr int kCarryThreads = 128;

// One block for each (chunk, head) and kCarryThreads components of an accumulator.
template <class T, int kHeadDim>
DMC_DEVICE void carry_sums(const PrefillParams<T>& p) {
  constexpr int kRow = 2 * kHeadDim + 1;
  const int blocks = p.merge_window ? 1 : (kRow + kCarryThreads - 1) / kCarryThreads;
  const int chunk = block_index() / blocks / p.num_kv_heads;
  const ChunkHead<T> at(p, chunk, block_index() / blocks % p.num_kv_heads);
  const int a = block_index() % blocks * kCarryThreads + thread_index();
  if (a >= kRow || (p.merge_window && a > 0)) return;
  int entries = larger(int(*p.kv.num_entries(at.row, at.head)), p.first_entry);
  float* open = at.kept() + a;
  float state = entries > p.first_entry && !p.merge_window ? *open : 0.0f;
  const int end = p.starts_Y[chunk + 1];
  constexpr int kAhead = 8;  // independent loads in flight
  for (int begin = p.starts_Y[chunk]; begin < end; begin += kAhead) {
    float tails[kAhead];
    int appends[kAhead];
    DMC_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      const int64_t x = int64_t(smaller(begin + i, end - 1)) * p.num_kv_heads + at.head;
      appends[i] = p.appends_XG[x];
      tails[i] = p.merge_window ? 0.0f : p.sums_XGA[x * kRow + a];
    }
    DMC_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      if (begin + i >= end) continue;
      const int64_t x = int64_t(begin + i) * p.num_kv_heads + at.head;
      if (a == 0) p.base_XG[x] = entries;
      entries += appends[i];
      if (p.merge_window) continue;
      p.sums_XGA[x * kRow + a] = state;
      state = appends[i] ? tails[i] : state + tails[i];
    }
  }
  if (!p.merge_window) *open = state;
}

// One warp for each (tile, head).
template <class T, int kHeadDim>
DMC_DEVICE void write_tile(const PrefillParams<T>& p, int index) {
  using Tile = PrefillTile<T, kHeadDim>;
  const Tile tile(p);
  const auto& own = tile.own;
  const int x = index / p.num_kv_heads, chunk = p.tiles_X2[2 * x], first = p.tiles_X2[2 * x + 1];
  ChunkHead<T> at(p, chunk, index % p.num_kv_heads);
  const bool compress = p.is_merge_TG != nullptr;
  const int size = smaller(kTileTokens, at.num_tokens - first);
  const int mine = first + tile.lane;
  int entry, appends = 1, ends = 1;  // the last two of this lane's token
  if (compress) {
    at.has_entry = p.base_XG[p.starts_Y[chunk] * p.num_kv_heads + at.head] > p.first_entry;
    entry = p.base_XG[index] - 1;
    appends = tile.lane < size && !at.merges(mine);
    ends = mine + 1 >= at.num_tokens || !at.merges(mine + 1);
  } else {
    entry = p.base_XG[chunk * p.num_kv_heads + at.head] + first - 1;
  }
  typename Tile::Sums segment, token;
  if (compress && !p.merge_window) tile.load(segment, p.sums_XGA + int64_t(index) * tile.kRow);
  const int32_t* table = p.kv.table(at.row, at.head);
  for (int i = 0; i < size; ++i) {
    const int t = first + i;
    float k[Tile::kChannels], v[Tile::kChannels];
    const bool opens = shuffle(appends, i) != 0;
    entry += opens;
    if (compress) {
      tile.open(token, at, t);
      if (p.merge_window) {
        segment = token;
        tile.add_window(segment, at, t);
      } else if (opens) {
        segment = token;
      } else {
        segment.merge(token);
      }
      segment.emit(k, v);
    } else {
      own.load(k, at.k(t), false);
      own.load(v, at.v(t), false);
    }
    float cos[Tile::Own::kOwn], sin[Tile::Own::kOwn];
    own.load_angles(cos, sin, p.cos_TF + (at.start + t) * p.cos_stride,
                    p.sin_TF + (at.start + t) * p.sin_stride);
    own.turn(k, cos, sin, compress);
    if (compress) {
      own.store(k, p.own_k_TGD + at.index(t) * kHeadDim);
      own.store(v, p.own_v_TGD + at.index(t) * kHeadDim);
    }
    if (tile.lane == 0) p.entry_TG[at.index(t)] = entry;
    if (!shuffle(ends, i)) continue;
    const int column = p.kv.column(entry);
    const int page_id = column < p.kv.table_width ? table[column] : kNoPage;
    if (page_id < 0) continue;
    const int64_t slot = p.kv.slot(page_id, entry);
    own.template store_entry<T>(k, p.kv.k_pages_PSD, p.kv.k_scales_PS, slot);
    own.template store_entry<T>(v, p.kv.v_pages_PSD, p.kv.v_scales_PS, slot);
  }
  if (first + size == at.num_tokens && tile.lane == 0) {
    *p.kv.num_entries(at.row, at.head) = entry + 1;
  }
}

// One warp for each (chunk, head), with a merge window, after all tiles are written.
template <class T, int kHeadDim>
DMC_DEVICE void keep_latest(const PrefillParams<T>& p, int index) {
  using Tile = PrefillTile<T, kHeadDim>;
  const Tile tile(p);
  const int chunk = index / p.num_kv_heads, window = p.merge_window;
  ChunkHead<T> at(p, chunk, index % p.num_kv_heads);
  at.has_entry = p.base_XG[p.starts_Y[chunk] * p.num_kv_heads + at.head] > p.first_entry;
  int num_open = 1;  // kept tokens of the open segment
  for (int t = at.num_tokens - 1; num_open < window && (t < 0 || at.merges(t)); --t) ++num_open;
  for (int u = 0; u < window; ++u) {
    const int t = at.num_tokens - window + u;
    typename Tile::Sums sums;
    if (window - u > num_open) {
      const float zero[Tile::kChannels] = {};
      sums.open(zero, zero, 0.0f);
    } else if (t >= 0) {
      tile.open(sums, at, t);
    } else {
      tile.load(sums, at.kept() + (window + t) * tile.kRow);
    }
    sync_warp();  // a lane may still read this row for an earlier one
    tile.store(sums, at.kept() + u * tile.kRow);
  }
}

}  // namespace dmc
