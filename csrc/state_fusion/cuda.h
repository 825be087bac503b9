// The CUDA kernels of state_fusion, as plain functions. Their callers check the launches by cudaGetLastError().
#pragma once

#include <cuda_runtime_api.h>

#include "common/plan.h"

namespace mmspatialmamba::cuda {

// Gradients of parameters that a block adds up: of the 25 taps, of A, of D and of the bias.
constexpr int kParameters = 28;

// All maps are float32; taps (25, dim). parameters (plan_blocks, 28, padded_dim) are partial sums, for the caller to
// add up; the last three rows are 0.
void state_fusion(const Size& size, const Plan& plan, const Map& h, const float* taps, const Map& out,
                  cudaStream_t stream);
void state_fusion_backward(const Size& size, const Plan& plan, const Map& grad, const Map& h, const float* taps,
                           const Map& grad_h, float* parameters, cudaStream_t stream);

}  // namespace mmspatialmamba::cuda
