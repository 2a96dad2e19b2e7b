// The merge of training, docs/method.md, section 2, one walk over the tokens for each sequence and KV head:
//
//   y_t = A_t / z_t      A_t = alpha_t A_{t-1} + omega_t x_t      z_t = alpha_t z_{t-1} + omega_t
//
// over keys and values x, and its gradients; with a window W the sums are over the latest W tokens. Sums are float32.
//
// Local letters: E = 2 D channels, a token's key and then its value, in the order in which `load` gives them.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/products.h"
#include "cpu/token_rows.h"

namespace dmc::cpu {
inline namespace CPU_CAPABILITY {

constexpr int kBlockOfSums = 2 * kDimStep;  // of channels; E is a multiple
constexpr int kTokensAhead = 8;

// One sequence's rows of a KV head. They lie far apart: without fetching ahead every token waits for memory.
template <class T>
struct TokenRows {
  const T* first;
  int64_t stride, num_tokens;
  int dim;

  const T* operator[](int64_t t) const { return first + t * stride; }
  [[gnu::always_inline]] void fetch(int64_t t) const {
    if (t >= 0 && t < num_tokens) fetch_row(first + t * stride, dim);
  }
};

// visit(c, a, b) for each step of channels, the key's and then the value's: c in E, and the two vectors of `load`.
template <class T, class Visit>
inline void for_channels(const T* k, const T* v, int dim, Visit visit) {
  Vec a, b;
  for (int c = 0; c < dim; c += kStep) {
    load(k + c, a, b);
    visit(c, a, b);
  }
  for (int c = 0; c < dim; c += kStep) {
    load(v + c, a, b);
    visit(dim + c, a, b);
  }
}

template <class T>
inline void store_channels(const float* x_E, T* k, T* v, int dim, float scale) {
  for (int c = 0; c < dim; c += kStep) {
    store(k + c, Vec::loadu(x_E + c) * Vec(scale), Vec::loadu(x_E + c + kLanes) * Vec(scale));
    const float* value = x_E + dim + c;
    store(v + c, Vec::loadu(value) * Vec(scale), Vec::loadu(value + kLanes) * Vec(scale));
  }
}

template <class T>
class MergeOfHead {
 public:
  MergeOfHead(const MergeParams<T>& p, int64_t b, int64_t g)
      : p_(p), dim_(int(p.dim)), dense_((b * p.num_kv_heads + g) * p.dim), gate_(b * p.num_kv_heads + g),
        k_{p.k_TBGD + b * p.k_stride[1] + g * p.k_stride[2], p.k_stride[0], p.num_tokens, int(p.dim)},
        v_{p.v_TBGD + b * p.v_stride[1] + g * p.v_stride[2], p.v_stride[0], p.num_tokens, int(p.dim)},
        grad_k_{p.grad_k_TBGD + b * p.grad_k_stride[1] + g * p.grad_k_stride[2], p.grad_k_stride[0], p.num_tokens, int(p.dim)},
        grad_v_{p.grad_v_TBGD + b * p.grad_v_stride[1] + g * p.grad_v_stride[2], p.grad_v_stride[0], p.num_tokens, int(p.dim)},
        alpha_T_(p.num_tokens), omega_T_(p.num_tokens) {
    for (int64_t t = 0; t < p.num_tokens; ++t) {
      alpha_T_[t] = t ? p.alpha_TBG[row(t) + gate_] : 0.0f;  // nothing stands before token 0
      omega_T_[t] = p.omega_TBG[row(t) + gate_];
    }
  }

  void forward() { p_.window ? forward_windowed() : forward_unlimited(); }
  void backward() { p_.window ? backward_windowed() : backward_unlimited(); }

 private:
  int64_t row(int64_t t) const { return t * p_.batch * p_.num_kv_heads; }
  T* out_k(int64_t t) const { return p_.out_k_TBGD + row(t) * dim_ + dense_; }
  T* out_v(int64_t t) const { return p_.out_v_TBGD + row(t) * dim_ + dense_; }

  template <class... Rows>
  [[gnu::always_inline]] static void fetch(int64_t t, const Rows&... rows) {
    (rows.fetch(t), ...);
  }

  // A_t from A_{t-1}; z_t.
  float advance(int64_t t, float z, const float* before_E, float* sums_E) const {
    const float decay = alpha_T_[t], weight = omega_T_[t];
    fetch(t + kTokensAhead, k_, v_);
    for_channels(k_[t], v_[t], dim_, [&](int c, const Vec& a, const Vec& b) {
      (Vec::loadu(before_E + c) * Vec(decay) + a * Vec(weight)).store(sums_E + c);
      (Vec::loadu(before_E + c + kLanes) * Vec(decay) + b * Vec(weight)).store(sums_E + c + kLanes);
    });
    return decay * z + weight;
  }

  void forward_unlimited() {
    std::vector<float> sums_E(2 * dim_);
    float z = 0.0f;
    for (int64_t t = 0; t < p_.num_tokens; ++t) {
      z = advance(t, z, sums_E.data(), sums_E.data());
      store_channels(sums_E.data(), out_k(t), out_v(t), dim_, 1.0f / z);
    }
  }

  // With g_t = dy_t / z_t and the later tokens' part of it, backwards: G_t = g_t + alpha_{t+1} G_{t+1}, and the same of
  // z with -(dy_t . y_t) / z_t.
  void backward_unlimited() {
    const int size = 2 * dim_;
    std::vector<float> sums_TE((p_.num_tokens + 1) * size), z_T(p_.num_tokens + 1), of_sums_E(size);
    float* sums = sums_TE.data() + size;  // row -1 is zero
    float* z = z_T.data() + 1;
    for (int64_t t = 0; t < p_.num_tokens; ++t) z[t] = advance(t, z[t - 1], sums + (t - 1) * size, sums + t * size);
    float of_z = 0.0f, decay = 0.0f;
    for (int64_t t = p_.num_tokens - 1; t >= 0; --t) {
      const float scale = 1.0f / z[t], weight = omega_T_[t];
      const float *now = sums + t * size, *before = now - size;
      Vec along_y(0.0f), along_before(0.0f), along_x(0.0f);
      fetch(t - kTokensAhead, k_, v_, grad_k_, grad_v_);
      float* of_sums = of_sums_E.data();
      for_channels(grad_k_[t], grad_v_[t], dim_, [&](int c, const Vec& a, const Vec& b) {
        for (int half = 0; half < 2; ++half, c += kLanes) {
          const Vec grad = (half ? b : a) * Vec(scale);
          along_y = at::vec::fmadd(grad, Vec::loadu(now + c), along_y);
          const Vec sum = at::vec::fmadd(Vec::loadu(of_sums + c), Vec(decay), grad);
          sum.store(of_sums + c);
          along_before = at::vec::fmadd(sum, Vec::loadu(before + c), along_before);
        }
      });
      for_channels(k_[t], v_[t], dim_, [&](int c, const Vec& a, const Vec& b) {
        along_x = at::vec::fmadd(a, Vec::loadu(of_sums + c), along_x);
        along_x = at::vec::fmadd(b, Vec::loadu(of_sums + c + kLanes), along_x);
      });
      of_z = of_z * decay - sum_lanes(along_y) * scale;
      store_channels(of_sums, out_k(t), out_v(t), dim_, weight);
      p_.grad_omega_TBG[row(t) + gate_] = sum_lanes(along_x) + of_z;
      p_.grad_alpha_TBG[row(t) + gate_] = t ? sum_lanes(along_before) + of_z * z[t - 1] : 0.0f;
      decay = alpha_T_[t];
    }
  }

  // decay_n and weight_n of the tokens t - n of t's window: the product of alpha over (t - n, t], and omega times it.
  // Returns the weights' sum.
  float weigh(int64_t t, int64_t count, float* decay_n, float* weight_n) const {
    float decay = 1.0f, z = 0.0f;
    for (int64_t n = 0; n < count; ++n) {
      decay_n[n] = decay;
      weight_n[n] = decay * omega_T_[t - n];
      z += weight_n[n];
      decay *= alpha_T_[t - n];
    }
    return z;
  }

  // The window's rows, one after the other, as float32.
  void keep(int64_t t, float* x_WE) const {
    float* kept = x_WE + t % p_.window * 2 * dim_;
    fetch(t + kTokensAhead, k_, v_);
    load_row(k_[t], dim_, kept);
    load_row(v_[t], dim_, kept + dim_);
  }

  void forward_windowed() {
    const int size = 2 * dim_;
    const int64_t window = p_.window;
    std::vector<float> decay_n(window), weight_n(window), x_WE(window * size), sum_E(size);
    for (int64_t t = 0; t < p_.num_tokens; ++t) {
      keep(t, x_WE.data());
      int64_t count = std::min(window, t + 1);
      const float z = weigh(t, count, decay_n.data(), weight_n.data());
      while (decay_n[count - 1] == 0.0f) --count;  // before the segment
      for (int c = 0; c < size; c += kBlockOfSums) {
        Vec sums[kBlockOfSums / kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kBlockOfSums / kLanes; ++i) sums[i] = Vec(0.0f);
        int64_t place = t % window;
        for (int64_t n = 0; n < count; ++n) {
          const float* x = x_WE.data() + place * size + c;
          const Vec weight(weight_n[n]);
#pragma GCC unroll 16
          for (int i = 0; i < kBlockOfSums / kLanes; ++i) add_product(Vec::loadu(x + i * kLanes), weight, sums[i]);
          place = place ? place - 1 : window - 1;
        }
#pragma GCC unroll 16
        for (int i = 0; i < kBlockOfSums / kLanes; ++i) sums[i].store(&sum_E[c + i * kLanes]);
      }
      store_channels(sum_E.data(), out_k(t), out_v(t), dim_, 1.0f / z);
    }
  }

  // With u_n = dL / dweight_n = (dy_t . x_{t-n} - dy_t . y_t) / z_t. A decision that is 0 has a gradient, too: what
  // lies before it is looked at.
  void backward_windowed() {
    const int size = 2 * dim_;
    const int64_t window = p_.window;
    std::vector<float> decay_n(window), weight_n(window), u_n(window), grad_E(size);
    std::vector<float> x_WE(window * size), grad_x_WE(window * size);
    std::vector<float> grad_omega_T(p_.num_tokens), grad_alpha_T(p_.num_tokens);
    const auto finish = [&](int64_t j) {
      float* grad_x = grad_x_WE.data() + j % window * size;
      store_channels(grad_x, out_k(j), out_v(j), dim_, 1.0f);
      std::fill_n(grad_x, size, 0.0f);
    };
    for (int64_t t = 0; t < p_.num_tokens; ++t) {
      if (t >= window) finish(t - window);
      keep(t, x_WE.data());
      const int64_t count = std::min(window, t + 1);
      const float z = weigh(t, count, decay_n.data(), weight_n.data());
      fetch(t + kTokensAhead, grad_k_, grad_v_);
      load_row(grad_k_[t], dim_, grad_E.data());
      load_row(grad_v_[t], dim_, &grad_E[dim_]);
      float along_y = 0.0f;
      int64_t place = t % window;
      for (int64_t n = 0; n < count; ++n) {
        const float share = weight_n[n] / z;
        const float* x = x_WE.data() + place * size;
        float* grad_x = grad_x_WE.data() + place * size;
        place = place ? place - 1 : window - 1;
        Vec along_x(0.0f), along_x_too(0.0f);
        for (int c = 0; c < size; c += kStep) {
          const Vec first = Vec::loadu(&grad_E[c]), second = Vec::loadu(&grad_E[c + kLanes]);
          add_product(Vec::loadu(x + c), first, along_x);
          add_product(Vec::loadu(x + c + kLanes), second, along_x_too);
          at::vec::fmadd(first, Vec(share), Vec::loadu(grad_x + c)).store(grad_x + c);
          at::vec::fmadd(second, Vec(share), Vec::loadu(grad_x + c + kLanes)).store(grad_x + c + kLanes);
        }
        u_n[n] = sum_lanes(along_x + along_x_too);
        along_y += share * u_n[n];
      }
      float older = 0.0f;  // the sum of u omega over tokens before l, each times alpha over what lies between
      for (int64_t n = count - 1; n >= 0; --n) {
        const int64_t l = t - n;
        grad_alpha_T[l] += decay_n[n] * older;
        const float u = (u_n[n] - along_y) / z;
        grad_omega_T[l] += u * decay_n[n];
        older = older * alpha_T_[l] + u * omega_T_[l];
      }
    }
    for (int64_t j = std::max<int64_t>(0, p_.num_tokens - window); j < p_.num_tokens; ++j) finish(j);
    for (int64_t t = 0; t < p_.num_tokens; ++t) {
      p_.grad_omega_TBG[row(t) + gate_] = grad_omega_T[t];
      p_.grad_alpha_TBG[row(t) + gate_] = t ? grad_alpha_T[t] : 0.0f;
    }
  }

  const MergeParams<T>& p_;
  int dim_;
  int64_t dense_, gate_;
  TokenRows<T> k_, v_, grad_k_, grad_v_;
  std::vector<float> alpha_T_, omega_T_;
};

template <class T, class Visit>
void for_heads(const MergeParams<T>& p, Visit visit) {
  at::parallel_for(0, p.batch * p.num_kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t x = begin; x < end; ++x) visit(MergeOfHead<T>(p, x / p.num_kv_heads, x % p.num_kv_heads));
  });
}

template <class T>
void merge(const MergeParams<T>& p) {
  for_heads(p, [](MergeOfHead<T> head) { head.forward(); });
}

template <class T>
void merge_backward(const MergeParams<T>& p) {
  for_heads(p, [](MergeOfHead<T> head) { head.backward(); });
}

}  // namespace CPU_CAPABILITY
}  // namespace dmc::cpu
