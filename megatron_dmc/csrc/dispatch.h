// Dispatch from runtime sizes and dtypes to the template arguments that kernels are built for.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "dmc/stored.h"

namespace dmc {

// Allow a kernel's blocks `bytes` of dynamic shared memory, and request the split of L1 and shared memory
// that keeps most of them resident; the driver's default may hold fewer. Both are set per device, so at
// every launch; that adds no launch.
template <class Kernel>
cudaError_t reserve_shared_memory(Kernel kernel, int bytes) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                              cudaSharedmemCarveoutMaxShared);
}

// f(std::integral_constant<int, head_dim>{}).
template <class F>
cudaError_t with_head_dim(int head_dim, F f) {
  switch (head_dim) {
    case 64: return f(std::integral_constant<int, 64>{});
    case 96: return f(std::integral_constant<int, 96>{});
    case 128: return f(std::integral_constant<int, 128>{});
    case 256: return f(std::integral_constant<int, 256>{});
    default: return cudaErrorInvalidValue;
  }
}

// f(S{}), S being the storage type of pages: T itself, or an 8-bit type.
template <class T, class F>
cudaError_t with_stored(Stored stored, F f) {
  switch (stored) {
    case kNumbers: return f(T{});
    case kE4m3: return f(e4m3{});
#ifndef DMC_HOT_KERNELS_ONLY  // the register test compiles one 8-bit type and one dtype
    case kInt8: return f(int8{});
#endif
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace dmc
