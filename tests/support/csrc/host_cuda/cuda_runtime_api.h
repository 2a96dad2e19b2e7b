// The little of CUDA's runtime that binding.cpp and kernels.h name, for kernels that run on a host.
#pragma once

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;
