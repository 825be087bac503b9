// The interface of the CPU kernels of depthwise_conv.
#pragma once

#include "common/types.h"

namespace mmspatialmamba {

// What a depthwise convolution ends with: nothing, SiLU, or the addition of its input.
enum class Finish { kNone, kSilu, kResidual };

struct ConvArgs : Shape {
  Map x;
  Kernels3x3 weights;
  const float* bias;  // (dim)
  Finish finish;
};

struct DepthwiseConvCpu {
  // Rows `first` to `last` - 1.
  void (*forward)(const ConvArgs&, const Map& y, int64_t batch, int64_t block, int64_t first, int64_t last,
                  float* scratch);
  // sums: (10, batch, dim), of the 9 weights and of the bias
  void (*backward)(const ConvArgs&, const Map& grad, const Map& grad_x, float* sums, int64_t batch, int64_t block,
                   float* scratch);

  static int64_t forward_scratch(int64_t width) { return row_floats(3, width + 10) + row_floats(1, width); }
  static int64_t backward_scratch(int64_t width) { return row_floats(8, width + 10) + row_floats(3, width); }
};

extern const DepthwiseConvCpu depthwise_conv_baseline, depthwise_conv_avx2, depthwise_conv_avx512;

}  // namespace mmspatialmamba
