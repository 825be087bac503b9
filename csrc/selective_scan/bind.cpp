// Binds the kernels of selective_scan to its ops.
#include "common/bind_cpu.h"
#include "selective_scan/cpu.h"
#ifdef WITH_CUDA
#include "common/bind_cuda.h"
#include "selective_scan/cuda.h"
#endif

namespace mmspatialmamba {
namespace {

struct Inputs {
  Arg u, delta, A, B;
  const OptionalTensor& delta_bias;
  bool delta_softplus;
};

Checks check(const char* op, const Inputs& in) {
  const Checks checks(op, "u", in.u);
  checks.dimensions("u", in.u, 3);
  checks.dimensions("A", in.A, 2);
  const int64_t batch = in.u.size(0), dim = in.u.size(1), length = in.u.size(2), state = in.A.size(1);
  checks("delta", in.delta, in.u.sizes());
  checks("A", in.A, {dim, state});
  checks("B", in.B, {batch, state, length});
  checks("delta_bias", in.delta_bias, {dim});
  return checks;
}

template <at::Tensor run(const Inputs&)>
at::Tensor forward(Arg u, Arg delta, Arg A, Arg B, const OptionalTensor& delta_bias, bool delta_softplus) {
  const Inputs in{u, delta, A, B, delta_bias, delta_softplus};
  check("selective_scan", in);
  return run(in);
}

template <Tensors<5> run(Arg, Arg, const Inputs&)>
Tensors<5> backward(Arg grad, Arg h, Arg u, Arg delta, Arg A, Arg B, const OptionalTensor& delta_bias,
                    bool delta_softplus) {
  const Inputs in{u, delta, A, B, delta_bias, delta_softplus};
  const Checks checks = check("selective_scan_backward", in);
  checks("grad", grad, {u.size(0), u.size(1), A.size(1), u.size(2)});
  checks("h", h, grad.sizes());
  return run(floats(grad), floats(h), in);
}

// The small arguments as the kernels take them.
struct Parameters {
  at::Tensor A, B;
  OptionalTensor bias;

  explicit Parameters(const Inputs& in) : A(floats(in.A)), B(floats(in.B)), bias(floats(in.delta_bias)) {}
};

struct CpuInputs : Parameters {
  SelectiveScanArgs args;

  explicit CpuInputs(const Inputs& in) : Parameters(in) {
    args = {in.u.size(0), in.u.size(1), in.u.size(2), A.size(1), map_of(in.u), map_of(in.delta)};
    args.A = A.const_data_ptr<float>();
    args.B = B.const_data_ptr<float>();
    args.bias = data_or_null(bias);
    args.softplus = in.delta_softplus;
  }

  Shape shape() const { return {args.batch, args.dim, args.state, args.length}; }
};

at::Tensor cpu_forward(const Inputs& in) {
  const CpuInputs cpu(in);
  at::Tensor h = empty_floats({cpu.args.batch, cpu.args.dim, cpu.args.state, cpu.args.length}, in.u);
  float* const states = h.mutable_data_ptr<float>();
  parallel_blocks(cpu.shape(), SelectiveScanCpu::forward_scratch(),
                  [&](auto... task) { MMSPATIALMAMBA_CPU(selective_scan).forward(cpu.args, states, task...); });
  return h;
}

Tensors<5> cpu_backward(Arg grad, Arg h, const Inputs& in) {
  const CpuInputs cpu(in);
  const auto& [batch, dim, state, length] = cpu.shape();
  at::Tensor grad_u = at::empty_like(in.u), grad_delta = at::empty_like(in.delta);
  at::Tensor grad_A = zero_floats({batch, dim, state}, in.u), grad_bias = zero_floats({batch, dim}, in.u);
  at::Tensor partial_B = zero_floats({blocks(dim), batch, state, length}, in.u);
  const SelectiveScanGradients out{map_of(grad_u), map_of(grad_delta), grad_A.mutable_data_ptr<float>(),
                                   partial_B.mutable_data_ptr<float>(), grad_bias.mutable_data_ptr<float>()};
  const float *grads = grad.const_data_ptr<float>(), *states = h.const_data_ptr<float>();
  parallel_blocks(cpu.shape(), SelectiveScanCpu::backward_scratch(state), [&](auto... task) {
    MMSPATIALMAMBA_CPU(selective_scan).backward(cpu.args, grads, states, out, task...);
  });
  if (state == 0) {
    for (at::Tensor* gradient : {&grad_u, &grad_delta}) gradient->zero_();
  }
  return {grad_u, grad_delta, as(grad_A.sum(0), in.A), as(partial_B.sum(0), in.B),
          grad_of_bias(grad_bias.sum(0), in.delta_bias, in.A)};
}

MMSPATIALMAMBA_BIND(CPU, selective_scan, forward<cpu_forward>, backward<cpu_backward>)

#ifdef WITH_CUDA

struct CudaInputs : Parameters {
  at::ScalarType dtype;
  at::Tensor u, delta;
  cuda::SelectiveInputs args;

