// The fusion's three kernels as one of 25 taps, and back.
#pragma once

#include <ATen/ATen.h>

#include <tuple>

namespace mmspatialmamba {

inline at::Tensor stack_kernels(const at::Tensor& k1, const at::Tensor& k3, const at::Tensor& k5) {
  const auto flat = [](const at::Tensor& kernel) { return kernel.to(at::kFloat).reshape({kernel.size(0), 9}); };
  return at::stack({flat(k1), flat(k3), flat(k5)});
}

// (25, dim), float32: 9 taps of dilation 1, the centre being the sum of all three, then 8 of dilation 3 and 8 of 5. Of the
// kernels' 27 elements, number 13 and number 22 are the centres of dilation 3 and 5.
inline at::Tensor merge_taps(const at::Tensor& k1, const at::Tensor& k3, const at::Tensor& k5, const at::Tensor& alpha) {
  const int64_t dim = k1.size(0);
  const at::Tensor weighted = stack_kernels(k1, k3, k5) * alpha.to(at::kFloat).view({3, 1, 1});
  const at::Tensor all = weighted.transpose(1, 2).reshape({27, dim});
  at::Tensor taps = at::cat({all.narrow(0, 0, 13), all.narrow(0, 14, 8), all.narrow(0, 23, 4)});
  taps.select(0, 4).add_(all.select(0, 13)).add_(all.select(0, 22));
  return taps;
}

// The gradients of k1, k3, k5 and alpha from that of the taps.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> split_taps_gradient(
    const at::Tensor& grad_taps, const at::Tensor& k1, const at::Tensor& k3, const at::Tensor& k5,
    const at::Tensor& alpha) {
  const int64_t dim = k1.size(0);
  const at::Tensor centre = grad_taps.narrow(0, 4, 1);
  const at::Tensor all = at::cat(
      {grad_taps.narrow(0, 0, 13), centre, grad_taps.narrow(0, 13, 8), centre, grad_taps.narrow(0, 21, 4)});
  const at::Tensor grads = all.view({3, 9, dim}).transpose(1, 2);
  const at::Tensor weighted = grads * alpha.to(at::kFloat).view({3, 1, 1});
  const auto of = [&](int i, const at::Tensor& kernel) {
    at::Tensor grad = at::empty_like(kernel);
    grad.copy_(weighted.select(0, i).reshape(kernel.sizes()));
    return grad;
  };
  const at::Tensor grad_alpha = (grads * stack_kernels(k1, k3, k5)).sum({1, 2}).to(alpha.scalar_type());
  return {of(0, k1), of(1, k3), of(2, k5), grad_alpha};
}

}  // namespace mmspatialmamba
