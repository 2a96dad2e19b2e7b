// Addresses of a layer's cache. Nobody else computes one.
//
// Dimension letters: P pages, S slots per page, D head dim, R rows, G key/value heads, M table width.
#pragma once

#include "dmc/platform.h"

namespace dmc {

constexpr int kNoPage = -1;

template <class T>
struct PagedKV {
  T* k_pages_PSD;
  T* v_pages_PSD;
  int32_t* table_RGM;
  int64_t* entries_RG;
  int64_t table_row_stride, table_head_stride;
  int64_t entries_row_stride, entries_head_stride;
  int page_shift, head_dim, table_width;  // a page has 1 << page_shift slots, at least 8

  DMC_HOST_DEVICE int32_t* table(int64_t row, int head) const {
    return table_RGM + row * table_row_stride + head * table_head_stride;
  }
  DMC_HOST_DEVICE int64_t* num_entries(int64_t row, int head) const {
    return entries_RG + row * entries_row_stride + head * entries_head_stride;
  }
  // Column of the block table that holds an entry's page.
  DMC_HOST_DEVICE int column(int entry) const { return entry >> page_shift; }
  // Offset of an entry's first channel, in keys and values alike.
  DMC_HOST_DEVICE int64_t offset(int32_t page_id, int entry) const {
    const int slot = entry & ((1 << page_shift) - 1);
    return ((int64_t(page_id) << page_shift) + slot) * head_dim;
  }
};

}  // namespace dmc
