#include "kernels.h"

namespace dmc {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) release_kernel(__grid_constant__ const ReleaseParams p) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index < p.num_ids) release_page(p, index);
}

}  // namespace

cudaError_t launch_release(const ReleaseParams& p, cudaStream_t stream) {
  if (p.num_ids == 0) return cudaSuccess;
  const int64_t blocks = (p.num_ids + kThreads - 1) / kThreads;
  release_kernel<<<int(blocks), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace dmc
