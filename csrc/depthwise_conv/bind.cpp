// Binds the CPU kernels of depthwise_conv to its ops.
#include <string>

#include "common/bind_cpu.h"
#include "depthwise_conv/cpu.h"

namespace mmspatialmamba {
namespace {

Finish finish_of(const char* op, const std::string& name) {
  if (name == "silu") return Finish::kSilu;
  if (name == "residual") return Finish::kResidual;
  TORCH_CHECK(name == "none", op, ": finish must be 'none', 'silu' or 'residual', but is '", name, "'");
  return Finish::kNone;
}

// The checked arguments of the kernels, and the tensors that they point into.
struct Inputs {
  Checks checks;
  at::Tensor weights, bias;
  ConvArgs args;

  Inputs(const char* op, Arg x, Arg weight, Arg bias_, const std::string& finish) : checks(op, "x", x) {
    checks.dimensions("x", x, 4);
    checks("weight", weight, {x.size(1), 1, 3, 3});
    checks("bias", bias_, {x.size(1)});
    weights = dense_kernels(weight);
    bias = floats(bias_);
    args = {shape_of(x), map_of(x), kernels3x3(weights), bias.const_data_ptr<float>(), finish_of(op, finish)};
  }
};

at::Tensor depthwise_conv(Arg x, Arg weight, Arg bias, const std::string& finish) {
  const Inputs in("depthwise_conv", x, weight, bias, finish);
  const ConvArgs& args = in.args;
  at::Tensor y = at::empty_like(x);
  const Map out = map_of(y);
  constexpr int64_t kRows = 32;
  const int64_t pieces = (args.height + kRows - 1) / kRows;
  const Shape shape{args.batch * pieces, args.dim, kRows, args.width};
  parallel_blocks(shape, DepthwiseConvCpu::forward_scratch(args.width), [&](int64_t piece, auto block, auto scratch) {
    const int64_t first = piece % pieces * kRows, last = std::min(first + kRows, args.height);
    MMSPATIALMAMBA_CPU(depthwise_conv).forward(args, out, piece / pieces, block, first, last, scratch);
  });
  return y;
}

Tensors<3> depthwise_conv_backward(Arg grad, Arg x, Arg weight, Arg bias, const std::string& finish) {
  const Inputs in("depthwise_conv_backward", x, weight, bias, finish);
  const ConvArgs& args = in.args;
  in.checks("grad", grad, x.sizes());
  at::Tensor grad_x = at::empty_like(x), sums = zero_floats({10, args.batch, args.dim}, x);
  const Map grads = map_of(grad), out = map_of(grad_x);
  float* const partial = sums.mutable_data_ptr<float>();
  parallel_blocks(args, DepthwiseConvCpu::backward_scratch(args.width), [&](auto... task) {
    MMSPATIALMAMBA_CPU(depthwise_conv).backward(args, grads, out, partial, task...);
  });
  sums = sums.sum(1);
  return {grad_x, as(sums.narrow(0, 0, 9).t(), weight), as(sums.select(0, 9), bias)};
}

MMSPATIALMAMBA_BIND(CPU, depthwise_conv, depthwise_conv, depthwise_conv_backward)

}  // namespace
}  // namespace mmspatialmamba
