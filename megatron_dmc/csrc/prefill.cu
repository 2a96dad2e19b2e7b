#include "dispatch.h"
#include "kernels.h"

namespace dmc {
namespace {

constexpr int kThreads = 128;

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads) tail_kernel(__grid_constant__ const PrefillParams<T> p) {
  const int index = (blockIdx.x * kThreads + threadIdx.x) / kWarp;
  if (index < p.num_tiles * p.num_kv_heads) sum_tail<T, kHeadDim>(p, index);
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kCarryThreads)
    carry_kernel(__grid_constant__ const PrefillParams<T> p) {
  carry_sums<T, kHeadDim>(p);
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads) write_kernel(__grid_constant__ const PrefillParams<T> p) {
  const int index = (blockIdx.x * kThreads + threadIdx.x) / kWarp;
  if (index < p.num_tiles * p.num_kv_heads) write_tile<T, kHeadDim>(p, index);
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads) keep_kernel(__grid_constant__ const PrefillParams<T> p) {
  const int index = (blockIdx.x * kThreads + threadIdx.x) / kWarp;
  if (index < p.num_chunks * p.num_kv_heads) keep_latest<T, kHeadDim>(p, index);
}

int blocks_of_warps(int warps) { return (warps * kWarp + kThreads - 1) / kThreads; }

template <class T, int kHeadDim>
cudaError_t launch(const PrefillParams<T>& p, cudaStream_t stream) {
  const int tiles = blocks_of_warps(p.num_tiles * p.num_kv_heads);
  if (p.is_merge_TG) {
    tail_kernel<T, kHeadDim><<<tiles, kThreads, 0, stream>>>(p);
    const int parts = p.merge_window ? 1 : (2 * kHeadDim + kCarryThreads) / kCarryThreads;
    carry_kernel<T, kHeadDim>
        <<<p.num_chunks * p.num_kv_heads * parts, kCarryThreads, 0, stream>>>(p);
  }
  write_kernel<T, kHeadDim><<<tiles, kThreads, 0, stream>>>(p);
  if (p.is_merge_TG && p.merge_window) {
    keep_kernel<T, kHeadDim>
        <<<blocks_of_warps(p.num_chunks * p.num_kv_heads), kThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace

template <class T>
cudaError_t launch_prefill_write(const PrefillParams<T>& p, cudaStream_t stream) {
  if (p.num_tiles == 0) return cudaSuccess;
  return with_head_dim(p.kv.head_dim, [&](auto head_dim) {
    return launch<T, decltype(head_dim)::value>(p, stream);
  });
}

template cudaError_t launch_prefill_write(const PrefillParams<bf16>&, cudaStream_t);
#ifndef DMC_HOT_KERNELS_ONLY
template cudaError_t launch_prefill_write(const PrefillParams<fp16>&, cudaStream_t);
#endif

}  // namespace dmc
