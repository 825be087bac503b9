// The schemas of the compiled ops; mmspatialmamba/ops/library.py says what they compute, and adds autograd to them.
#include <torch/library.h>

TORCH_LIBRARY(mmspatialmamba_native, m) {
  m.def(
      "selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor? delta_bias, bool delta_softplus) -> Tensor");
  m.def(
      "selective_scan_backward(Tensor grad, Tensor h, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor? delta_bias, "
      "bool delta_softplus) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("state_fusion(Tensor h, Tensor k1, Tensor k3, Tensor k5, Tensor alpha) -> Tensor");
  m.def(
      "state_fusion_backward(Tensor grad, Tensor h, Tensor k1, Tensor k3, Tensor k5, Tensor alpha) -> (Tensor, Tensor, "
      "Tensor, Tensor, Tensor)");
  m.def(
      "structure_aware_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor k1, Tensor k3, "
      "Tensor k5, Tensor alpha, Tensor? delta_bias, bool delta_softplus) -> Tensor");
  m.def(
      "structure_aware_scan_backward(Tensor grad, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, "
      "Tensor k1, Tensor k3, Tensor k5, Tensor alpha, Tensor? delta_bias, bool delta_softplus) -> (Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("depthwise_conv(Tensor x, Tensor weight, Tensor bias, str finish) -> Tensor");
  m.def(
      "depthwise_conv_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, str finish) -> (Tensor, Tensor, "
      "Tensor)");
  m.def("downsampling_conv(Tensor x, Tensor weight, Tensor bias) -> Tensor");
  m.def(
      "downsampling_conv_backward(Tensor grad, Tensor y, Tensor x, Tensor weight, Tensor bias) -> (Tensor, Tensor, "
      "Tensor)");
  m.def("gated_layer_norm(Tensor x, Tensor gate, Tensor weight, Tensor bias, float eps) -> Tensor");
  m.def(
      "gated_layer_norm_backward(Tensor grad, Tensor x, Tensor gate, Tensor weight, Tensor bias, float eps) -> (Tensor, "
      "Tensor, Tensor, Tensor)");
  m.def("biased_gelu(Tensor x, Tensor bias) -> Tensor");
  m.def("biased_gelu_backward(Tensor grad, Tensor x, Tensor bias) -> (Tensor, Tensor)");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("linear_weight_gradient(Tensor grad, Tensor x) -> Tensor");
  m.def("gelu_linear(Tensor x, Tensor gelu_bias, Tensor weight, Tensor bias) -> Tensor");
  m.def(
      "gelu_linear_backward(Tensor grad, Tensor x, Tensor gelu_bias, Tensor weight, Tensor bias) -> (Tensor, Tensor, "
      "Tensor, Tensor)");
  // For inference alone: no autograd, in float32 or bfloat16 as x is, on the CPU.
  // Convolutions come with their BatchNorm: weight, bias, running mean and variance, or nothing.
  m.def(
      "stem(Tensor x, Tensor weight1, Tensor? bias1, Tensor[] norm1, float eps1, Tensor weight2, Tensor? bias2, Tensor[] "
      "norm2, float eps2, Tensor weight3, Tensor? bias3, Tensor[] norm3, float eps3, Tensor weight4, Tensor? bias4, "
      "Tensor[] norm4, float eps4, Tensor weight5, Tensor? bias5, Tensor[] norm5, float eps5) -> Tensor");
  m.def(
      "block(Tensor x, Tensor cpe1_weight, Tensor cpe1_bias, Tensor ln1_weight, Tensor ln1_bias, float ln1_eps, Tensor "
      "in_proj_weight, Tensor conv_weight, Tensor conv_bias, Tensor x_proj_weight, Tensor dt_proj_weight, Tensor dt_bias, "
      "Tensor A_log, Tensor D, Tensor k1, Tensor k3, Tensor k5, Tensor alpha, Tensor out_norm_weight, Tensor "
      "out_norm_bias, float out_norm_eps, Tensor out_proj_weight, Tensor cpe2_weight, Tensor cpe2_bias, Tensor "
      "ln2_weight, Tensor ln2_bias, float ln2_eps, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor "
      "fc2_bias) -> Tensor");
  m.def(
      "downsample(Tensor x, Tensor weight1, Tensor? bias1, Tensor[] norm1, float eps1, Tensor weight2, Tensor? bias2, "
      "Tensor[] norm2, float eps2, Tensor weight3, Tensor? bias3, Tensor[] norm3, float eps3) -> Tensor");
  m.def("layer_norm_planes(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor");
}
