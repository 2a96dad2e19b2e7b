// out = x w^T (+ residual) in bfloat16 with sums in float32, for machines that do not multiply bfloat16
// themselves.
//
// Twelve sums at a time lie in registers: R rows times 12 / R outputs. Weights are widened in registers, so memory
// is read at two bytes a weight. Each sum is made in one order, whatever is computed next to it.
//
// Dimension letters: M rows, K input features, N output features.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/products.h"

namespace dmc::cpu {
inline namespace CPU_CAPABILITY {

constexpr int kSums = 12;
constexpr int kChannels = 2048;                 // of twelve outputs' weights that stay in the first caches
constexpr int64_t kBlock = 1 << 16;             // channels of rows that stay in the second cache
constexpr int64_t kProductsOfThread = 1 << 18;  // fewer are not worth one

// A part of a product: rows of x and w lie `stride` apart.
struct Factors {
  const float* x;
  const bf16* w;
  int64_t stride;
  int num_channels;
  const bf16* next;  // as many weights that are needed later, in the order of memory; null: none to fetch
};

// Add R rows' products with E outputs to sums[r][e].
template <int R, int E>
inline void add_products(const Factors& f, Vec (&sums)[R][E]) {
  for (int c = 0; c < f.num_channels; c += kDimStep) {
    if (f.next) {
#pragma GCC unroll 12
      for (int e = 0; e < E; ++e) __builtin_prefetch(f.next + c * E + e * kDimStep, 0, 3);
    }
    for (int i = c; i < c + kDimStep; i += kStep) {
      add_half<0>(f.w + i, f.stride, f.x + i, f.stride, sums);
      add_half<1>(f.w + i, f.stride, f.x + i, f.stride, sums);
    }
  }
}

struct Linear {
  const LinearParams& p;
  const int64_t dim;
  std::vector<float> x_MK;  // a block of rows in float32, channels as `load` orders them
  int64_t first_row = 0;
  int num_rows = 0;

  explicit Linear(const LinearParams& p) : p(p), dim(p.num_inputs) {}

  void run() {
    const int64_t block = std::max<int64_t>(4, kBlock / dim / 4 * 4);
    x_MK.resize(size_t(std::min(block, p.num_rows) * dim));
    const int64_t groups = (p.num_outputs + kSums - 1) / kSums;
    for (; first_row < p.num_rows; first_row += num_rows) {
      num_rows = int(std::min(block, p.num_rows - first_row));
      for (int m = 0; m < num_rows; ++m)
        widen(p.x_MK + (first_row + m) * p.x_stride, x_MK.data() + m * dim, dim);
      const int64_t products = num_rows * dim * kSums;
      at::parallel_for(0, groups, std::max<int64_t>(1, kProductsOfThread / products),
                       [&](int64_t begin, int64_t end) {
                         for (int64_t n = begin * kSums; n < std::min(end * kSums, p.num_outputs); n += kSums)
                           outputs(n);
                       });
    }
  }

  static void widen(const bf16* from, float* to, int64_t count) {
    for (int64_t c = 0; c < count; c += kStep) {
      Vec a, b;
      load(from + c, a, b);
      a.store(to + c);
      b.store(to + c + kLanes);
    }
  }

  // All rows' outputs n to n + 12, or to the last one.
  void outputs(int64_t n) const {
    static thread_local std::vector<float> partial;
    const int count = int(std::min<int64_t>(kSums, p.num_outputs - n));
    if (dim > kChannels) partial.resize(size_t(num_rows) * kSums * kLanes);
    for (int64_t c = 0; c < dim; c += kChannels) {
      const int len = int(std::min<int64_t>(kChannels, dim - c));
      all_rows({x_MK.data() + c, p.w_NK + n * dim + c, dim, len, p.w_NK + (n + kSums) * dim + kSums * c},
               {n, count, c > 0, c + len == dim, partial.data()});
    }
  }

  // What becomes of the sums of a range of channels.
  struct Sums {
    int64_t first_output;
    int num_outputs;
    bool continues, finishes;
    float* partial;  // vectors of each row's sums
  };

  void all_rows(Factors f, const Sums& to) const {
    const float* x = f.x;
    for (int m = 0; m < num_rows;) {
      f.x = x + m * dim;
      const int left = to.num_outputs < kSums ? 1 : num_rows - m;
      if (left >= 4) {
        m += some_rows<4, 3>(f, to, m);
      } else if (left == 3) {
        m += some_rows<3, 4>(f, to, m);
      } else if (left == 2) {
        m += some_rows<2, 6>(f, to, m);
      } else if (to.num_outputs == kSums) {
        m += some_rows<1, 12>(f, to, m);
      } else {
        m += some_rows<1, 4>(f, to, m);
      }
      f.next = nullptr;  // they are on their way
    }
  }

  template <int R, int E>
  int some_rows(Factors f, const Sums& to, int m) const {
    alignas(64) float of[R * kSums];  // in the order in which they are computed
    if (R == 1) std::fill_n(of, kSums, 0.0f);
    const int count = R == 1 ? to.num_outputs : kSums;  // the compiler knows it except for one row
    for (int n = 0; n < count; n += E) {
      Vec sums[R][E];
      const auto place = [&](int r, int e) { return to.partial + ((m + r) * kSums + n + e) * kLanes; };
      for (int r = 0; r < R; ++r)
        for (int e = 0; e < E; ++e) sums[r][e] = to.continues ? Vec::loadu(place(r, e)) : Vec(0.0f);
      add_products(f, sums);
      f.w += E * f.stride;
      if (f.next) f.next += E * f.num_channels;
      if (to.finishes) {
        const Vec* all = &sums[0][0];
        for (int i = 0; i < R * E; i += 4)
          sum_lanes(all[i], all[i + 1], all[i + 2], all[i + 3], of + n * R + i);
        continue;
      }
      for (int r = 0; r < R; ++r)
        for (int e = 0; e < E; ++e) sums[r][e].store(place(r, e));
    }
    if (to.finishes) write<R, E>(of, first_row + m, to.first_output, count);
    return R;
  }

  // Rounded; with a residual that is added to the rounded sum.
  template <int R, int E>
  void write(const float* of, int64_t m, int64_t first_output, int num_outputs) const {
    const int count = R == 1 ? num_outputs : kSums;
    constexpr int kCount = R * kSums, kWhole = kCount / kLanes * kLanes;
    int32_t bits[kCount];
    for (int i = 0; i < kWhole; i += kLanes) downwards(rounded(Vec::loadu(of + i))).store(bits + i);
    bf16 last;
    for (int i = kWhole; i < kCount; ++i) {
      from_float(of[i], last);
      bits[i] = last.bits;
    }
    for (int r = 0; r < R; ++r) {
      const int64_t at = (m + r) * p.num_outputs + first_output;
      for (int n = 0; n < count; ++n)
        p.out_MN[at + n].bits = uint16_t(bits[n / E * E * R + r * E + n % E]);
      if (!p.residual_MN) continue;
      for (int n = 0; n < count; ++n)
        from_float(to_float(p.out_MN[at + n]) + to_float(p.residual_MN[at + n]), p.out_MN[at + n]);
    }
  }
};

inline void linear(const LinearParams& p) { Linear(p).run(); }

}  // namespace CPU_CAPABILITY
}  // namespace dmc::cpu
