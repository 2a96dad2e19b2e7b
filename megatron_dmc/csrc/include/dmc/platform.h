// Differences between a GPU and a host compiler. No other header of this folder has inline assembly,
// and none needs the headers of CUDA or torch. On a host the warp functions are only declared; code
// that runs kernels there, such as the tests, defines them.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DMC_HOST_DEVICE __host__ __device__ __forceinline__
#define DMC_DEVICE __device__ __forceinline__
#define DMC_UNROLL _Pragma("unroll")
#else
#include <cmath>
#include <cstring>
#define DMC_HOST_DEVICE inline
#define DMC_DEVICE inline
#define DMC_UNROLL
#endif

namespace dmc {

constexpr int kWarp = 32;

// Half-precision storage; arithmetic is in float.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

#ifdef __CUDACC__

DMC_DEVICE int thread_index() { return threadIdx.x; }
DMC_DEVICE int block_index() { return blockIdx.x; }
DMC_DEVICE int block_size() { return blockDim.x; }

// Programmatic dependent launch, of sm_90 and later (csrc/launch.h); without effect in an ordinary launch. Until the
// first has returned, a kernel must neither read what any kernel before it in the stream writes, nor write.
DMC_DEVICE void wait_for_kernels_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DMC_DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

DMC_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
DMC_DEVICE float bits_float(uint32_t x) { return __uint_as_float(x); }
DMC_DEVICE float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
DMC_DEVICE float to_float(fp16 x) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x.bits));
  return out;
}
DMC_DEVICE void from_float(float x, bf16& out) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
}
DMC_DEVICE void from_float(float x, fp16& out) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
}
DMC_DEVICE float exp2_fast(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
DMC_DEVICE float log2_fast(float x) { return __log2f(x); }
DMC_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

DMC_DEVICE void sync_warp() { __syncwarp(); }
DMC_DEVICE void sync_block() { __syncthreads(); }
DMC_DEVICE int shuffle(int x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
DMC_DEVICE int shuffle_up(int x, int by) { return __shfl_up_sync(0xffffffffu, x, by); }
DMC_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DMC_DEVICE uint32_t largest_of_warp(uint32_t x) { return __reduce_max_sync(0xffffffffu, x); }
DMC_DEVICE int count_lanes(bool x) { return __popc(__ballot_sync(0xffffffffu, x)); }
DMC_DEVICE int atomic_add(int32_t* p, int x) { return atomicAdd(p, x); }

// 16 bytes to shared memory, or 16 zero bytes if `valid` is false; `from` must be readable in either case.
DMC_DEVICE void copy_async(void* to, const void* from, bool valid) {
  uint32_t address = uint32_t(__cvta_generic_to_shared(to));
  int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes)
               : "memory");
}
DMC_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
DMC_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of half-precision numbers; lane i names row i % 8 of matrix i / 8.
DMC_DEVICE void load_matrices(uint32_t (&out)[4], const void* row) {
  uint32_t address = uint32_t(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}
DMC_DEVICE void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  uint32_t address = uint32_t(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}
DMC_DEVICE uint32_t transpose_matrix(uint32_t x) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(x));
  return out;
}

// a b + c of two pairs; subnormal numbers count.
DMC_DEVICE uint32_t multiply_add_pairs(uint32_t a, uint32_t b, uint32_t c, bf16) {
  uint32_t out;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
}
DMC_DEVICE uint32_t multiply_add_pairs(uint32_t a, uint32_t b, uint32_t c, fp16) {
  uint32_t out;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
}

// c (16 x 8) += a (16 x 16) b (16 x 8), in the layouts of mma.m16n8k16.
DMC_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DMC_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], fp16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else

int thread_index();
int block_index();
int block_size();
void sync_warp();
void sync_block();
int shuffle(int x, int lane);
int shuffle_up(int x, int by);
float shuffle_xor(float x, int mask);
uint32_t largest_of_warp(uint32_t x);
int count_lanes(bool x);
int atomic_add(int32_t* p, int x);
void copy_async(void* to, const void* from, bool valid);
void copy_async_commit();
void copy_async_wait_for(int pending);
template <int kPending>
void copy_async_wait() {
  copy_async_wait_for(kPending);
}
void load_matrices(uint32_t (&out)[4], const void* row);
void load_matrices_transposed(uint32_t (&out)[4], const void* row);
uint32_t transpose_matrix(uint32_t x);
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bf16);
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], fp16);

inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float to_float(bf16 x) { return bits_float(uint32_t(x.bits) << 16); }
// By bits: compilers before GCC 12 (on ARM 13) have no _Float16.
inline float to_float(fp16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = (x.bits & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u) return bits_float(sign | 0x7f800000u | magnitude);  // infinite, or no number
  return bits_float(sign | float_bits(bits_float(magnitude) * 0x1p112f));  // the exponent's bias from 15 to 127
}
inline void from_float(float x, bf16& out) {
  uint32_t bits = float_bits(x);
  bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out.bits = is_nan ? 0x7fff : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}
inline void from_float(float x, fp16& out) {
  const uint32_t bits = float_bits(x), magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {  // not a number; the top of its payload stays
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // from 65520 on
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14 a step is 2^-24, the last bit of 0.5
    half = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = ((magnitude + 0xfffu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
  }
  out.bits = uint16_t(half | ((bits >> 16) & 0x8000u));
}
inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

template <class T>
uint32_t multiply_add_pairs(uint32_t a, uint32_t b, uint32_t c, T) {
  const auto half = [](uint32_t pair, int i) { return to_float(T{uint16_t(pair >> 16 * i)}); };
  T out[2];
  for (int i = 0; i < 2; ++i) from_float(std::fma(half(a, i), half(b, i), half(c, i)), out[i]);
  return uint32_t(out[0].bits) | uint32_t(out[1].bits) << 16;
}

#endif

// Two numbers in one register, the first in the lower half.
template <class T>
DMC_DEVICE uint32_t pack(float first, float second) {
  T a, b;
  from_float(first, a);
  from_float(second, b);
  return uint32_t(a.bits) | (uint32_t(b.bits) << 16);
}

DMC_HOST_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
DMC_HOST_DEVICE int larger(int a, int b) { return a > b ? a : b; }

}  // namespace dmc
