// The CUDA kernels of selective_scan, as plain functions. Their callers check the launches by cudaGetLastError().
#pragma once

#include <cuda_runtime_api.h>

#include "common/types.h"

namespace mmspatialmamba::cuda {

// u and delta (batch, dim, length), A (dim, state), B (batch, state, length), bias (dim,) or null: contiguous, all but
// u and delta float32. `chunks` pieces of the length are worked on side by side.
struct SelectiveInputs {
  int32_t batch, dim, state, chunks;
  int64_t length;
  DType dtype;  // of u, delta and their gradients
  int32_t softplus;
  const void *u, *delta;
  const float *A, *B, *bias;
};

// B is (batch, state, length); parameters (batch * chunks, dim, state + 1) are partial sums of the gradients of A and,
// last, of the bias.
struct SelectiveGradients {
  void *u, *delta;
  float *B, *parameters;
};

int selective_chunks(int64_t rows, int64_t length, int multiprocessors);

// The number of floats of workspace that a call needs.
int64_t selective_workspace(const SelectiveInputs& in);
int64_t selective_backward_workspace(const SelectiveInputs& in);

// h and grad are (batch, dim, state, length), float32, contiguous.
void selective_scan(const SelectiveInputs& in, float* h, float* workspace, cudaStream_t stream);
void selective_scan_backward(const SelectiveInputs& in, const float* grad, const float* h,
                             const SelectiveGradients& out, float* workspace, cudaStream_t stream);

}  // namespace mmspatialmamba::cuda
