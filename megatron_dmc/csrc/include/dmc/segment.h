// The accumulator of an open segment: one thread's share of its channels. docs/method.md, section 2.
#pragma once

#include "dmc/platform.h"

namespace dmc {

template <int kChannels>
struct Segment {
  float k_sum[kChannels];
  float v_sum[kChannels];
  float omega_sum;

  // Start with one token of importance omega.
  DMC_HOST_DEVICE void open(const float (&k)[kChannels], const float (&v)[kChannels], float omega) {
    DMC_UNROLL
    for (int i = 0; i < kChannels; ++i) {
      k_sum[i] = omega * k[i];
      v_sum[i] = omega * v[i];
    }
    omega_sum = omega;
  }

  // Add another accumulator: earlier tokens, or one weighted token of a merge window.
  DMC_HOST_DEVICE void merge(const Segment& other) {
    DMC_UNROLL
    for (int i = 0; i < kChannels; ++i) {
      k_sum[i] += other.k_sum[i];
      v_sum[i] += other.v_sum[i];
    }
    omega_sum += other.omega_sum;
  }

  // The entry: the weighted mean.
  DMC_HOST_DEVICE void emit(float (&k)[kChannels], float (&v)[kChannels]) const {
    float scale = 1.0f / omega_sum;
    DMC_UNROLL
    for (int i = 0; i < kChannels; ++i) {
      k[i] = k_sum[i] * scale;
      v[i] = v_sum[i] * scale;
    }
  }
};

}  // namespace dmc
