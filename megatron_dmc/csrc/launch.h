// Launches of a decode step's kernels that may overlap (programmatic dependent launch).
//
// With DMC_PROGRAMMATIC_LAUNCH=1 the blocks of append, attention and join are placed while the kernel before them in the
// stream ends; they wait there until it has ended and its writes are visible. A kernel lets the next one start once it
// has waited itself, so of two kernels in a row only the second can be early. Without the variable, and where the code that
// runs is not made for sm_90 or later, launches are ordinary.
#pragma once

#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>

namespace dmc {

inline bool programmatic_launch_is_asked_for() {
  static const bool asked = [] {
    const char* value = std::getenv("DMC_PROGRAMMATIC_LAUNCH");
    return value && std::strcmp(value, "1") == 0;
  }();
  return asked;
}

// Launch a kernel that begins with wait_for_kernels_before().
template <class P>
cudaError_t launch_early(void (*kernel)(P), int blocks, int threads, int shared_bytes, cudaStream_t stream,
                         const P& p) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &early;
  if (programmatic_launch_is_asked_for()) {
    cudaFuncAttributes code;
    const cudaError_t error = cudaFuncGetAttributes(&code, kernel);
    if (error != cudaSuccess) return error;
    config.numAttrs = code.ptxVersion >= 90;  // PTX of sm_80 on a later GPU does not wait
  }
  return cudaLaunchKernelEx(&config, kernel, p);
}

}  // namespace dmc
