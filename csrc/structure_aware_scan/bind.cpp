// Binds the kernels of structure_aware_scan to its ops.
#include "common/bind_cpu.h"
#include "state_fusion/kernels.h"
#include "structure_aware_scan/cpu.h"
#ifdef WITH_CUDA
#include "common/bind_cuda.h"
#include "structure_aware_scan/cuda.h"
#endif

namespace mmspatialmamba {
namespace {

struct Inputs {
  Arg u, delta, A, B, C, D, k1, k3, k5, alpha;
  const OptionalTensor& delta_bias;
  bool delta_softplus;
};

Checks check(const char* op, const Inputs& in) {
  const Checks checks(op, "u", in.u);
  checks.dimensions("u", in.u, 4);
  const int64_t batch = in.u.size(0), dim = in.u.size(1), height = in.u.size(2), width = in.u.size(3);
  checks("delta", in.delta, in.u.sizes());
  checks("A", in.A, {dim, 1});
  checks("B", in.B, {batch, 1, height, width});
  checks("C", in.C, {batch, 1, height, width});
  checks("D", in.D, {dim});
  check_kernels(checks, dim, in.k1, in.k3, in.k5, in.alpha);
  checks("delta_bias", in.delta_bias, {dim});
  return checks;
}

template <at::Tensor run(const Inputs&)>
at::Tensor forward(Arg u, Arg delta, Arg A, Arg B, Arg C, Arg D, Arg k1, Arg k3, Arg k5, Arg alpha,
                   const OptionalTensor& delta_bias, bool delta_softplus) {
  const Inputs in{u, delta, A, B, C, D, k1, k3, k5, alpha, delta_bias, delta_softplus};
  check("structure_aware_scan", in);
  return run(in);
}

template <Tensors<11> run(Arg, const Inputs&)>
Tensors<11> backward(Arg grad, Arg u, Arg delta, Arg A, Arg B, Arg C, Arg D, Arg k1, Arg k3, Arg k5, Arg alpha,
                     const OptionalTensor& delta_bias, bool delta_softplus) {
  const Inputs in{u, delta, A, B, C, D, k1, k3, k5, alpha, delta_bias, delta_softplus};
  check("structure_aware_scan_backward", in)("grad", grad, u.sizes());
  return run(grad, in);
}

// The gradients from partial ones of B and C, to be summed over their first dimension, and from those of the 25 taps,
// of A, of D and of the bias, (28, dim).
Tensors<11> gradients(const Inputs& in, Arg grad_u, Arg grad_delta, Arg partial_B, Arg partial_C, Arg sums) {
  return std::tuple_cat(std::make_tuple(grad_u, grad_delta, as(sums.select(0, kTaps), in.A), as(partial_B.sum(0), in.B),
                                        as(partial_C.sum(0), in.C), as(sums.select(0, kTaps + 1), in.D)),
                        split_taps_gradient(sums.narrow(0, 0, kTaps), in.k1, in.k3, in.k5, in.alpha),
                        std::make_tuple(grad_of_bias(sums.select(0, kTaps + 2), in.delta_bias, in.A)));
}

// The tensors that ScanParameters point into.
struct Parameters {
  at::Tensor A, B, C, D;
  OptionalTensor bias;

  explicit Parameters(const Inputs& in)
      : A(floats(in.A)), B(floats(in.B)), C(floats(in.C)), D(floats(in.D)), bias(floats(in.delta_bias)) {}

  ScanParameters get() const {
    return {A.const_data_ptr<float>(), B.const_data_ptr<float>(), C.const_data_ptr<float>(), D.const_data_ptr<float>(),
            data_or_null(bias)};
  }
};

struct CpuInputs {
  Parameters parameters;
  CpuFusionKernels kernels;
  ScanArgs args;

