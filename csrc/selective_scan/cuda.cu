#include <algorithm>

#include "common/numerics.cuh"
#include "common/plan.h"
#include "selective_scan/cuda.h"
#include "selective_scan/scan.cuh"

namespace mmspatialmamba::cuda {
namespace {

// Scans a chunk of a row (batch, channel, state): forward to h, or backward to the gradient of h before the recurrence.
// Without `states`, only the chunk's step is wanted.
struct Scan {
  SelectiveInputs in;
  const float* grad;  // null: forward
  float* out;
  Affine* steps;  // (chunks, rows padded to a multiple of 8)
  const float* states;
  int64_t rows, padded_rows, chunk;
};

template <class T>
__device__ __forceinline__ float step_input(const SelectiveInputs& in, int64_t index, int channel) {
  return to_float(static_cast<const T*>(in.delta)[index]) + (in.bias ? in.bias[channel] : 0.f);
}

template <class T>
__global__ void __launch_bounds__(kThreads) scan_kernel(const Scan p) {
  __shared__ Affine warps[kWarps];
  const SelectiveInputs& in = p.in;
  const int64_t row = blockIdx.x % p.rows, chunk = blockIdx.x / p.rows;
  const int64_t map = row / in.state, batch = map / in.dim;
  const int state = row % in.state, channel = map % in.dim;
  const int64_t begin = chunk * p.chunk, end = min(in.length, begin + p.chunk);
  const float A = in.A[static_cast<int64_t>(channel) * in.state + state];
  const float* B = in.B + (batch * in.state + state) * in.length;
  const T* u = static_cast<const T*>(in.u) + map * in.length;
  float x = p.states ? p.states[chunk * p.padded_rows + row] : 0.f;
  Affine whole{1.f, 0.f};
  for (int64_t first = begin; first < end; first += blockDim.x) {
    const int64_t i = first + threadIdx.x;
    const int64_t t = p.grad ? end - 1 - (i - begin) : i;
    Affine own{1.f, 0.f};
    float grad = 0.f;
    if (i < end) {
      const float dt = time_step(step_input<T>(in, map * in.length + t, channel), in.softplus);
      own.a = accurate_exp(dt * A);
      if (p.grad) {
        grad = p.grad[row * in.length + t];
        own.b = own.a * grad;
      } else {
        own.b = dt * B[t] * to_float(u[t]);
      }
    }
    const Scanned scanned = scan_block<1>(own, warps);
    if (p.states && i < end) {
      const float before = scanned.before(x);
      p.out[row * in.length + t] = p.grad ? grad + before : own(before);
    }
    x = scanned.total(x);
    whole = whole.then(scanned.total);
    __syncthreads();
  }
  if (!p.states && threadIdx.x == 0) p.steps[chunk * p.padded_rows + row] = whole;
}

struct Gradients {
  SelectiveInputs in;
  const float *h, *grad;  // grad: of h before the recurrence
  SelectiveGradients out;
  int64_t chunk;
};

// The gradients of u, delta, A and the bias: a block takes a chunk of one channel.
template <class T>
__global__ void __launch_bounds__(kThreads) gradients_kernel(const Gradients p) {
  __shared__ float partial[kWarps];
  const SelectiveInputs& in = p.in;
  const int64_t maps = static_cast<int64_t>(in.batch) * in.dim;
  const int64_t map = blockIdx.x % maps, chunk = blockIdx.x / maps, batch = map / in.dim;
  const int channel = map % in.dim, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t begin = chunk * p.chunk, end = min(in.length, begin + p.chunk);
  float* parameters = p.out.parameters + ((batch * in.chunks + chunk) * in.dim + channel) * (in.state + 1);
  const T* u = static_cast<const T*>(in.u) + map * in.length;

  auto block_sum = [&](float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
    __syncthreads();
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    float sum = 0.f;
    for (int i = 0; i < static_cast<int>(blockDim.x) / 32; ++i) sum += partial[i];
    return sum;
  };

  for (int n = 0; n <= in.state; ++n) {
    if (threadIdx.x == 0) parameters[n] = 0.f;
  }
  for (int64_t first = begin; first < end; first += blockDim.x) {
    const int64_t t = first + threadIdx.x;
    const bool inside = t < end;
    float dt = 0.f, slope = 0.f, input = 0.f, grad_u = 0.f, grad_dt = 0.f;
    if (inside) {
      dt = time_step(step_input<T>(in, map * in.length + t, channel), in.softplus, &slope);
      input = to_float(u[t]);
    }
    for (int n = 0; n < in.state; ++n) {
      const int64_t row = (map * in.state + n) * in.length;
      const float A = in.A[static_cast<int64_t>(channel) * in.state + n];
      float to_A = 0.f;
      if (inside) {
        const float G = p.grad[row + t], B = in.B[(batch * in.state + n) * in.length + t];
        const float to_exponent = t > 0 ? G * accurate_exp(dt * A) * p.h[row + t - 1] : 0.f;
        grad_u = fmaf(G * dt, B, grad_u);
        grad_dt += fmaf(to_exponent, A, G * B * input);
        to_A = to_exponent * dt;
      }
      to_A = block_sum(to_A);
      if (threadIdx.x == 0) parameters[n] += to_A;
    }
    const float to_bias = block_sum(grad_dt * slope);
    if (threadIdx.x == 0) parameters[in.state] += to_bias;
    if (inside) {
      static_cast<T*>(p.out.u)[map * in.length + t] = from_float<T>(grad_u);
      static_cast<T*>(p.out.delta)[map * in.length + t] = from_float<T>(grad_dt * slope);
    }
  }
}

// The gradient of B: a thread takes one position of one state.
template <class T>
__global__ void __launch_bounds__(kThreads) grad_B_kernel(const Gradients p) {
  const SelectiveInputs& in = p.in;
  const int64_t pieces = (in.length + kThreads - 1) / kThreads;
  const int64_t t = blockIdx.x % pieces * kThreads + threadIdx.x, row = blockIdx.x / pieces;
  if (t >= in.length) return;
  const int64_t batch = row / in.state, state = row % in.state;
  float sum = 0.f;
  for (int channel = 0; channel < in.dim; ++channel) {
    const int64_t map = batch * in.dim + channel, index = map * in.length + t;
    const float dt = time_step(step_input<T>(in, index, channel), in.softplus);
    const float input = to_float(static_cast<const T*>(in.u)[index]);
    sum = fmaf(p.grad[(map * in.state + state) * in.length + t], dt * input, sum);
  }
  p.out.B[row * in.length + t] = sum;
}

int64_t row_count(const SelectiveInputs& in) { return static_cast<int64_t>(in.batch) * in.dim * in.state; }

template <class T>
void scan(const SelectiveInputs& in, const float* grad, float* out, float* workspace, cudaStream_t stream) {
  const int64_t rows = row_count(in), padded = padded_dim(rows);
  Affine* steps = reinterpret_cast<Affine*>(workspace);
  float* states = workspace + 2 * padded * in.chunks;
  Scan p{in, grad, out, steps, nullptr, rows, padded, (in.length + in.chunks - 1) / in.chunks};
  launch(scan_kernel<T>, rows * in.chunks, kThreads, 0, stream, p);
  (grad ? combine<true> : combine<false>)(steps, states, 1, in.chunks, padded, stream);
  p.states = states;
  launch(scan_kernel<T>, rows * in.chunks, kThreads, 0, stream, p);
}

template <class T>
void run_backward(const SelectiveInputs& in, const float* grad, const float* h, const SelectiveGradients& out,
                  float* workspace, cudaStream_t stream) {
  float* grad_h = workspace + 3 * padded_dim(row_count(in)) * in.chunks;
  scan<T>(in, grad, grad_h, workspace, stream);
  const Gradients p{in, h, grad_h, out, (in.length + in.chunks - 1) / in.chunks};
  const int64_t blocks = static_cast<int64_t>(in.batch) * in.dim * in.chunks;
  launch(gradients_kernel<T>, blocks, kThreads, 0, stream, p);
  launch(grad_B_kernel<T>, (in.length + kThreads - 1) / kThreads * in.batch * in.state, kThreads, 0, stream, p);
}

}  // namespace

int selective_chunks(int64_t rows, int64_t length, int multiprocessors) {
  const int64_t wanted = rows > 0 ? (8 * multiprocessors + rows - 1) / rows : 1;
  return static_cast<int>(std::max<int64_t>(1, std::min(wanted, length / (4 * kThreads))));
}

int64_t selective_workspace(const SelectiveInputs& in) { return 3 * padded_dim(row_count(in)) * in.chunks; }

int64_t selective_backward_workspace(const SelectiveInputs& in) {
  return selective_workspace(in) + row_count(in) * in.length;
}

void selective_scan(const SelectiveInputs& in, float* h, float* workspace, cudaStream_t stream) {
  by_dtype(in.dtype, [&](auto zero) { scan<decltype(zero)>(in, nullptr, h, workspace, stream); });
}

void selective_scan_backward(const SelectiveInputs& in, const float* grad, const float* h,
                             const SelectiveGradients& out, float* workspace, cudaStream_t stream) {
  by_dtype(in.dtype, [&](auto zero) { run_backward<decltype(zero)>(in, grad, h, out, workspace, stream); });
}

}  // namespace mmspatialmamba::cuda
