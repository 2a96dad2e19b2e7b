#include "dispatch.h"
#include "kernels.h"
#include "launch.h"

namespace dmc {
namespace {

constexpr int kPlanThreads = 1024;
constexpr int kJoinThreads = 128;

__global__ void __launch_bounds__(kPlanThreads) plan_kernel(__grid_constant__ const PlanParams p) {
  __shared__ int shared[kPlanThreads / kWarp];
  plan_layer(p, shared);
}

template <class T, class S, int kHeadDim, int kQueryBlocks>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp)
    attend_kernel(__grid_constant__ const AttentionParams<T> p) {
  extern __shared__ __align__(16) char shared_memory[];
  wait_for_kernels_before();
  let_next_kernel_start();
  attend_stretch<T, S, kHeadDim, kQueryBlocks>(p, shared_memory);
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kJoinThreads)
    join_kernel(__grid_constant__ const AttentionParams<T> p) {
  wait_for_kernels_before();
  const int index = (blockIdx.x * kJoinThreads + threadIdx.x) / kWarp;
  if (index < p.num_requests * p.num_kv_heads * p.group) join_parts<T, kHeadDim>(p, index);
}

template <class T, class S, int kHeadDim, int kQueryBlocks>
cudaError_t launch(const AttentionParams<T>& p, cudaStream_t stream) {
  constexpr int kBytes = kWarpsPerBlock * Stages<S, kHeadDim>::kBytes;
  const auto kernel = attend_kernel<T, S, kHeadDim, kQueryBlocks>;
  cudaError_t error = reserve_shared_memory(kernel, kBytes);
  if (error != cudaSuccess) return error;
  const int blocks = (p.num_workers + kWarpsPerBlock - 1) / kWarpsPerBlock;
  error = launch_early(kernel, blocks, kWarpsPerBlock * kWarp, kBytes, stream, p);
  if (error != cudaSuccess) return error;
  const int64_t threads = int64_t(p.num_requests) * p.num_kv_heads * p.group * kWarp;
  const int join_blocks = int((threads + kJoinThreads - 1) / kJoinThreads);
  return launch_early(join_kernel<T, kHeadDim>, join_blocks, kJoinThreads, 0, stream, p);
}

template <class T, class S, int kHeadDim>
cudaError_t launch_group(const AttentionParams<T>& p, cudaStream_t stream) {
  if (p.group <= 8) return launch<T, S, kHeadDim, 1>(p, stream);
  if constexpr (kHeadDim <= 128) {
    return launch<T, S, kHeadDim, 2>(p, stream);
  } else {
    return cudaErrorInvalidValue;
  }
}

template <class S, int kHeadDim>
cudaError_t workers(int* count) {
  constexpr int kBytes = kWarpsPerBlock * Stages<S, kHeadDim>::kBytes;
  const auto kernel = attend_kernel<bf16, S, kHeadDim, 1>;
  int device, multiprocessors, blocks;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  error = reserve_shared_memory(kernel, kBytes);
  if (error != cudaSuccess) return error;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kWarpsPerBlock * kWarp,
                                                        kBytes);
  *count = multiprocessors * blocks * kWarpsPerBlock;
  return error;
}

}  // namespace

cudaError_t launch_plan(const PlanParams& p, cudaStream_t stream) {
  if (p.num_layers == 0) return cudaSuccess;
  plan_kernel<<<p.num_layers, kPlanThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_attention(const AttentionParams<T>& p, cudaStream_t stream) {
  if (p.num_requests == 0) return cudaSuccess;
  return with_stored<T>(p.kv.stored, [&](auto stored) {
    return with_head_dim(p.kv.head_dim, [&](auto head_dim) {
      return launch_group<T, decltype(stored), decltype(head_dim)::value>(p, stream);
    });
  });
}

template cudaError_t launch_attention(const AttentionParams<bf16>&, cudaStream_t);
#ifndef DMC_HOT_KERNELS_ONLY
template cudaError_t launch_attention(const AttentionParams<fp16>&, cudaStream_t);
#endif

cudaError_t count_workers(int head_dim, Stored stored, int* count) {
  return with_stored<bf16>(stored, [&](auto kind) {
    return with_head_dim(head_dim, [&](auto dim) {
      return workers<decltype(kind), decltype(dim)::value>(count);
    });
  });
}

}  // namespace dmc
