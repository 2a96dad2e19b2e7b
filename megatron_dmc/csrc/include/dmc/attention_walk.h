// What a worker of decode attention visits: the tiles of its share, from head to head (attention.h).
#pragma once

#include "dmc/paged_kv.h"
#include "dmc/schedule.h"

namespace dmc {

template <class T>
struct AttentionParams {
  PagedKV kv;
  const T* q_BND;
  T* out_BND;
  const int64_t* rows_B;
  const int32_t* plan_Y;
  float* part_C2RD;
  float* part_lse_C2R;
  int64_t q_stride[2], out_stride[2];
  int num_requests, num_kv_heads, group, num_workers;
  float scale;  // of the scores, times log2(e): they are kept in base 2
};

// Position within a worker's share of tiles.
template <class T>
struct Cursor {
  int x, tile, first, last;  // head, the unit of its tile, and those of all its tiles [first, last)
  int entries;

  DMC_DEVICE void start(const AttentionParams<T>& p, int at) {
    x = head_of_unit(p.plan_Y, p.num_requests * p.num_kv_heads, at);
    first = p.plan_Y[x] + kHeadCost;
    tile = larger(at, first);
    last = p.plan_Y[x + 1];
    enter(p);
  }
  DMC_DEVICE void enter(const AttentionParams<T>& p) {
    entries = int(*p.kv.num_entries(p.rows_B[x / p.num_kv_heads], x % p.num_kv_heads));
  }
  // Advance to the next tile, which may lie behind the share's `end`.
  DMC_DEVICE void advance(const AttentionParams<T>& p, int end) {
    ++tile;
    if (tile < last || tile >= end) return;
    do {
      ++x;
      first = last + kHeadCost;
      last = p.plan_Y[x + 1];
    } while (last < first);
    tile = first;
    enter(p);
  }
  DMC_DEVICE int first_entry() const { return (tile - first) * kTile; }
};

// Where a head's entries are.
template <class T>
struct Place {
  int last, entries;  // end of its tiles
  int32_t page;       // its first one
  const int32_t* table;

  DMC_DEVICE void load(const AttentionParams<T>& p, int x) {
    last = p.plan_Y[x + 1];
    const int64_t row = p.rows_B[x / p.num_kv_heads];
    if (row < 0) return;  // padding, without tiles
    const int head = x % p.num_kv_heads;
    entries = int(*p.kv.num_entries(row, head));
    table = p.kv.table(row, head);
    page = *table;
  }
};

// The tile to copy. Places are loaded one head ahead: at a change of heads nothing waits for row, count and page.
template <class T>
struct Fetching {
  int x, tile, first;
  Place<T> now, next;

  DMC_DEVICE void start(const AttentionParams<T>& p, const Cursor<T>& at, int end) {
    x = at.x;
    tile = at.tile;
    first = at.first;
    now.load(p, x);
    if (now.last < end) next.load(p, x + 1);
  }
  DMC_DEVICE void advance(const AttentionParams<T>& p, int end) {
    ++tile;
    if (tile < now.last || tile >= end) return;
    do {
      ++x;
      first = now.last + kHeadCost;
      now = next;
      if (now.last < end) next.load(p, x + 1);
    } while (now.last < first);
    tile = first;
  }
  DMC_DEVICE int first_entry() const { return (tile - first) * kTile; }
};

}  // namespace dmc
