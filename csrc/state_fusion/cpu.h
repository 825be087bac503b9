// The interface of the CPU kernels of state_fusion.
#pragma once

#include "common/types.h"

namespace mmspatialmamba {

// The kernels of dilation 1, 3 and 5, and the weight of each.
struct FusionKernels {
  Kernels3x3 of[3];
  float alpha[3];
};

struct FusionArgs : Shape {
  Map h;
  FusionKernels kernels;
};

struct StateFusionCpu {
  void (*forward)(const FusionArgs&, const Map& g, int64_t batch, int64_t block, float* scratch);
  // sums: (kTaps, batch, dim)
  void (*backward)(const FusionArgs&, const Map& grad, const Map& grad_h, float* sums, int64_t batch, int64_t block,
                   float* scratch);

  static int64_t forward_scratch(int64_t width) { return row_floats(11, width + 10) + row_floats(1, width); }
  static int64_t backward_scratch(int64_t width) { return row_floats(22, width + 10) + row_floats(4, width); }
};

extern const StateFusionCpu state_fusion_baseline, state_fusion_avx2, state_fusion_avx512;

}  // namespace mmspatialmamba
