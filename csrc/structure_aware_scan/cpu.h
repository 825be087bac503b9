// The interface of the CPU kernels of structure_aware_scan.
#pragma once

#include "state_fusion/cpu.h"

namespace mmspatialmamba {

struct ScanArgs : Shape, ScanParameters {
  Map u, delta;
  FusionKernels kernels;
  bool softplus;
};

struct ScanGradients {
  Map y;         // the gradient that comes in
  Map u, delta;  // those that go out
  float* B;      // (blocks, batch, height * width), to be summed over blocks
  float* C;      // like B
  float* sums;   // (kTaps + 3, batch, dim), to be summed over batch: of taps, A, D, bias
};

struct StructureAwareScanCpu {
  void (*forward)(const ScanArgs&, const Map& y, int64_t batch, int64_t block, float* scratch);
  void (*backward)(const ScanArgs&, const ScanGradients&, int64_t batch, int64_t block, float* scratch);

  static int64_t forward_scratch(int64_t width) { return row_floats(11, width + 10) + row_floats(3, width); }
  static int64_t backward_scratch(int64_t height, int64_t width) {
    return row_floats(height + 11, width + 10) + row_floats(6, width);
  }
};

extern const StructureAwareScanCpu structure_aware_scan_baseline, structure_aware_scan_avx2,
    structure_aware_scan_avx512;

}  // namespace mmspatialmamba
