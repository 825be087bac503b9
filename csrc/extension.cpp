// The schemas of the compiled ops; mmspatialmamba/ops says what they compute, and adds autograd to them.
#include <string>
#include <vector>

#include "common/bind_cpu.h"
#include "common/taps.h"

namespace mmspatialmamba {
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
  m.def("gated_layer_norm(Tensor x, Tensor gate, Tensor weight, Tensor bias, float eps) -> Tensor");
  m.def(
      "gated_layer_norm_backward(Tensor grad, Tensor x, Tensor gate, Tensor weight, Tensor bias, float eps) -> "
      "(Tensor, "
      "Tensor, Tensor, Tensor)");
  // Row and column of each tap of the fusion, in pixels.
  m.def("taps() -> int[]", [] {
    std::vector<int64_t> offsets;
    for (const Tap& tap : kTapTable) offsets.insert(offsets.end(), {tap.row, tap.column});
    return offsets;
  });
  // What the CPU kernels run on.
  m.def("instruction_set() -> str", []() -> std::string {
    const char* const names[] = {"baseline", "avx2", "avx512"};
    return names[static_cast<int>(instruction_set())];
  });
}

}  // namespace mmspatialmamba
