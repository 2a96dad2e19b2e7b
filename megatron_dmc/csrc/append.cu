#include "dispatch.h"
#include "kernels.h"
#include "launch.h"

namespace dmc {
namespace {

constexpr int kThreads = 128;

template <class T, class S, int kHeadDim, bool kDelayed>
__global__ void __launch_bounds__(kThreads) append_kernel(__grid_constant__ const AppendParams<T> p) {
  wait_for_kernels_before();
  let_next_kernel_start();
  const int index = (blockIdx.x * kThreads + threadIdx.x) / kWarp;
  if (index < p.num_requests * p.num_kv_heads) append_token<T, S, kHeadDim, kDelayed>(p, index);
}

template <class T, class S, int kHeadDim>
cudaError_t launch(const AppendParams<T>& p, cudaStream_t stream) {
  const int heads = p.num_requests * p.num_kv_heads;
  const int blocks = (heads * kWarp + kThreads - 1) / kThreads;
  const auto kernel = p.delay ? append_kernel<T, S, kHeadDim, true> : append_kernel<T, S, kHeadDim, false>;
  return launch_early(kernel, blocks, kThreads, 0, stream, p);
}

}  // namespace

template <class T>
cudaError_t launch_append(const AppendParams<T>& p, cudaStream_t stream) {
  if (p.num_requests == 0) return cudaSuccess;
  return with_stored<T>(p.kv.stored, [&](auto stored) {
    return with_head_dim(p.kv.head_dim, [&](auto head_dim) {
      return launch<T, decltype(stored), decltype(head_dim)::value>(p, stream);
    });
  });
}

template cudaError_t launch_append(const AppendParams<bf16>&, cudaStream_t);
#ifndef DMC_HOT_KERNELS_ONLY
template cudaError_t launch_append(const AppendParams<fp16>&, cudaStream_t);
#endif

}  // namespace dmc
