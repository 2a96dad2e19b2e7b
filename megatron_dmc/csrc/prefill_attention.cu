#include "dispatch.h"
#include "kernels.h"

namespace dmc {
namespace {

template <class T, int kHeadDim, bool kDelayed>
__global__ void __launch_bounds__(PrefillSizes<kHeadDim, kDelayed>::kThreads,
                                  PrefillSizes<kHeadDim, kDelayed>::kBlocks)
    prefill_kernel(__grid_constant__ const PrefillAttentionParams<T> p) {
  extern __shared__ __align__(16) char shared_memory[];
  attend_tile<T, kHeadDim, kDelayed>(p, shared_memory);
}

template <class T, int kHeadDim, bool kDelayed>
cudaError_t launch(const PrefillAttentionParams<T>& p, cudaStream_t stream) {
  using Sizes = PrefillSizes<kHeadDim, kDelayed>;
  static_assert(Sizes::kRows == prefill_rows(kHeadDim));
  const auto kernel = prefill_kernel<T, kHeadDim, kDelayed>;
  const cudaError_t error = reserve_shared_memory(kernel, Sizes::kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<p.num_tiles * p.num_kv_heads, Sizes::kThreads, Sizes::kBytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

template <class T>
cudaError_t launch_prefill_attention(const PrefillAttentionParams<T>& p, cudaStream_t stream) {
  if (p.num_tiles == 0) return cudaSuccess;
  return with_head_dim(p.kv.head_dim, [&](auto head_dim) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    return p.delay ? launch<T, kHeadDim, true>(p, stream) : launch<T, kHeadDim, false>(p, stream);
  });
}

template cudaError_t launch_prefill_attention(const PrefillAttentionParams<bf16>&, cudaStream_t);
#ifndef DMC_HOT_KERNELS_ONLY
template cudaError_t launch_prefill_attention(const PrefillAttentionParams<fp16>&, cudaStream_t);
#endif

}  // namespace dmc
