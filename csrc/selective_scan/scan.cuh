// Linear recurrences x -> a * x + b, scanned by the threads of a block.
#pragma once

#include <cuda_runtime.h>

#include "common/launch.cuh"

namespace mmspatialmamba::cuda {

struct __align__(8) Affine {
  float a, b;

  __device__ __forceinline__ float operator()(float x) const { return fmaf(a, x, b); }
  // This step, then the `next`.
  __device__ __forceinline__ Affine then(Affine next) const { return {a * next.a, fmaf(next.a, b, next.b)}; }
};

struct Scanned {
  Affine before, total;
};

// Every thread brings the step over its own positions and gets the step over those before it, and over all. Threads
// whose numbers are equal modulo kStride scan together; kReverse: from the last thread to the first. `warps` is shared
// memory for kStride * kWarps steps. All threads of the block must call this, with a __syncthreads() between two calls.
template <int kStride, bool kReverse = false>
__device__ __forceinline__ Scanned scan_block(Affine own, Affine* warps) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, count = blockDim.x / 32;
  const int depth = kReverse ? 31 - lane : lane;  // counted from where the scan starts
  auto previous = [](float value, int offset) {
    return kReverse ? __shfl_down_sync(kFullWarp, value, offset) : __shfl_up_sync(kFullWarp, value, offset);
  };
#pragma unroll
  for (int offset = kStride; offset < 32; offset *= 2) {
    const Affine earlier{previous(own.a, offset), previous(own.b, offset)};
    if (depth >= offset) own = earlier.then(own);
  }
  if (depth >= 32 - kStride) warps[warp * kStride + lane % kStride] = own;
  Affine inside{1.f, 0.f};
  if (kStride < 32) {
    inside = {previous(own.a, kStride), previous(own.b, kStride)};
    if (depth < kStride) inside = {1.f, 0.f};
  }
  __syncthreads();
  Affine before{1.f, 0.f}, total{1.f, 0.f};
  for (int i = 0; i < count; ++i) {
    const int w = kReverse ? count - 1 - i : i;
    if (w == warp) before = total;
    total = total.then(warps[w * kStride + lane % kStride]);
  }
  return {before.then(inside), total};
}

// From the steps over consecutive segments, (batch, segments, width), the states that enter them, the first being 0.
// Width is a multiple of 8. kReverse: the last segment comes first.
struct Combine {
  const Affine* steps;
  float* states;
  int64_t segments;
  int width;
};

template <bool kReverse>
__global__ void __launch_bounds__(kThreads) combine_kernel(const Combine p) {
  __shared__ Affine warps[8 * kWarps];
  const int groups = p.width / 8;
  const int64_t batch = blockIdx.x / groups;
  const int channel = blockIdx.x % groups * 8 + threadIdx.x % 8;
  float state = 0.f;
  for (int64_t first = 0; first < p.segments; first += kThreads / 8 * kColumns) {
    int64_t index[kColumns];
    Affine steps[kColumns], own{1.f, 0.f};
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int64_t i = first + threadIdx.x / 8 * kColumns + j;
      index[j] = (batch * p.segments + (kReverse ? p.segments - 1 - i : i)) * p.width + channel;
      steps[j] = i < p.segments ? p.steps[index[j]] : Affine{1.f, 0.f};
      own = own.then(steps[j]);
    }
    const Scanned scanned = scan_block<8>(own, warps);
    float entering = scanned.before(state);
    state = scanned.total(state);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (first + threadIdx.x / 8 * kColumns + j < p.segments) p.states[index[j]] = entering;
      entering = steps[j](entering);
    }
    __syncthreads();
  }
}

template <bool kReverse>
void combine(const Affine* steps, float* states, int64_t batch, int64_t segments, int64_t width, cudaStream_t stream) {
  const Combine p{steps, states, segments, static_cast<int>(width)};
  launch(combine_kernel<kReverse>, batch * (width / 8), kThreads, 0, stream, p);
}

}  // namespace mmspatialmamba::cuda
