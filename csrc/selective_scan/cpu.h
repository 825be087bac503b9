// The interface of the CPU kernels of selective_scan.
#pragma once

#include "common/types.h"

namespace mmspatialmamba {

struct SelectiveScanArgs {
  int64_t batch, dim, length, state;
  Map u, delta;       // (batch, dim, 1, length)
  const float* A;     // (dim, state)
  const float* B;     // (batch, state, length)
  const float* bias;  // (dim), or null
  bool softplus;
};

struct SelectiveScanGradients {
  Map u, delta;
  float* A;     // (batch, dim, state), to be summed over batch
  float* B;     // (blocks, batch, state, length), to be summed over blocks
  float* bias;  // (batch, dim), to be summed over batch
};

struct SelectiveScanCpu {
  // grad, h: (batch, dim, state, length), float32, contiguous
  void (*forward)(const SelectiveScanArgs&, float* h, int64_t batch, int64_t block, float* scratch);
  void (*backward)(const SelectiveScanArgs&, const float* grad, const float* h, const SelectiveScanGradients&,
                   int64_t batch, int64_t block, float* scratch);

  static int64_t forward_scratch() { return row_floats(3, 64); }
  static int64_t backward_scratch(int64_t state) { return row_floats(6, 64) + row_floats(2, state); }
};

extern const SelectiveScanCpu selective_scan_baseline, selective_scan_avx2, selective_scan_avx512;

}  // namespace mmspatialmamba
