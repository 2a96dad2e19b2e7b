// From sizes and kinds to the template arguments of kernels: what kernels are built for.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "dmc/stored.h"

namespace dmc {

// Lets a kernel's blocks have so much dynamic shared memory, and asks for the split of L1 and shared memory
// under which most of them are resident; the driver's own choice may hold fewer. Both are set for every
// device that a process uses, so at every launch; that costs no launch.
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

// f(S{}), S being what pages hold: T itself, or an 8-bit type.
template <class T, class F>
cudaError_t with_stored(Stored stored, F f) {
  switch (stored) {
    case kNumbers: return f(T{});
    case kE4m3: return f(e4m3{});
#ifndef DMC_HOT_KERNELS_ONLY  // a test of registers looks at one 8-bit type, and at one dtype
    case kInt8: return f(int8{});
#endif
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace dmc
