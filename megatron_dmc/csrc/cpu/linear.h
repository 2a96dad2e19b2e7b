// out = x w^T (+ residual) in bfloat16 with sums in float32, for machines that do not multiply bfloat16
// themselves.
//
// Twelve sums at a time lie in registers: R rows times 12 / R outputs. A few rows widen weights in registers, so
// memory is read at two bytes a weight; many rows share a copy of twelve outputs' weights that is widened once. Each
// sum is made in one order, whatever is computed next to it.
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
constexpr int kFewRows = 16;                    // widen weights in registers
constexpr int kChannels = 512, kChannelsOfFew = 2048;  // of rows and weights that stay in the first cache
constexpr int64_t kBlock = 1 << 16;             // channels of rows that stay in the second cache
constexpr int64_t kProductsOfThread = 1 << 18;  // fewer are not worth one

// A part of a product: rows of x and w lie `stride` apart.
template <class W>
struct Factors {
  const float* x;
  const W* w;
  int64_t x_stride, w_stride;
  int num_channels;
  const W* next;  // as many weights that are needed later, in the order of memory; null: none to fetch
};

// Add R rows' products with E outputs to sums[r][e].
template <int R, int E, class W>
inline void add_products(const Factors<W>& f, Vec (&sums)[R][E]) {
  for (int c = 0; c < f.num_channels; c += kDimStep) {
    if (f.next) {
#pragma GCC unroll 12
      for (int e = 0; e < E; ++e) __builtin_prefetch(f.next + c * E + e * kDimStep, 0, 3);
    }
    for (int i = c; i < c + kDimStep; i += kStep) {
      add_half<0>(f.w + i, f.w_stride, f.x + i, f.x_stride, sums);
      add_half<1>(f.w + i, f.w_stride, f.x + i, f.x_stride, sums);
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
    const int64_t block = std::max<int64_t>(kFewRows, kBlock / dim / 4 * 4);
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
    static thread_local std::vector<float> wide, partial;
    const int count = int(std::min<int64_t>(kSums, p.num_outputs - n));
    const int64_t step = num_rows <= kFewRows ? kChannelsOfFew : kChannels;
    if (dim > step) partial.resize(size_t(num_rows) * kSums * kLanes);
    for (int64_t c = 0; c < dim; c += step) {
      const int len = int(std::min(step, dim - c));
      const bf16* w = p.w_NK + n * dim + c;
      const Sums to{n, count, c > 0, c + len == dim, partial.data()};
      if (num_rows <= kFewRows) {
        all_rows<bf16>({x_MK.data() + c, w, dim, dim, len, p.w_NK + (n + kSums) * dim + kSums * c}, to);
        continue;
      }
      wide.resize(size_t(kSums) * kChannels);
      for (int e = 0; e < count; ++e) widen(w + e * dim, wide.data() + e * kChannels, len);
      all_rows<float>({x_MK.data() + c, wide.data(), dim, kChannels, len, nullptr}, to);
    }
  }

  // What becomes of the sums of a range of channels.
  struct Sums {
    int64_t first_output;
    int num_outputs;
    bool continues, finishes;
    float* partial;  // vectors of each row's sums
  };

  template <class W>
  void all_rows(Factors<W> f, const Sums& to) const {
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

  template <int R, int E, class W>
  int some_rows(Factors<W> f, const Sums& to, int m) const {
    for (int n = 0; n < to.num_outputs; n += E) {
      Vec sums[R][E];
      const auto place = [&](int r, int e) { return to.partial + ((m + r) * kSums + n + e) * kLanes; };
      for (int r = 0; r < R; ++r)
        for (int e = 0; e < E; ++e) sums[r][e] = to.continues ? Vec::loadu(place(r, e)) : Vec(0.0f);
      add_products(f, sums);
      f.w += E * f.w_stride;
      if (f.next) f.next += E * f.num_channels;
      if (to.finishes) {
        write(&sums[0][0], R, E, first_row + m, to.first_output + n);
        continue;
      }
      for (int r = 0; r < R; ++r)
        for (int e = 0; e < E; ++e) sums[r][e].store(place(r, e));
    }
    return R;
  }

  void write(const Vec* sums, int num_rows, int num_outputs, int64_t m, int64_t n) const {
    float of[kSums];
    for (int i = 0; i < num_rows * num_outputs; i += 4)
      sum_lanes(sums[i], sums[i + 1], sums[i + 2], sums[i + 3], of + i);
    for (int r = 0; r < num_rows; ++r)
      for (int e = 0; e < num_outputs; ++e) {
        const int64_t at = (m + r) * p.num_outputs + n + e;
        from_float(of[r * num_outputs + e], p.out_MN[at]);
        if (p.residual_MN) from_float(to_float(p.out_MN[at]) + to_float(p.residual_MN[at]), p.out_MN[at]);
      }
  }
};

inline void linear(const LinearParams& p) { Linear(p).run(); }

}  // namespace CPU_CAPABILITY
}  // namespace dmc::cpu
