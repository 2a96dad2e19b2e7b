// Training's attention to a query's raw tokens and its open state, joined to a stock kernel's part, and the gradients:
// megatron_dmc/ops/training/near.py says which keys these are. In float32, one query after the other; the raw tokens that
// it sees lie in a ring.
//
// Local letters: M keys of a query.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/products.h"
#include "cpu/token_rows.h"

namespace dmc::cpu {
inline namespace CPU_CAPABILITY {

constexpr int64_t kQueriesAhead = 4;
constexpr int kVectorsOfStep = kDimStep / kLanes;

// out_m = a . rows_m
inline void dots(const float* a_D, const float* const* rows_M, int count, int dim, float* out_M) {
  for (int m = 0; m < count; m += 4) {
    const float* rows[4];
    for (int i = 0; i < 4; ++i) rows[i] = rows_M[std::min(m + i, count - 1)];
    Vec sums[4] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
    for (int c = 0; c < dim; c += kLanes) {
      const Vec a = Vec::loadu(a_D + c);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) add_product(Vec::loadu(rows[i] + c), a, sums[i]);
    }
    sum_lanes(sums[0], sums[1], sums[2], sums[3], out_M + m);
  }
}

// out += the sum of weight_m rows_m
inline void add_weighted(const float* weight_M, const float* const* rows_M, int count, int dim, float* out_D) {
  for (int c = 0; c < dim; c += kDimStep) {
    Vec sums[kVectorsOfStep];
#pragma GCC unroll 8
    for (int i = 0; i < kVectorsOfStep; ++i) sums[i] = Vec::loadu(out_D + c + i * kLanes);
    for (int m = 0; m < count; ++m) {
      const Vec weight(weight_M[m]);
#pragma GCC unroll 8
      for (int i = 0; i < kVectorsOfStep; ++i) add_product(Vec::loadu(rows_M[m] + c + i * kLanes), weight, sums[i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kVectorsOfStep; ++i) sums[i].store(out_D + c + i * kLanes);
  }
}

// rows_m += weight_m a
inline void add_to_rows(const float* weight_M, const float* a_D, int count, int dim, float* const* rows_M) {
  for (int m = 0; m < count; ++m) {
    const Vec weight(weight_M[m]);
    for (int c = 0; c < dim; c += kLanes)
      at::vec::fmadd(Vec::loadu(a_D + c), weight, Vec::loadu(rows_M[m] + c)).store(rows_M[m] + c);
  }
}

// The queries of one sequence and KV head.
template <class T>
class NearOfHead {
 public:
  NearOfHead(const NearParams<T>& p, int64_t b, int64_t g)
      : p_(p), b_(b), g_(g), dim_(int(p.dim)), past_(p.num_keys - p.num_queries), has_near_(p.near_k.data),
        has_open_(p.open_k.data), ring_(has_near_ ? p.n : 0), keys_(ring_ * dim_), values_(ring_ * dim_),
        open_key_(dim_), open_value_(dim_), q_(dim_), out_(dim_), k_rows_(p.n + 1), v_rows_(p.n + 1),
        weight_((p.n + 1 + 3) / kLanes * kLanes + kLanes) {}

  void forward() {
    for (int64_t pos = first_key(); pos < p_.num_keys; ++pos) {
      keep(pos);
      if (pos < past_) continue;
      const int64_t i = pos - past_, from_far = i - (p_.num_queries - p_.num_far_queries);
      const int count = gather(pos);
      for (int64_t h = g_ * p_.group; h < (g_ + 1) * p_.group; ++h) join(i, h, count, from_far);
    }
  }

  void backward() {
    std::vector<float> grad_keys((ring_ + 1) * dim_), grad_values((ring_ + 1) * dim_);  // last, of the open state
    std::vector<float> grad(dim_), of_weight_M(weight_.size());
    std::vector<float*> grad_k_rows(p_.n + 1), grad_v_rows(p_.n + 1);
    for (int64_t j = 0; j < first_key(); ++j) finish(j, p_.d_near_k, p_.d_near_v, nullptr, nullptr, !has_open_);
    for (int64_t j = 0; has_open_ && j < p_.num_keys; ++j)  // those of which no query has an open state
      if (j + p_.n < past_ || j + p_.n >= p_.num_keys) finish(j, p_.d_open_k, p_.d_open_v, nullptr, nullptr, true);
    const auto leave = [&](int64_t j) {
      float *k = &grad_keys[j % ring_ * dim_], *v = &grad_values[j % ring_ * dim_];
      finish(j, p_.d_near_k, p_.d_near_v, k, v, !has_open_);
      std::fill_n(k, dim_, 0.0f);
      std::fill_n(v, dim_, 0.0f);
    };
    for (int64_t pos = first_key(); pos < p_.num_keys; ++pos) {
      if (has_near_ && pos - p_.n >= first_key()) leave(pos - p_.n);
      keep(pos);
      if (pos < past_) continue;
      const int64_t i = pos - past_;
      const int count = gather(pos);
      for (int m = 0; m < count; ++m) {
        const bool is_open = k_rows_[m] == open_key_.data();
        const int64_t place = is_open ? ring_ * dim_ : k_rows_[m] - keys_.data();
        grad_k_rows[m] = &grad_keys[place];
        grad_v_rows[m] = &grad_values[place];
      }
      for (int64_t h = g_ * p_.group; h < (g_ + 1) * p_.group; ++h) {
        load_query(i, h);
        load_row(p_.grad.row(b_, h, i), dim_, grad.data());
        load_row(p_.out.row(b_, h, i), dim_, out_.data());
        fetch(i + kQueriesAhead, h, p_.grad, p_.out);
        float along_out[4];
        const float* only_out = out_.data();
        dots(grad.data(), &only_out, 1, dim_, along_out);  // as those of values: of one key they are the same
        const float delta = along_out[0];
        const float lse = p_.lse_BNT[(b_ * p_.num_kv_heads * p_.group + h) * p_.num_queries + i];
        dots(q_.data(), k_rows_.data(), count, dim_, weight_.data());
        dots(grad.data(), v_rows_.data(), count, dim_, of_weight_M.data());
        for (int m = 0; m < count; m += kLanes) {
          const Vec p = (Vec::loadu(&weight_[m]) * Vec(p_.scale) - Vec(lse)).exp_u20();
          p.store(&weight_[m]);
          (p * (Vec::loadu(&of_weight_M[m]) - Vec(delta)) * Vec(p_.scale)).store(&of_weight_M[m]);
        }
        add_to_rows(weight_.data(), grad.data(), count, dim_, grad_v_rows.data());
        add_to_rows(of_weight_M.data(), q_.data(), count, dim_, grad_k_rows.data());
        float* dq = out_.data();
        std::fill_n(dq, dim_, 0.0f);
        add_weighted(of_weight_M.data(), k_rows_.data(), count, dim_, dq);
        const int64_t from_far = i - (p_.num_queries - p_.num_far_queries);
        if (from_far >= 0) {
          add_row(p_.far.row(b_, h, from_far), dim_, dq);
          fetch(from_far + kQueriesAhead, h, p_.far);
        }
        dq[dim_ - 1] = 0.0f;
        store_row(dq, dim_, p_.dq.row(b_, h, i));
      }
      if (has_open_ && pos >= p_.n) {
        float *k = &grad_keys[ring_ * dim_], *v = &grad_values[ring_ * dim_];
        finish(pos - p_.n, p_.d_open_k, p_.d_open_v, k, v, true);
        std::fill_n(k, dim_, 0.0f);
        std::fill_n(v, dim_, 0.0f);
      }
    }
    for (int64_t j = std::max(first_key(), p_.num_keys - p_.n); has_near_ && j < p_.num_keys; ++j) leave(j);
  }

 private:
  // The first raw token that a query sees; where none are near, of which a query has the open state.
  int64_t first_key() const { return has_near_ ? std::max<int64_t>(0, past_ - p_.n + 1) : past_; }

  template <class... Rows>
  [[gnu::always_inline]] void fetch(int64_t t, int64_t h, const Rows&... rows) const {
    ((t < rows.count ? fetch_row(rows.row(b_, h, t), dim_) : void()), ...);
  }

  void keep(int64_t pos) {
    if (!has_near_) return;
    load_row(p_.near_k.row(b_, g_, pos), dim_, &keys_[pos % ring_ * dim_]);
    load_row(p_.near_v.row(b_, g_, pos), dim_, &values_[pos % ring_ * dim_]);
    fetch(pos + kQueriesAhead, g_, p_.near_k, p_.near_v);
  }

  // The keys of the query at a position, raw ones first; their number.
  int gather(int64_t pos) {
    int count = 0;
    if (has_near_) {
      const int64_t first = std::max<int64_t>(0, pos - p_.n + 1);
      int64_t place = first % ring_;
      for (int64_t j = first; j <= pos; ++j) {
        k_rows_[count] = &keys_[place * dim_];
        v_rows_[count++] = &values_[place * dim_];
        if (++place == ring_) place = 0;
      }
    }
    if (has_open_ && pos >= p_.n) {
      load_row(p_.open_k.row(b_, g_, pos - p_.n), dim_, open_key_.data());
      load_row(p_.open_v.row(b_, g_, pos - p_.n), dim_, open_value_.data());
      fetch(pos - p_.n + kQueriesAhead, g_, p_.open_k, p_.open_v);
      k_rows_[count] = open_key_.data();
      v_rows_[count++] = open_value_.data();
    }
    return count;
  }

  void load_query(int64_t i, int64_t h) {
    load_row(p_.q.row(b_, h, i), dim_, q_.data());
    q_[dim_ - 1] = 0.0f;  // the borrowed channel
    fetch(i + kQueriesAhead, h, p_.q);
  }

  void join(int64_t i, int64_t h, int count, int64_t from_far) {
    load_query(i, h);
    dots(q_.data(), k_rows_.data(), count, dim_, weight_.data());
    const int64_t head = b_ * p_.num_kv_heads * p_.group + h;
    const float far_lse = from_far < 0 ? -INFINITY : p_.far_lse_BNF[head * p_.num_far_queries + from_far];
    float most = far_lse;
    bool all_numbers = far_lse == far_lse;
    for (int m = 0; m < count; ++m) {
      weight_[m] *= p_.scale;
      most = std::max(most, weight_[m]);
      all_numbers = all_numbers && weight_[m] == weight_[m];
    }
    const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    std::fill(weight_.begin() + count, weight_.begin() + padded, -INFINITY);
    for (int64_t m = 0; m < padded; m += kLanes) (Vec::loadu(&weight_[m]) - Vec(most)).exp_u20().store(&weight_[m]);
    const float far_weight = std::exp(far_lse - most);
    float total = all_numbers ? far_weight : NAN;  // of NaN the exponential above makes a number
    for (int m = 0; m < count; ++m) total += weight_[m];
    if (from_far < 0) {
      std::fill(out_.begin(), out_.end(), 0.0f);
    } else {
      load_row(p_.far.row(b_, h, from_far), dim_, out_.data());
      fetch(from_far + kQueriesAhead, h, p_.far);
      for (float& x : out_) x *= far_weight / total;
    }
    for (int m = 0; m < count; ++m) weight_[m] /= total;
    add_weighted(weight_.data(), v_rows_.data(), count, dim_, out_.data());
    store_row(out_.data(), dim_, p_.out.row(b_, h, i));
    p_.lse_BNT[head * p_.num_queries + i] = most + std::log(total);
  }

  // A key's and value's gradients are complete; null: 0 so far.
  void finish(int64_t j, const TokensOf<T>& d_k, const TokensOf<T>& d_v, float* k, float* v, bool is_far) {
    if (!d_k.data) return;
    if (!k) {
      std::fill(open_key_.begin(), open_key_.end(), 0.0f);
      std::fill(open_value_.begin(), open_value_.end(), 0.0f);
      k = open_key_.data();
      v = open_value_.data();
    }
    if (is_far && j < p_.num_far_keys) {
      add_row(p_.far_k.row(b_, g_, j), dim_, k);
      add_row(p_.far_v.row(b_, g_, j), dim_, v);
      fetch(j + kQueriesAhead, g_, p_.far_k, p_.far_v);
    }
    k[dim_ - 1] = 0.0f;
    store_row(k, dim_, d_k.row(b_, g_, j));
    store_row(v, dim_, d_v.row(b_, g_, j));
  }

  const NearParams<T>& p_;
  int64_t b_, g_;
  int dim_;
  int64_t past_;
  bool has_near_, has_open_;
  int64_t ring_;
  std::vector<float> keys_, values_, open_key_, open_value_, q_, out_;
  std::vector<const float*> k_rows_, v_rows_;
  std::vector<float> weight_;
};

template <class T, class Visit>
void for_heads(const NearParams<T>& p, Visit visit) {
  at::parallel_for(0, p.batch * p.num_kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t x = begin; x < end; ++x) {
      NearOfHead<T> head(p, x / p.num_kv_heads, x % p.num_kv_heads);
      visit(head);
    }
  });
}

template <class T>
void near_join(const NearParams<T>& p) {
  for_heads(p, [](NearOfHead<T>& head) { head.forward(); });
}

template <class T>
void near_gradients(const NearParams<T>& p) {
  for_heads(p, [](NearOfHead<T>& head) { head.backward(); });
}

}  // namespace CPU_CAPABILITY
}  // namespace dmc::cpu
