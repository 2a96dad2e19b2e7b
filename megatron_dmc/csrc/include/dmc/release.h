// Release pages: decrement each reference count, and push pages without owners onto the free stack.
//
// Dimension letters: P pages, X rows of page ids, Y ids of a row.
#pragma once

#include "dmc/paged_kv.h"

namespace dmc {

struct ReleaseParams {
  int32_t* ids_XY;  // kNoPage for none; set to it
  int64_t row_stride, row_length, num_ids;
  int32_t* free_ids_P;  // those at index state[0] and following are free
  int32_t* state;       // {taken, failed}
  int32_t* extra_owners_P;  // owners beyond the first
};

// Release one id. Threads may run this concurrently, but not while pages are allocated.
DMC_DEVICE void release_page(const ReleaseParams& p, int64_t index) {
  int32_t* in_table = p.ids_XY + index / p.row_length * p.row_stride + index % p.row_length;
  const int32_t id = *in_table;
  if (id < 0) return;
  *in_table = kNoPage;
  if (atomic_add(p.extra_owners_P + id, -1) != 0) return;  // still owned
  p.extra_owners_P[id] = 0;
  p.free_ids_P[atomic_add(p.state, -1) - 1] = id;
}

}  // namespace dmc
