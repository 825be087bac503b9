// What kernels and the files that bind them share: plain data. Knows nothing of torch.
#pragma once

#include <stdint.h>

namespace mmspatialmamba {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16 };

// A (batch, channel, height, width) tensor; strides count elements.
struct Map {
  void* data;
  DType dtype;
  int64_t batch, channel, row, column;
};

// What a scan over maps takes beside u and delta, float32 and contiguous: A and D (dim), B and C (batch, height *
// width), bias (dim) or null.
struct ScanParameters {
  const float *A, *B, *C, *D, *bias;
};

}  // namespace mmspatialmamba
