#include "kernels.h"

namespace dmc {
namespace {

constexpr int kThreads = 128;

template <class T, class S, int kHeadDim>
__global__ void __launch_bounds__(kThreads) append_kernel(__grid_constant__ const AppendParams<T> p) {
  const int index = (blockIdx.x * kThreads + threadIdx.x) / kWarp;
  if (index < p.num_requests * p.num_kv_heads) append_token<T, S, kHeadDim>(p, index);
}

template <class T, class S>
cudaError_t launch(const AppendParams<T>& p, cudaStream_t stream) {
  const int heads = p.num_requests * p.num_kv_heads;
  const int blocks = (heads * kWarp + kThreads - 1) / kThreads;
  if (blocks == 0) return cudaSuccess;
  switch (p.kv.head_dim) {
    case 64: append_kernel<T, S, 64><<<blocks, kThreads, 0, stream>>>(p); break;
    case 96: append_kernel<T, S, 96><<<blocks, kThreads, 0, stream>>>(p); break;
    case 128: append_kernel<T, S, 128><<<blocks, kThreads, 0, stream>>>(p); break;
    case 256: append_kernel<T, S, 256><<<blocks, kThreads, 0, stream>>>(p); break;
    default: return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace

template <class T>
cudaError_t launch_append(const AppendParams<T>& p, cudaStream_t stream) {
  switch (p.kv.stored) {
    case kNumbers: return launch<T, T>(p, stream);
    case kE4m3: return launch<T, e4m3>(p, stream);
#ifndef DMC_HOT_KERNELS_ONLY  // a test of registers looks at one dtype
    case kInt8: return launch<T, int8>(p, stream);
#endif
    default: return cudaErrorInvalidValue;
  }
}

template cudaError_t launch_append(const AppendParams<bf16>&, cudaStream_t);
#ifndef DMC_HOT_KERNELS_ONLY
template cudaError_t launch_append(const AppendParams<fp16>&, cudaStream_t);
#endif

}  // namespace dmc
