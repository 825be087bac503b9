#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <limits>

#ifdef __CUDACC__
#define MMSPATIALMAMBA_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace mmspatialmamba::cuda {

template <class Kernel, class Argument>
cudaError_t launch(Kernel kernel, int64_t blocks, int threads, size_t shared_bytes, cudaStream_t stream,
                   const Argument& argument) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(shared_bytes));
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(argument);
  return cudaGetLastError();
}

}  // namespace mmspatialmamba::cuda
#else
#include "emulator.h"
#endif

// Launches, and returns from the calling function on failure.
#define MMSPATIALMAMBA_LAUNCH(...)                                              \
  do {                                                                          \
    const cudaError_t launch_error = ::mmspatialmamba::cuda::launch(__VA_ARGS__); \
    if (launch_error != cudaSuccess) return launch_error;                       \
  } while (false)
