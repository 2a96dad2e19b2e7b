// out = x w^T in bfloat16 with sums in float32, for machines that do not multiply bfloat16 themselves: weights are
// widened in registers, so memory is read at two bytes a weight, whatever the number of rows.
//
// Dimension letters: M rows, K input features, N output features.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "cpu/attention.h"
#include "cpu/kernels.h"
#include "cpu/vectors.h"

namespace dmc::cpu {
inline namespace CPU_CAPABILITY {

constexpr int kOutputs = 4;                  // of a step: the entries of `dot_four`
constexpr int64_t kBlock = 1 << 16;          // channels of rows that stay in a core's cache
constexpr int64_t kProductsOfThread = 1 << 18;  // fewer are not worth one

// Rows `first` to `last` times outputs n to n + 3. Sums do not depend on the rows that are computed together.
inline void four_outputs(const LinearParams& p, const float* x_MK, int first, int last, int64_t n) {
  const bf16* w = p.w_NK + n * p.num_inputs;
  const int dim = int(p.num_inputs);
  float sums[3 * kTile];
  for (int m = first; m < last;) {
    const int rows = std::min(3, last - m);
    const float* x = x_MK + int64_t(m - first) * dim;
    if (rows == 3) {
      dot_four<bf16, 3>(w, dim, x, sums);
    } else if (rows == 2) {
      dot_four<bf16, 2>(w, dim, x, sums);
    } else {
      dot_four<bf16, 1>(w, dim, x, sums);
    }
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < kOutputs; ++i)
        from_float(sums[r * kTile + i], p.out_MN[(m + r) * p.num_outputs + n + i]);
    m += rows;
  }
}

inline void linear(const LinearParams& p) {
  const int64_t block = std::max<int64_t>(3, kBlock / p.num_inputs / 3 * 3);
  std::vector<float> wide(size_t(std::min(block, p.num_rows) * p.num_inputs));
  for (int64_t first = 0; first < p.num_rows; first += block) {
    const int64_t last = std::min(first + block, p.num_rows);
    for (int64_t m = first; m < last; ++m) {
      const bf16* from = p.x_MK + m * p.x_stride;
      float* to = wide.data() + (m - first) * p.num_inputs;
      for (int64_t c = 0; c < p.num_inputs; c += kStep) {
        Vec a, b;
        load(from + c, a, b);
        a.store(to + c);
        b.store(to + c + kLanes);
      }
    }
    const int64_t products = (last - first) * p.num_inputs * kOutputs;
    at::parallel_for(0, p.num_outputs / kOutputs, std::max<int64_t>(1, kProductsOfThread / products),
                     [&](int64_t begin, int64_t end) {
                       for (int64_t n = begin; n < end; ++n)
                         four_outputs(p, wide.data(), int(first), int(last), n * kOutputs);
                     });
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace dmc::cpu
