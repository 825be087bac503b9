// Launches of CUDA kernels, on a GPU or by the tests' emulator. What fails is found by cudaGetLastError().
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace mmspatialmamba::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kFullWarp = 0xffffffffu;
// Positions a thread takes at once; odd, so that a warp's accesses to shared memory spread over all banks.
constexpr int kColumns = 5;

}  // namespace mmspatialmamba::cuda

#ifdef __CUDACC__
#define MMSPATIALMAMBA_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace mmspatialmamba::cuda {

template <class Kernel, class Argument>
void launch(Kernel kernel, int64_t blocks, int threads, int shared_bytes, cudaStream_t stream,
            const Argument& argument) {
  if (blocks == 0) return;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  // More than CUDA takes are more than it takes after narrowing, too.
  const unsigned grid = static_cast<unsigned>(std::min<int64_t>(blocks, UINT32_MAX));
  kernel<<<grid, threads, shared_bytes, stream>>>(argument);
}

}  // namespace mmspatialmamba::cuda
#else
#include "emulator.h"
#endif
