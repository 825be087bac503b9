// The fusion's three kernels: checked, as the CPU takes them, and as one of 25 taps and back.
#pragma once

#include <tuple>

#include "common/bind_cpu.h"
#include "common/taps.h"
#include "state_fusion/cpu.h"

namespace mmspatialmamba {

// The taps are the kernels' 27 elements in their order, without number 13 and number 22, the later kernels' centres.
constexpr bool are_elements_in_order() {
  for (int i = 0, next = 0; i < 27; ++i) {
    const int tap = kElementTaps.of[i / 9][i % 9];
    if (tap != (i == 13 || i == 22 ? kCentre : next++)) return false;
  }
  return kCentre == 4;
}
static_assert(are_elements_in_order(), "merge_taps and split_taps_gradient contradict the table of taps");

inline void check_kernels(const Checks& checks, int64_t dim, Arg k1, Arg k3, Arg k5, Arg alpha) {
  checks("k1", k1, {dim, 1, 3, 3});
  checks("k3", k3, {dim, 1, 3, 3});
  checks("k5", k5, {dim, 1, 3, 3});
  checks("alpha", alpha, {3});
}

// The kernels that the CPU's tasks merge, each for its own channels.
struct CpuFusionKernels {
  at::Tensor k1, k3, k5, alpha;

  CpuFusionKernels(Arg k1_, Arg k3_, Arg k5_, Arg alpha_)
      : k1(dense_kernels(k1_)), k3(dense_kernels(k3_)), k5(dense_kernels(k5_)), alpha(floats(alpha_)) {}

  FusionKernels get() const {
    const float* a = alpha.const_data_ptr<float>();
    return {{kernels3x3(k1), kernels3x3(k3), kernels3x3(k5)}, {a[0], a[1], a[2]}};
  }
};

inline at::Tensor stack_kernels(Arg k1, Arg k3, Arg k5) {
  const auto flat = [](Arg kernel) { return kernel.to(at::kFloat).reshape({kernel.size(0), 9}); };
  return at::stack({flat(k1), flat(k3), flat(k5)});
}

// (25, dim), float32, contiguous.
inline at::Tensor merge_taps(Arg k1, Arg k3, Arg k5, Arg alpha) {
  const at::Tensor weighted = stack_kernels(k1, k3, k5) * alpha.to(at::kFloat).view({3, 1, 1});
  const at::Tensor all = weighted.transpose(1, 2).reshape({27, k1.size(0)});
  at::Tensor taps = at::cat({all.narrow(0, 0, 13), all.narrow(0, 14, 8), all.narrow(0, 23, 4)});
  taps.select(0, kCentre).add_(all.select(0, 13)).add_(all.select(0, 22));
  return taps;
}

// The gradients of k1, k3, k5 and alpha from that of the taps, (25, dim).
inline Tensors<4> split_taps_gradient(Arg grad_taps, Arg k1, Arg k3, Arg k5, Arg alpha) {
  const at::Tensor centre = grad_taps.narrow(0, kCentre, 1);
  const at::Tensor all =
      at::cat({grad_taps.narrow(0, 0, 13), centre, grad_taps.narrow(0, 13, 8), centre, grad_taps.narrow(0, 21, 4)});
  const at::Tensor grads = all.view({3, 9, k1.size(0)}).transpose(1, 2);
  const at::Tensor weighted = grads * alpha.to(at::kFloat).view({3, 1, 1});
  const at::Tensor grad_alpha = (grads * stack_kernels(k1, k3, k5)).sum({1, 2});
  return {as(weighted.select(0, 0), k1), as(weighted.select(0, 1), k3), as(weighted.select(0, 2), k5),
          as(grad_alpha, alpha)};
}

}  // namespace mmspatialmamba