  explicit CudaInputs(const Inputs& in)
      : Parameters(in), dtype(cuda::common_dtype(in.u, in.delta)), u(in.u.to(dtype).contiguous()),
        delta(in.delta.to(dtype).contiguous()) {
    constexpr const char* kOp = "selective_scan";
    args = {cuda::narrow(kOp, u.size(0)), cuda::narrow(kOp, u.size(1)), cuda::narrow(kOp, A.size(1))};
    args.length = u.size(2);
    args.chunks = cuda::selective_chunks(u.size(0) * u.size(1) * A.size(1), args.length, cuda::multiprocessors());
    args.dtype = dtype_of(dtype);
    args.softplus = in.delta_softplus;
    args.u = u.data_ptr();
    args.delta = delta.data_ptr();
    args.A = A.const_data_ptr<float>();
    args.B = B.const_data_ptr<float>();
    args.bias = data_or_null(bias);
  }
};

at::Tensor cuda_forward(const Inputs& in) {
  const c10::cuda::CUDAGuard guard(in.u.device());
  const CudaInputs gpu(in);
  at::Tensor h = empty_floats({in.u.size(0), in.u.size(1), in.A.size(1), in.u.size(2)}, in.u);
  if (h.numel() > 0) {
    at::Tensor workspace = empty_floats({cuda::selective_workspace(gpu.args)}, in.u);
    cuda::selective_scan(gpu.args, h.mutable_data_ptr<float>(), workspace.mutable_data_ptr<float>(),
                         at::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return h;
}

Tensors<5> cuda_backward(Arg grad, Arg h, const Inputs& in) {
  const c10::cuda::CUDAGuard guard(in.u.device());
  const CudaInputs gpu(in);
  const int64_t state = in.A.size(1);
  at::Tensor grad_u = at::empty_like(gpu.u), grad_delta = at::empty_like(gpu.delta), grad_B = at::empty_like(gpu.B);
  at::Tensor sums = empty_floats({in.u.size(0) * gpu.args.chunks, in.u.size(1), state + 1}, in.u);
  if (h.numel() > 0) {
    at::Tensor workspace = empty_floats({cuda::selective_backward_workspace(gpu.args)}, in.u);
    const cuda::SelectiveGradients out{grad_u.data_ptr(), grad_delta.data_ptr(), grad_B.mutable_data_ptr<float>(),
                                       sums.mutable_data_ptr<float>()};
    cuda::selective_scan_backward(gpu.args, grad.const_data_ptr<float>(), h.const_data_ptr<float>(), out,
                                  workspace.mutable_data_ptr<float>(), at::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  } else {
    for (at::Tensor* gradient : {&grad_u, &grad_delta, &grad_B, &sums}) gradient->zero_();
  }
  sums = sums.sum(0);
  return {as(grad_u, in.u), as(grad_delta, in.delta), as(sums.narrow(1, 0, state), in.A), as(grad_B, in.B),
          grad_of_bias(sums.select(1, state), in.delta_bias, in.A)};
}

MMSPATIALMAMBA_BIND(CUDA, selective_scan, forward<cuda_forward>, backward<cuda_backward>)

#endif

}  // namespace
}  // namespace mmspatialmamba
