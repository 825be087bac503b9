#include "selective_scan/scan.cuh"
#include "structure_aware_scan/cuda.h"
#include "structure_aware_scan/kernels.cuh"

namespace mmspatialmamba::cuda {
namespace {

// Blocks that run after one another can't be relied on, so a map cut in several gets the states that enter each row
// first.
bool needs_states(const Plan& plan) { return plan.tiles > 1 || plan.chunks > 1; }

int64_t segments(const Size& size, const Plan& plan) {
  return static_cast<int64_t>(size.batch) * size.height * plan.tiles * padded_dim(size.dim);
}

template <class T>
Problem<T> make_problem(const ScanInputs& in, const Plan& plan) {
  Problem<T> p = make_problem<T>(in.size, plan, in.taps);
  p.softplus = in.softplus != 0;
  p.u = make_rows<T>(in.u, in.size, plan);
  p.delta = make_rows<T>(in.delta, in.size, plan);
  static_cast<ScanParameters&>(p) = in;
  return p;
}

// Leaves the states that enter each row of a tile in `p.states`; `workspace` has room for three floats a segment.
template <class T>
void find_states(Problem<T>& p, float* workspace, cudaStream_t stream) {
  const int64_t count = segments(p.size, p.plan);
  p.steps = reinterpret_cast<Affine*>(workspace);
  p.states = workspace + 2 * count;
  launch(steps_kernel<T>, all_blocks(p.size, p.plan), block_threads(p.plan), StepsShared<T>::bytes(p.plan), stream, p);
  combine<false>(p.steps, workspace + 2 * count, p.size.batch, static_cast<int64_t>(p.size.height) * p.plan.tiles,
                 padded_dim(p.size.dim), stream);
}

template <class T>
void run_forward(const ScanInputs& in, const Plan& plan, const Map& y, float* workspace, cudaStream_t stream) {
  Problem<T> p = make_problem<T>(in, plan);
  p.out = make_rows<T>(y, in.size, plan);
  if (needs_states(plan)) find_states(p, workspace, stream);
  launch(forward_kernel<T, true>, all_blocks(in.size, plan), block_threads(plan), ForwardShared<T>::bytes(plan), stream,
         p);
}

template <class T>
void run_backward(const ScanInputs& in, const Plan& plan, const Map& grad, const ScanGradients& out, float* workspace,
                  cudaStream_t stream) {
  Problem<T> p = make_problem<T>(in, plan);
  const int64_t count = segments(in.size, plan), width = padded_dim(in.size.dim);
  p.grad = make_rows<T>(grad, in.size, plan);
  p.grad_u = make_rows<T>(out.u, in.size, plan);
  p.grad_delta = make_rows<T>(out.delta, in.size, plan);
  p.grad_h = make_rows<float>(
      {workspace + 4 * count, DType::kFloat32, width * in.size.width * in.size.height, 1, width * in.size.width, width},
      in.size, plan);
  p.grad_B = out.B;
  p.grad_C = out.C;
  p.parameters = out.parameters;
  const int64_t count_blocks = all_blocks(in.size, plan);
  const int threads = block_threads(plan);
  find_states(p, workspace, stream);
  launch(transposed_kernel<T, true>, count_blocks, threads, TransposedShared<T>::bytes(plan), stream, p);
  p.returns = workspace + 3 * count;
  combine<true>(p.steps, workspace + 3 * count, in.size.batch, static_cast<int64_t>(in.size.height) * plan.tiles, width,
                stream);
  launch(backward_kernel<T, true>, count_blocks, threads, BackwardShared<T>::bytes(plan), stream, p);
}

}  // namespace

int64_t scan_workspace(const Size& size, const Plan& plan) { return needs_states(plan) ? 3 * segments(size, plan) : 0; }

int64_t scan_backward_workspace(const Size& size, const Plan& plan) {
  return 4 * segments(size, plan) + static_cast<int64_t>(size.batch) * size.height * size.width * padded_dim(size.dim);
}

void structure_aware_scan(const ScanInputs& in, const Plan& plan, const Map& y, float* workspace, cudaStream_t stream) {
  by_dtype(in.u.dtype, [&](auto zero) { run_forward<decltype(zero)>(in, plan, y, workspace, stream); });
}

void structure_aware_scan_backward(const ScanInputs& in, const Plan& plan, const Map& grad, const ScanGradients& out,
                                   float* workspace, cudaStream_t stream) {
  by_dtype(in.u.dtype, [&](auto zero) { run_backward<decltype(zero)>(in, plan, grad, out, workspace, stream); });
}

}  // namespace mmspatialmamba::cuda
