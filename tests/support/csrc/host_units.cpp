// Unit tests of the headers that need no warp. Exit status 0, or one line for each check that fails.
#include <cstdio>
#include <vector>

#include "emulator.h"

#include "dmc/paged_kv.h"
#include "dmc/release.h"
#include "dmc/schedule.h"
#include "dmc/segment.h"

int failures = 0;
#define CHECK(condition)                                                    \
  do {                                                                      \
    if (!(condition)) {                                                     \
      std::printf("%s:%d: %s\n", __FILE__, __LINE__, #condition);           \
      ++failures;                                                           \
    }                                                                       \
  } while (0)

bool near(double a, double b) { return std::fabs(a - b) <= 1e-6 * (1 + std::fabs(b)); }

void segment_is_a_weighted_mean() {
  const float k[3][2] = {{1, -2}, {3, 5}, {-4, 0.5f}}, v[3][2] = {{2, 2}, {0, -1}, {7, 3}};
  const float omega[3] = {0.25f, 1.0f, 0.5f};
  dmc::Segment<2> segment, token;
  segment.open(k[0], v[0], omega[0]);
  float out_k[2], out_v[2];
  segment.emit(out_k, out_v);
  CHECK(near(out_k[1], -2) && near(out_v[0], 2));
  for (int t = 1; t < 3; ++t) {
    token.open(k[t], v[t], omega[t]);
    segment.merge(token);
  }
  segment.emit(out_k, out_v);
  for (int i = 0; i < 2; ++i) {
    double sum_k = 0, sum_v = 0, sum = 0;
    for (int t = 0; t < 3; ++t) {
      sum_k += double(omega[t]) * k[t][i];
      sum_v += double(omega[t]) * v[t][i];
      sum += omega[t];
    }
    CHECK(near(out_k[i], sum_k / sum) && near(out_v[i], sum_v / sum));
  }
  segment.open(k[1], v[1], 0.75f);  // forgets
  CHECK(near(segment.omega_sum, 0.75) && near(segment.k_sum[0], 2.25));
}

void addresses_of_a_paged_cache() {
  std::vector<int32_t> table(2 * 3 * 5);
  std::vector<int64_t> entries(2 * 3);
  dmc::PagedKV kv{nullptr,        nullptr, nullptr, nullptr, table.data(), entries.data(), 15, 5, 3, 1, 4,
                  128,            5,       dmc::kNumbers};
  CHECK(kv.table(1, 2) == table.data() + 25);
  CHECK(kv.num_entries(1, 2) == entries.data() + 5);
  CHECK(kv.column(15) == 0 && kv.column(16) == 1 && kv.column(47) == 2);
  CHECK(kv.slot(0, 0) == 0 && kv.slot(0, 15) == 15 && kv.slot(3, 17) == 48 + 1);
  // beyond 32 bits
  CHECK(kv.slot(400000000, 5) == int64_t(400000000) * 16 + 5);
}

void stretches_cover_the_line_once() {
  for (int units : {0, 1, 3, 4, 5, 63, 64, 1000, 1001}) {
    for (int available : {1, 2, 7, 64}) {
      const dmc::Stretches s(units, available);
      CHECK(s.num_workers >= 1 && s.num_workers <= available);
      CHECK(s.begin(0) == 0 && s.begin(s.num_workers) == units);
      int shortest = units, longest = 0;
      for (int w = 0; w < s.num_workers; ++w) {
        const int length = s.begin(w + 1) - s.begin(w);
        shortest = dmc::smaller(shortest, length);
        longest = dmc::larger(longest, length);
        for (int t = s.begin(w); t < s.begin(w + 1); ++t) CHECK(s.worker_of(t) == w);
      }
      CHECK(longest - shortest <= 1);
    }
  }
}

void released_pages_are_free_once_nobody_has_them() {
  // pages 3, 1, 4 are taken; 1 has two owners
  std::vector<int32_t> stack{3, 1, 4, 0, 2}, extra{0, 1, 0, 0, 0}, ids{1, -1, 9, 4, 1, 9};
  int32_t state[2] = {3, 0};
  const dmc::ReleaseParams p{ids.data(), 3, 2, 4, stack.data(), state, extra.data()};
  for (int i = 0; i < 2; ++i) dmc::release_page(p, i);
  CHECK(state[0] == 3 && extra[1] == 0);  // the other owner has it
  for (int i = 2; i < 4; ++i) dmc::release_page(p, i);
  CHECK(state[0] == 1 && state[1] == 0 && stack[2] == 4 && stack[1] == 1);
  CHECK(ids[0] == -1 && ids[2] == 9 && ids[3] == -1 && ids[4] == -1 && ids[5] == 9);
}

void half_precision_rounds_to_nearest() {
  dmc::bf16 b;
  dmc::from_float(1.00390625f, b);  // half way between 1 and 1.0078125: to even
  CHECK(dmc::to_float(b) == 1.0f);
  dmc::from_float(1.01171875f, b);
  CHECK(dmc::to_float(b) == 1.015625f);
  dmc::from_float(std::nanf(""), b);
  CHECK(std::isnan(dmc::to_float(b)));
  dmc::fp16 h;
  dmc::from_float(-0.1f, h);
  CHECK(std::fabs(dmc::to_float(h) + 0.1f) < 5e-5f);
}

float value_of(dmc::e4m3 x) {
  const int exponent = x.bits >> 3 & 15, mantissa = x.bits & 7;
  const float sign = x.bits & 0x80 ? -1.0f : 1.0f;
  if ((x.bits & 0x7f) == 0x7f) return std::nanf("");
  return sign * (exponent ? std::ldexp(1.0f + mantissa / 8.0f, exponent - 7) : mantissa / 512.0f);
}
float value_of(dmc::int8 x) { return x.bits; }

template <class S, class T>
void four_bytes_are_widened_exactly() {
  for (int i = 0; i < 256; ++i) {
    uint8_t bytes[4];
    for (int b = 0; b < 4; ++b) bytes[b] = uint8_t(i + 67 * b);
    uint32_t x, pairs[2];
    std::memcpy(&x, bytes, 4);
    dmc::widen(x, pairs[0], pairs[1], S{}, T{});
    for (int b = 0; b < 4; ++b) {
      S stored;
      std::memcpy(&stored, bytes + b, 1);
      const float wanted = value_of(stored);
      const float got = dmc::to_float(T{uint16_t(pairs[b % 2] >> b / 2 * 16)}) * dmc::unit<S, T>;
      CHECK(std::isnan(wanted) || got == wanted);  // NaN comes with a scale that is NaN
    }
  }
}

// Every code, all midpoints and their neighbours, and what lies beyond the largest.
template <class S>
void numbers_go_to_the_nearest_code(int num_codes) {
  const auto encoded = [](float x) {
    S out;
    dmc::encode(x, out);
    return value_of(out);
  };
  const auto code = [](int i) {
    S stored;
    const uint8_t bits = uint8_t(i);
    std::memcpy(&stored, &bits, 1);
    return value_of(stored);
  };
  for (int i = 0; i < num_codes; ++i) {
    const float x = code(i);
    CHECK(encoded(x) == x && encoded(-x) == -x);
    if (i + 1 == num_codes) break;
    const float middle = (x + code(i + 1)) / 2, even = code(i + i % 2);
    CHECK(encoded(middle) == even && encoded(-middle) == -even);
    CHECK(encoded(std::nextafter(middle, 0.0f)) == x);
    CHECK(encoded(std::nextafter(middle, 1e9f)) == code(i + 1));
  }
  const float largest = code(num_codes - 1);
  CHECK(largest == dmc::kLargest<S> && encoded(largest * 1.000001f) == largest);
}

void scales_of_entries() {
  const auto scale = [](float x) { return dmc::scale_of<dmc::e4m3>(dmc::float_bits(x)); };
  CHECK(scale(448.0f) == 448.0f * (1.0f / 448.0f) && scale(0.0f) == scale(1e-35f));
  CHECK(std::isnan(scale(std::nanf(""))) && dmc::scale_of<dmc::int8>(0) > 0.0f);
}

int main() {
  four_bytes_are_widened_exactly<dmc::e4m3, dmc::bf16>();
  four_bytes_are_widened_exactly<dmc::e4m3, dmc::fp16>();
  four_bytes_are_widened_exactly<dmc::int8, dmc::bf16>();
  four_bytes_are_widened_exactly<dmc::int8, dmc::fp16>();
  numbers_go_to_the_nearest_code<dmc::e4m3>(127);
  numbers_go_to_the_nearest_code<dmc::int8>(128);
  scales_of_entries();
  segment_is_a_weighted_mean();
  addresses_of_a_paged_cache();
  stretches_cover_the_line_once();
  released_pages_are_free_once_nobody_has_them();
  half_precision_rounds_to_nearest();
  return failures != 0;
}
