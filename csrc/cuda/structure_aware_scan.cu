#include <algorithm>

#include "combine.cuh"
#include "map_kernels.cuh"

namespace mmspatialmamba::cuda {

Plan make_plan(const Size& size, int multiprocessors, int max_tile) {
  const int width = std::max(size.width, 1), height = std::max(size.height, 1);
  Plan plan{width, 1, height, 1};
  if (width > max_tile) {
    const int tiles = (width + max_tile - 1) / max_tile;
    plan.tile = ((width + tiles - 1) / tiles + 7) / 8 * 8;
    plan.tiles = (width + plan.tile - 1) / plan.tile;
  }
  const int64_t blocks = padded_dim(size.dim) / kChannels * size.batch * plan.tiles;
  // A chunk reads and scans 10 rows that its neighbours do too: as few chunks as fill the multiprocessors.
  if (blocks > 0 && blocks < 2 * multiprocessors) {
    const int64_t wanted = (4 * multiprocessors + blocks - 1) / blocks;
    const int chunks = static_cast<int>(std::min<int64_t>(wanted, (height + 7) / 8));
    plan.rows = (height + chunks - 1) / chunks;
    plan.chunks = (height + plan.rows - 1) / plan.rows;
  }
  return plan;
}

namespace {

// Blocks that run after one another can't be relied on, so a map cut in several gets the states that enter each row first.
bool needs_states(const Plan& plan) { return plan.tiles > 1 || plan.chunks > 1; }

int64_t segments(const Size& size, const Plan& plan) {
  return static_cast<int64_t>(size.batch) * size.height * plan.tiles * padded_dim(size.dim);
}

int64_t blocks(const Size& size, const Plan& plan) {
  return plan_blocks(size, plan) * (padded_dim(size.dim) / kChannels);
}

template <class T>
Problem<T> make_problem(const ScanInputs& in, const Plan& plan) {
  Problem<T> p{};
  p.size = in.size;
  p.plan = plan;
  p.softplus = in.softplus != 0;
  p.u = make_rows<T>(in.u, in.size, plan);
  p.delta = make_rows<T>(in.delta, in.size, plan);
  p.A = in.A;
  p.B = in.B;
  p.C = in.C;
  p.D = in.D;
  p.taps = in.taps;
  p.bias = in.bias;
  return p;
}

// Leaves the states that enter each row of a tile in `p.states`; `workspace` has room for three floats a segment.
template <class T>
cudaError_t find_states(Problem<T>& p, float* workspace, cudaStream_t stream) {
  const int64_t count = segments(p.size, p.plan);
  p.steps = reinterpret_cast<Affine*>(workspace);
  p.states = workspace + 2 * count;
  MMSPATIALMAMBA_LAUNCH(steps_kernel<T>, blocks(p.size, p.plan), block_threads(p.plan), StepsShared<T>::bytes(p.plan),
                        stream, p);
  return combine(p.steps, workspace + 2 * count, p.size.batch, static_cast<int64_t>(p.size.height) * p.plan.tiles,
                 padded_dim(p.size.dim), false, stream);
}

template <class T>
cudaError_t run_forward(const ScanInputs& in, const Plan& plan, const Map& y, float* workspace, cudaStream_t stream) {
  Problem<T> p = make_problem<T>(in, plan);
  p.out = make_rows<T>(y, in.size, plan);
  if (needs_states(plan)) {
    const cudaError_t error = find_states(p, workspace, stream);
    if (error != cudaSuccess) return error;
  }
  return launch(forward_kernel<T, true>, blocks(in.size, plan), block_threads(plan), ForwardShared<T>::bytes(plan),
                stream, p);
}

template <class T>
cudaError_t run_backward(const ScanInputs& in, const Plan& plan, const Map& grad, const ScanGradients& out,
                         float* workspace, cudaStream_t stream) {
  Problem<T> p = make_problem<T>(in, plan);
  const int64_t count = segments(in.size, plan), width = padded_dim(in.size.dim);
  p.grad = make_rows<T>(grad, in.size, plan);
  p.grad_u = make_rows<T>(out.u, in.size, plan);
  p.grad_delta = make_rows<T>(out.delta, in.size, plan);
  p.grad_h = make_rows<float>(
      {workspace + 4 * count, width * in.size.width * in.size.height, 1, width * in.size.width, width}, in.size, plan);
  p.grad_B = out.B;
  p.grad_C = out.C;
  p.parameters = out.parameters;
  const int64_t count_blocks = blocks(in.size, plan);
  const int threads = block_threads(plan);
  cudaError_t error = find_states(p, workspace, stream);
  if (error != cudaSuccess) return error;
  MMSPATIALMAMBA_LAUNCH(transposed_kernel<T, true>, count_blocks, threads, TransposedShared<T>::bytes(plan), stream, p);
  p.returns = workspace + 3 * count;
  error = combine(p.steps, workspace + 3 * count, in.size.batch, static_cast<int64_t>(in.size.height) * plan.tiles, width,
                  true, stream);
  if (error != cudaSuccess) return error;
  return launch(backward_kernel<T, true>, count_blocks, threads, BackwardShared<T>::bytes(plan), stream, p);
}

}  // namespace

int64_t scan_workspace(const Size& size, const Plan& plan) { return needs_states(plan) ? 3 * segments(size, plan) : 0; }

int64_t scan_backward_workspace(const Size& size, const Plan& plan) {
  return 4 * segments(size, plan) + static_cast<int64_t>(size.batch) * size.height * size.width * padded_dim(size.dim);
}

cudaError_t structure_aware_scan(const ScanInputs& in, const Plan& plan, const Map& y, float* workspace,
                                 cudaStream_t stream) {
  switch (in.dtype) {
    case DType::kFloat32:
      return run_forward<float>(in, plan, y, workspace, stream);
    case DType::kFloat16:
      return run_forward<__half>(in, plan, y, workspace, stream);
    case DType::kBFloat16:
      return run_forward<__nv_bfloat16>(in, plan, y, workspace, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t structure_aware_scan_backward(const ScanInputs& in, const Plan& plan, const Map& grad,
                                          const ScanGradients& out, float* workspace, cudaStream_t stream) {
  switch (in.dtype) {
    case DType::kFloat32:
      return run_backward<float>(in, plan, grad, out, workspace, stream);
    case DType::kFloat16:
      return run_backward<__half>(in, plan, grad, out, workspace, stream);
    case DType::kBFloat16:
      return run_backward<__nv_bfloat16>(in, plan, grad, out, workspace, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace mmspatialmamba::cuda
