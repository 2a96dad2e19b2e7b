// out = x w^T (+ residual) with sums in float32: in bfloat16 for machines that do not multiply bfloat16 themselves,
// in float32 for few rows, where the time is that of reading the weights.
//
// Twelve sums at a time lie in registers: R rows times 12 / R outputs. Weights in bfloat16 are widened in registers, so
// memory is read at two bytes a weight. Each sum is made in one order, whatever is computed next to it.
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
constexpr int kLine = 64;                       // bytes that are fetched at once

// A part of a product.
template <class T>
struct Factors {
  const float* x;
  const T* w;
  int64_t x_stride, w_stride;
  int num_channels;
  const T* next;  // as many weights that are needed later, in the order of memory; null: none to fetch
};

// Add R rows' products with E outputs to sums[r][e].
template <int R, int E, class T>
inline void add_products(const Factors<T>& f, Vec (&sums)[R][E]) {
  constexpr int kLines = E * kDimStep * int(sizeof(T)) / kLine;
  for (int c = 0; c < f.num_channels; c += kDimStep) {
    if (f.next) {
      const char* next = reinterpret_cast<const char*>(f.next + c * E);
#pragma GCC unroll 24
      for (int i = 0; i < kLines; ++i) __builtin_prefetch(next + i * kLine, 0, 3);
    }
    for (int i = c; i < c + kDimStep; i += kStep) {
      add_half<0>(f.w + i, f.w_stride, f.x + i, f.x_stride, sums);
      add_half<1>(f.w + i, f.w_stride, f.x + i, f.x_stride, sums);
    }
  }
}

template <class T>
struct Linear {
  const LinearParams<T>& p;
  const int64_t dim;
  std::vector<float> widened_MK;  // a block of rows in float32, channels as `load` orders them
  const float* x_MK = nullptr;    // that, or the rows themselves
  int64_t x_stride = 0, first_row = 0;
  int num_rows = 0;

  explicit Linear(const LinearParams<T>& p) : p(p), dim(p.num_inputs) {}

  void run() {
    const int64_t block = std::max<int64_t>(4, kBlock / dim / 4 * 4);
    const int64_t groups = (p.num_outputs + kSums - 1) / kSums;
    for (; first_row < p.num_rows; first_row += num_rows) {
      num_rows = int(std::min(block, p.num_rows - first_row));
      take(p.x_MK + first_row * p.x_stride);
      const int64_t products = num_rows * dim * kSums;
      at::parallel_for(0, groups, std::max<int64_t>(1, kProductsOfThread / products),
                       [&](int64_t begin, int64_t end) {
                         for (int64_t n = begin * kSums; n < std::min(end * kSums, p.num_outputs); n += kSums)
                           outputs(n);
                       });
    }
  }

  // The block's rows.
  void take(const float* x) {
    x_MK = x;
    x_stride = p.x_stride;
  }
  void take(const bf16* x) {
    widened_MK.resize(size_t(num_rows) * dim);
    for (int m = 0; m < num_rows; ++m) arrange<bf16>(x + m * p.x_stride, widened_MK.data() + m * dim, int(dim));
    x_MK = widened_MK.data();
    x_stride = dim;
  }

  // All rows' outputs n to n + 12, or to the last one.
  void outputs(int64_t n) const {
    static thread_local std::vector<float> partial;
    const int count = int(std::min<int64_t>(kSums, p.num_outputs - n));
    if (dim > kChannels) partial.resize(size_t(num_rows) * kSums * kLanes);
    for (int64_t c = 0; c < dim; c += kChannels) {
      const int len = int(std::min<int64_t>(kChannels, dim - c));
      all_rows({x_MK + c, p.w_NK + n * dim + c, x_stride, dim, len, p.w_NK + (n + kSums) * dim + kSums * c},
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

  void all_rows(Factors<T> f, const Sums& to) const {
    const float* x = f.x;
    for (int m = 0; m < num_rows;) {
      f.x = x + m * x_stride;
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
  int some_rows(Factors<T> f, const Sums& to, int m) const {
    alignas(64) float of[R * kSums];  // in the order in which they are computed
    if (R == 1) std::fill_n(of, kSums, 0.0f);
    const int count = R == 1 ? to.num_outputs : kSums;  // the compiler knows it except for one row
    for (int n = 0; n < count; n += E) {
      Vec sums[R][E];
      const auto place = [&](int r, int e) { return to.partial + ((m + r) * kSums + n + e) * kLanes; };
      for (int r = 0; r < R; ++r)
        for (int e = 0; e < E; ++e) sums[r][e] = to.continues ? Vec::loadu(place(r, e)) : Vec(0.0f);
      add_products(f, sums);
      f.w += E * f.w_stride;
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
    T rounded_sums[R * kSums];
    round_all(of, rounded_sums);
    for (int r = 0; r < R; ++r) {
      const int64_t at = (m + r) * p.num_outputs + first_output;
      for (int n = 0; n < count; ++n) p.out_MN[at + n] = rounded_sums[n / E * E * R + r * E + n % E];
      if (!p.residual_MN) continue;
      for (int n = 0; n < count; ++n)
        from_float(to_float(p.out_MN[at + n]) + to_float(p.residual_MN[at + n]), p.out_MN[at + n]);
    }
  }

  template <int N>
  static void round_all(const float* from, float (&to)[N]) {
    std::copy_n(from, N, to);
  }
  template <int N>
  static void round_all(const float* from, bf16 (&to)[N]) {
    constexpr int kWhole = N / kLanes * kLanes;
    int32_t bits[N];
    for (int i = 0; i < kWhole; i += kLanes) downwards(rounded(Vec::loadu(from + i))).store(bits + i);
    for (int i = 0; i < kWhole; ++i) to[i].bits = uint16_t(bits[i]);
    for (int i = kWhole; i < N; ++i) from_float(from[i], to[i]);
  }
};

template <class T>
void linear(const LinearParams<T>& p) {
  Linear<T>(p).run();
}

}  // namespace CPU_CAPABILITY
}  // namespace dmc::cpu