  explicit CpuInputs(const Inputs& in)
      : parameters(in), kernels(in.k1, in.k3, in.k5, in.alpha),
        args{shape_of(in.u), parameters.get(), map_of(in.u), map_of(in.delta), kernels.get(), in.delta_softplus} {}
};

at::Tensor cpu_forward(const Inputs& in) {
  const CpuInputs cpu(in);
  at::Tensor y = at::empty_like(in.u);
  const Map out = map_of(y);
  parallel_blocks(cpu.args, StructureAwareScanCpu::forward_scratch(cpu.args.width),
                  [&](auto... task) { MMSPATIALMAMBA_CPU(structure_aware_scan).forward(cpu.args, out, task...); });
  return y;
}

Tensors<11> cpu_backward(Arg grad, const Inputs& in) {
  const CpuInputs cpu(in);
  const Shape shape = cpu.args;
  at::Tensor grad_u = at::empty_like(in.u), grad_delta = at::empty_like(in.delta);
  at::Tensor partial_B = empty_floats({blocks(shape.dim), shape.batch, shape.height * shape.width}, in.u);
  at::Tensor partial_C = at::empty_like(partial_B);
  at::Tensor sums = zero_floats({kTaps + 3, shape.batch, shape.dim}, in.u);
  const ScanGradients out{map_of(grad),
                          map_of(grad_u),
                          map_of(grad_delta),
                          partial_B.mutable_data_ptr<float>(),
                          partial_C.mutable_data_ptr<float>(),
                          sums.mutable_data_ptr<float>()};
  const int64_t scratch = StructureAwareScanCpu::backward_scratch(shape.height, shape.width);
  parallel_blocks(shape, scratch,
                  [&](auto... task) { MMSPATIALMAMBA_CPU(structure_aware_scan).backward(cpu.args, out, task...); });
  return gradients(in, grad_u, grad_delta, partial_B, partial_C, sums.sum(1));
}

MMSPATIALMAMBA_BIND(CPU, structure_aware_scan, forward<cpu_forward>, backward<cpu_backward>)

#ifdef WITH_CUDA

struct CudaInputs {
  at::ScalarType dtype;
  at::Tensor u, delta, taps;
  Parameters parameters;
  cuda::ScanInputs args;
  cuda::Plan plan;

  explicit CudaInputs(const Inputs& in)
      : dtype(cuda::common_dtype(in.u, in.delta)), u(cuda::as_input(in.u, dtype)),
        delta(cuda::as_input(in.delta, dtype)), taps(merge_taps(in.k1, in.k3, in.k5, in.alpha)), parameters(in),
        args{parameters.get(),  cuda::size_of("structure_aware_scan", u),
             in.delta_softplus, map_of(u),
             map_of(delta),     taps.const_data_ptr<float>()},
        plan(cuda::make_plan(args.size, cuda::multiprocessors())) {}
};

at::Tensor cuda_forward(const Inputs& in) {
  const c10::cuda::CUDAGuard guard(in.u.device());
  const CudaInputs gpu(in);
  cuda::Output y(in.u, in.u.scalar_type(), gpu.dtype);
  if (in.u.numel() > 0) {
    at::Tensor workspace = empty_floats({cuda::scan_workspace(gpu.args.size, gpu.plan)}, in.u);
    cuda::structure_aware_scan(gpu.args, gpu.plan, map_of(y.written), workspace.mutable_data_ptr<float>(),
                               at::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return y.finish();
}

Tensors<11> cuda_backward(Arg grad, const Inputs& in) {
  const c10::cuda::CUDAGuard guard(in.u.device());
  const CudaInputs gpu(in);
  const cuda::Size& size = gpu.args.size;
  const int64_t width = cuda::padded_dim(size.dim);
  cuda::Output grad_u(in.u, in.u.scalar_type(), gpu.dtype), grad_delta(in.delta, in.delta.scalar_type(), gpu.dtype);
  at::Tensor partial_B = empty_floats({width / cuda::kChannels, size.batch, in.u.size(2) * in.u.size(3)}, in.u);
  at::Tensor partial_C = at::empty_like(partial_B);
  at::Tensor sums = empty_floats({cuda::plan_blocks(size, gpu.plan), cuda::kParameters, width}, in.u);
  if (in.u.numel() > 0) {
    const at::Tensor grads = cuda::as_input(grad, gpu.dtype);
    at::Tensor workspace = empty_floats({cuda::scan_backward_workspace(size, gpu.plan)}, in.u);
    const cuda::ScanGradients out{map_of(grad_u.written), map_of(grad_delta.written),
                                  partial_B.mutable_data_ptr<float>(), partial_C.mutable_data_ptr<float>(),
                                  sums.mutable_data_ptr<float>()};
    cuda::structure_aware_scan_backward(gpu.args, gpu.plan, map_of(grads), out, workspace.mutable_data_ptr<float>(),
                                        at::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  } else {
    for (at::Tensor* partial : {&sums, &partial_B, &partial_C}) partial->zero_();
  }
  return gradients(in, grad_u.finish(), grad_delta.finish(), partial_B, partial_C, sums.sum(0).narrow(1, 0, size.dim));
}

MMSPATIALMAMBA_BIND(CUDA, structure_aware_scan, forward<cuda_forward>, backward<cuda_backward>)

#endif

}  // namespace
}  // namespace mmspatialmamba
