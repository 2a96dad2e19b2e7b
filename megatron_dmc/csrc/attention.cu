#include "kernels.h"

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
  attend_stretch<T, S, kHeadDim, kQueryBlocks>(p, shared_memory);
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kJoinThreads)
    join_kernel(__grid_constant__ const AttentionParams<T> p) {
  const int index = (blockIdx.x * kJoinThreads + threadIdx.x) / kWarp;
  if (index < p.num_requests * p.num_kv_heads * p.group) join_parts<T, kHeadDim>(p, index);
}

template <class T, class S, int kHeadDim, int kQueryBlocks>
cudaError_t launch(const AttentionParams<T>& p, cudaStream_t stream) {
  constexpr int kBytes = kWarpsPerBlock * Stages<S, kHeadDim>::kBytes;
  const auto kernel = attend_kernel<T, S, kHeadDim, kQueryBlocks>;
  // set for every device that a process uses, so at every launch; it costs no launch
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const int blocks = (p.num_workers + kWarpsPerBlock - 1) / kWarpsPerBlock;
  kernel<<<blocks, kWarpsPerBlock * kWarp, kBytes, stream>>>(p);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  const int64_t threads = int64_t(p.num_requests) * p.num_kv_heads * p.group * kWarp;
  join_kernel<T, kHeadDim>
      <<<int((threads + kJoinThreads - 1) / kJoinThreads), kJoinThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <class T, class S>
cudaError_t launch_any(const AttentionParams<T>& p, cudaStream_t stream) {
  const bool one_block = p.group <= 8;
  switch (p.kv.head_dim) {
    case 64: return one_block ? launch<T, S, 64, 1>(p, stream) : launch<T, S, 64, 2>(p, stream);
    case 96: return one_block ? launch<T, S, 96, 1>(p, stream) : launch<T, S, 96, 2>(p, stream);
    case 128: return one_block ? launch<T, S, 128, 1>(p, stream) : launch<T, S, 128, 2>(p, stream);
    case 256: return one_block ? launch<T, S, 256, 1>(p, stream) : cudaErrorInvalidValue;
    default: return cudaErrorInvalidValue;
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
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kWarpsPerBlock * kWarp,
                                                        kBytes);
  *count = multiprocessors * blocks * kWarpsPerBlock;
  return error;
}

template <class S>
cudaError_t workers_any(int head_dim, int* count) {
  switch (head_dim) {
    case 64: return workers<S, 64>(count);
    case 96: return workers<S, 96>(count);
    case 128: return workers<S, 128>(count);
    case 256: return workers<S, 256>(count);
    default: return cudaErrorInvalidValue;
  }
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
  switch (p.kv.stored) {
    case kNumbers: return launch_any<T, T>(p, stream);
    case kE4m3: return launch_any<T, e4m3>(p, stream);
#ifndef DMC_HOT_KERNELS_ONLY  // a test of registers looks at one dtype
    case kInt8: return launch_any<T, int8>(p, stream);
#endif
    default: return cudaErrorInvalidValue;
  }
}

template cudaError_t launch_attention(const AttentionParams<bf16>&, cudaStream_t);
#ifndef DMC_HOT_KERNELS_ONLY
template cudaError_t launch_attention(const AttentionParams<fp16>&, cudaStream_t);
#endif

cudaError_t count_workers(int head_dim, Stored stored, int* count) {
  switch (stored) {
    case kNumbers: return workers_any<bf16>(head_dim, count);
    case kE4m3: return workers_any<e4m3>(head_dim, count);
#ifndef DMC_HOT_KERNELS_ONLY
    case kInt8: return workers_any<int8>(head_dim, count);
#endif
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace dmc
