#include "map_kernels.cuh"

namespace mmspatialmamba::cuda {

namespace {

Problem<float> make_problem(const Size& size, const Plan& plan, const float* taps) {
  Problem<float> p{};
  p.size = size;
  p.plan = plan;
  p.taps = taps;
  return p;
}

int64_t blocks(const Size& size, const Plan& plan) {
  return plan_blocks(size, plan) * (padded_dim(size.dim) / kChannels);
}

}  // namespace

cudaError_t state_fusion(const Size& size, const Plan& plan, const Map& h, const float* taps, const Map& out,
                         cudaStream_t stream) {
  Problem<float> p = make_problem(size, plan, taps);
  p.u = make_rows<float>(h, size, plan);
  p.out = make_rows<float>(out, size, plan);
  return launch(forward_kernel<float, false>, blocks(size, plan), block_threads(plan), ForwardShared<float>::bytes(plan),
                stream, p);
}

cudaError_t state_fusion_backward(const Size& size, const Plan& plan, const Map& grad, const Map& h, const float* taps,
                                  const Map& grad_h, float* parameters, cudaStream_t stream) {
  Problem<float> p = make_problem(size, plan, taps);
  p.u = make_rows<float>(h, size, plan);
  p.grad = make_rows<float>(grad, size, plan);
  p.grad_h = make_rows<float>(grad_h, size, plan);
  p.parameters = parameters;
  MMSPATIALMAMBA_LAUNCH(transposed_kernel<float, false>, blocks(size, plan), block_threads(plan),
                        TransposedShared<float>::bytes(plan), stream, p);
  return launch(backward_kernel<float, false>, blocks(size, plan), block_threads(plan),
                BackwardShared<float>::bytes(plan), stream, p);
}

}  // namespace mmspatialmamba::cuda
