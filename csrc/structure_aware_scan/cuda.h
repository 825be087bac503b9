// The CUDA kernels of structure_aware_scan, as plain functions. Their callers check the launches by cudaGetLastError().
#pragma once

#include "state_fusion/cuda.h"

namespace mmspatialmamba::cuda {

// taps: (25, dim), float32, contiguous. All maps have one dtype, and channels or columns of stride 1.
struct ScanInputs : ScanParameters {
  Size size;
  int32_t softplus;
  Map u, delta;
  const float* taps;
};

// Partial sums, for the caller to add up: B and C (groups, batch, height * width), where groups is padded_dim / 8;
// parameters (plan_blocks, 28, padded_dim).
struct ScanGradients {
  Map u, delta;
  float *B, *C, *parameters;
};

// The number of floats of workspace that a call needs.
int64_t scan_workspace(const Size& size, const Plan& plan);
int64_t scan_backward_workspace(const Size& size, const Plan& plan);

void structure_aware_scan(const ScanInputs& in, const Plan& plan, const Map& y, float* workspace, cudaStream_t stream);
void structure_aware_scan_backward(const ScanInputs& in, const Plan& plan, const Map& grad, const ScanGradients& out,
                                   float* workspace, cudaStream_t stream);

}  // namespace mmspatialmamba::cuda
