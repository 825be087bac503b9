// Linear recurrences over segments that blocks of threads scanned.
#pragma once

#include "selective_scan/scan.cuh"

namespace mmspatialmamba::cuda {

// From the steps over consecutive segments, (batch, segments, width), the states that enter them, the first being 0.
// Width is a multiple of 8. kReverse: the last segment comes first.
struct Combine {
  const Affine* steps;
  float* states;
  int64_t segments;
  int width;
  bool reverse;
};

static __global__ void __launch_bounds__(kThreads) combine_kernel(const Combine p) {
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
      index[j] = (batch * p.segments + (p.reverse ? p.segments - 1 - i : i)) * p.width + channel;
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

static inline void combine(const Affine* steps, float* states, int64_t batch, int64_t segments, int64_t width,
                           bool reverse, cudaStream_t stream) {
  const Combine p{steps, states, segments, static_cast<int>(width), reverse};
  launch(combine_kernel, batch * (width / 8), kThreads, 0, stream, p);
}

}  // namespace mmspatialmamba::cuda
