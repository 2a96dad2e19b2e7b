// Kernel launches, without torch: addresses, sizes and a stream. Each returns the launch's error code.
#pragma once

#include <cuda_runtime_api.h>

#include "dmc/append.h"
#include "dmc/attention.h"
#include "dmc/prefill.h"
#include "dmc/prefill_attention.h"
#include "dmc/release.h"

namespace dmc {

// head_dim is 64, 96, 128 or 256.
template <class T>
cudaError_t launch_append(const AppendParams<T>& p, cudaStream_t stream);

// One launch per kernel; head_dim as above.
template <class T>
cudaError_t launch_prefill_write(const PrefillParams<T>& p, cudaStream_t stream);

// tile_tokens times the group at most prefill_rows(head_dim); head_dim as above.
template <class T>
cudaError_t launch_prefill_attention(const PrefillAttentionParams<T>& p, cudaStream_t stream);

cudaError_t launch_plan(const PlanParams& p, cudaStream_t stream);

// Group at most 16, with head_dim 256 at most 8.
template <class T>
cudaError_t launch_attention(const AttentionParams<T>& p, cudaStream_t stream);

cudaError_t launch_release(const ReleaseParams& p, cudaStream_t stream);

// Workers that the current device runs concurrently over pages of this type.
cudaError_t count_workers(int head_dim, Stored stored, int* count);

}  // namespace dmc
