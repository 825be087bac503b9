// The fusion's kernels as the CPU takes them.
#pragma once

#include "common/parallel.h"
#include "state_fusion/cpu.h"

namespace mmspatialmamba {

// They are merged block by block, so they only need to be dense.
struct CpuFusionKernels {
  at::Tensor k1, k3, k5, alpha;

  CpuFusionKernels(const at::Tensor& k1_, const at::Tensor& k3_, const at::Tensor& k5_, const at::Tensor& alpha_)
      : k1(dense_kernels(k1_)), k3(dense_kernels(k3_)), k5(dense_kernels(k5_)), alpha(floats(alpha_)) {}

  FusionKernels get() const {
    const float* a = alpha.const_data_ptr<float>();
    return {{kernels3x3(k1), kernels3x3(k3), kernels3x3(k5)}, {a[0], a[1], a[2]}};
  }
};

}  // namespace mmspatialmamba
