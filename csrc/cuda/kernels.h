// The CUDA kernels, as plain functions: no torch here nor in the .cu files, so that these compile in seconds.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace mmspatialmamba::cuda {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16 };

// A (batch, dim, height, width) array in device memory. Strides are in elements; that of channels or that of columns is 1.
struct Map {
  void* data;
  int64_t batch, channel, row, column;
};

// How a map is cut: a block takes 8 channels, `tile` columns and `rows` rows.
struct Plan {
  int32_t tile, tiles, rows, chunks;
};

struct Size {
  int32_t batch, dim, height, width;
};

// `max_tile` is a multiple of 8 and at most kMaxTile.
constexpr int kMaxTile = 128;
Plan make_plan(const Size& size, int multiprocessors, int max_tile = kMaxTile);

// Channels are padded to a multiple of 8 in the buffers that the kernels share.
constexpr int kChannels = 8;
inline int64_t padded_dim(int64_t dim) { return (dim + kChannels - 1) / kChannels * kChannels; }

// Inputs of the fused op. B and C are (batch, height * width), A, D and bias (dim,), taps (25, dim): float32, contiguous.
// bias may be null.
struct ScanInputs {
  Size size;
  DType dtype;  // of u, delta and of every map that goes with them
  int32_t softplus;
  Map u, delta;
  const float *A, *B, *C, *D, *taps, *bias;
};

// Partial sums, for the caller to add up: B and C (groups, batch, height * width), where groups is padded_dim / 8;
// parameters (plan_blocks, 28, padded_dim), the gradients of the 25 taps, of A, of D and of the bias.
struct ScanGradients {
  Map u, delta;
  float *B, *C, *parameters;
};

constexpr int kParameters = 28;
inline int64_t plan_blocks(const Size& size, const Plan& plan) {
  return static_cast<int64_t>(size.batch) * plan.chunks * plan.tiles;
}

// The number of floats of workspace that a call needs.
int64_t scan_workspace(const Size& size, const Plan& plan);
int64_t scan_backward_workspace(const Size& size, const Plan& plan);

cudaError_t structure_aware_scan(const ScanInputs& in, const Plan& plan, const Map& y, float* workspace,
                                 cudaStream_t stream);
cudaError_t structure_aware_scan_backward(const ScanInputs& in, const Plan& plan, const Map& grad,
                                          const ScanGradients& out, float* workspace, cudaStream_t stream);

// All maps are float32. parameters as above, with the last three rows 0.
cudaError_t state_fusion(const Size& size, const Plan& plan, const Map& h, const float* taps, const Map& out,
                         cudaStream_t stream);
cudaError_t state_fusion_backward(const Size& size, const Plan& plan, const Map& grad, const Map& h, const float* taps,
                                  const Map& grad_h, float* parameters, cudaStream_t stream);

// u and delta (batch, dim, length), A (dim, state), B (batch, state, length), bias (dim,) or null: contiguous, all but u
// and delta float32. `chunks` pieces of the length are worked on side by side.
struct SelectiveInputs {
  int32_t batch, dim, state, chunks;
  int64_t length;
  DType dtype;  // of u, delta and their gradients
  int32_t softplus;
  const void *u, *delta;
  const float *A, *B, *bias;
};

// B is (batch, state, length); parameters (batch * chunks, dim, state + 1) are partial sums of the gradients of A and, last,
// of the bias.
struct SelectiveGradients {
  void *u, *delta;
  float *B, *parameters;
};

int selective_chunks(int64_t rows, int64_t length, int multiprocessors);
int64_t selective_workspace(const SelectiveInputs& in);
int64_t selective_backward_workspace(const SelectiveInputs& in);

// h and grad are (batch, dim, state, length), float32, contiguous.
cudaError_t selective_scan(const SelectiveInputs& in, float* h, float* workspace, cudaStream_t stream);
cudaError_t selective_scan_backward(const SelectiveInputs& in, const float* grad, const float* h,
                                    const SelectiveGradients& out, float* workspace, cudaStream_t stream);

}  // namespace mmspatialmamba::cuda
