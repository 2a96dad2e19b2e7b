// Addresses of a layer's cache. No other file computes one.
//
// Dimension letters: P pages, S slots per page, D head dim, R rows, G key/value heads, M table width.
#pragma once

#include "dmc/stored.h"

namespace dmc {

constexpr int kNoPage = -1;

struct PagedKV {
  void* k_pages_PSD;  // of the type that `stored` names
  void* v_pages_PSD;
  float* k_scales_PS;  // null for numbers
  float* v_scales_PS;
  int32_t* table_RGM;
  int64_t* entries_RG;
  int64_t table_row_stride, table_head_stride;
  int64_t entries_row_stride, entries_head_stride;
  int page_shift, head_dim, table_width;  // a page has 1 << page_shift slots, at least 8
  Stored stored;

  DMC_HOST_DEVICE int32_t* table(int64_t row, int head) const {
    return table_RGM + row * table_row_stride + head * table_head_stride;
  }
  DMC_HOST_DEVICE int64_t* num_entries(int64_t row, int head) const {
    return entries_RG + row * entries_row_stride + head * entries_head_stride;
  }
  // Block-table column of an entry's page.
  DMC_HOST_DEVICE int column(int entry) const { return entry >> page_shift; }
  // An entry's slot; its first channel is the slot times the head dimension.
  DMC_HOST_DEVICE int64_t slot(int32_t page_id, int entry) const {
    return (int64_t(page_id) << page_shift) + (entry & ((1 << page_shift) - 1));
  }
};

}  // namespace dmc
