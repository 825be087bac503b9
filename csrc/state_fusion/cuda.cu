#include "state_fusion/cuda.h"
#include "structure_aware_scan/kernels.cuh"

namespace mmspatialmamba::cuda {

void state_fusion(const Size& size, const Plan& plan, const Map& h, const float* taps, const Map& out,
                  cudaStream_t stream) {
  Problem<float> p = make_problem<float>(size, plan, taps);
  p.u = make_rows<float>(h, size, plan);
  p.out = make_rows<float>(out, size, plan);
  launch(forward_kernel<float, false>, all_blocks(size, plan), block_threads(plan), ForwardShared<float>::bytes(plan),
         stream, p);
}

void state_fusion_backward(const Size& size, const Plan& plan, const Map& grad, const Map& h, const float* taps,
                           const Map& grad_h, float* parameters, cudaStream_t stream) {
  Problem<float> p = make_problem<float>(size, plan, taps);
  p.u = make_rows<float>(h, size, plan);
  p.grad = make_rows<float>(grad, size, plan);
  p.grad_h = make_rows<float>(grad_h, size, plan);
  p.parameters = parameters;
  launch(transposed_kernel<float, false>, all_blocks(size, plan), block_threads(plan),
         TransposedShared<float>::bytes(plan), stream, p);
  launch(backward_kernel<float, false>, all_blocks(size, plan), block_threads(plan), BackwardShared<float>::bytes(plan),
         stream, p);
}

}  // namespace mmspatialmamba::cuda
