// The division of decode attention among workers. All heads' work forms one sequence, head after head: a head with
// entries is kHeadCost units and then one unit for each of its tiles; plan[x] is the number of units before head x.
// Every worker processes the tiles of an equal share of the sequence.
#pragma once

#include "dmc/platform.h"

namespace dmc {

constexpr int kTile = 16;     // entries
constexpr int kHeadCost = 1;  // of a change of heads, in tiles; tests/support/plan_simulator.py
constexpr int kMinUnits = 4;  // fewer are not worth a worker

struct Stretches {
  int num_workers, own, longer;  // the first `longer` workers have own + 1 units

  DMC_HOST_DEVICE Stretches(int num_units, int available) {
    num_workers = larger(1, smaller(available, (num_units + kMinUnits - 1) / kMinUnits));
    own = num_units / num_workers;
    longer = num_units % num_workers;
  }
  DMC_HOST_DEVICE int begin(int worker) const { return worker * own + smaller(worker, longer); }
  DMC_HOST_DEVICE int worker_of(int unit) const {
    int in_longer = longer * (own + 1);
    return unit < in_longer ? unit / (own + 1) : longer + (unit - in_longer) / larger(own, 1);
  }
};

struct PlanParams {
  const int64_t* entries_LRG;
  const int64_t* rows_B;
  int32_t* plan_LY;
  int64_t entries_layer_stride, entries_row_stride, entries_head_stride;
  int num_layers, num_requests, num_kv_heads, ahead;
};

// One block for each layer. `shared` holds one int per warp.
DMC_DEVICE void plan_layer(const PlanParams& p, int* shared) {
  const int heads = p.num_requests * p.num_kv_heads, layer = block_index();
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const int num_warps = block_size() / kWarp;
  const int64_t* entries = p.entries_LRG + layer * p.entries_layer_stride;
  int32_t* plan = p.plan_LY + int64_t(layer) * (heads + 1);
  if (thread_index() == 0) plan[0] = 0;
  int before = 0;
  for (int start = 0; start < heads; start += block_size()) {
    const int x = start + thread_index();
    int units = 0;
    if (x < heads) {
      const int64_t row = p.rows_B[x / p.num_kv_heads];
      if (row >= 0) {
        const int64_t n = entries[row * p.entries_row_stride +
                                  (x % p.num_kv_heads) * p.entries_head_stride];
        units = int((n + p.ahead + kTile - 1) / kTile);
        if (units) units += kHeadCost;
      }
    }
    int sum = units;  // inclusive, of this warp's lanes
    for (int by = 1; by < kWarp; by *= 2) {
      const int other = shuffle_up(sum, by);
      if (lane >= by) sum += other;
    }
    sync_block();  // the sums of the previous round have been read
    if (lane == kWarp - 1) shared[warp] = sum;
    sync_block();
    int total = 0;
    for (int w = 0; w < num_warps; ++w) {
      if (w < warp) sum += shared[w];
      total += shared[w];
    }
    if (x < heads) plan[x + 1] = before + sum;
    before += total;
  }
}

// The head to which a unit belongs: the last one with plan[x] <= unit. Called by all lanes of a warp.
DMC_DEVICE int head_of_unit(const int32_t* plan, int heads, int unit) {
  const int lane = thread_index() % kWarp;
  int low = 0, width = heads;
  while (width > 1) {
    const int step = (width + kWarp - 1) / kWarp;
    const int x = low + lane * step;
    const bool before = lane * step < width && plan[x] <= unit;
    low += (count_lanes(before) - 1) * step;
    width = smaller(step, heads - low);
  }
  return low;
}

}  // namespace dmc
