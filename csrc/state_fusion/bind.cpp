// Binds the kernels of state_fusion to its ops.
#include "common/bind_cpu.h"
#include "state_fusion/kernels.h"
#ifdef WITH_CUDA
#include "common/bind_cuda.h"
#include "state_fusion/cuda.h"
#endif

namespace mmspatialmamba {
namespace {

struct Inputs {
  Arg h, k1, k3, k5, alpha;
};

Checks check(const char* op, const Inputs& in) {
  const Checks checks(op, "h", in.h);
  checks.dimensions("h", in.h, 4);
  check_kernels(checks, in.h.size(1), in.k1, in.k3, in.k5, in.alpha);
  return checks;
}

template <at::Tensor run(const Inputs&)>
at::Tensor forward(Arg h, Arg k1, Arg k3, Arg k5, Arg alpha) {
  const Inputs in{h, k1, k3, k5, alpha};
  check("state_fusion", in);
  return run(in);
}

template <Tensors<2> run(Arg, const Inputs&)>
Tensors<5> backward(Arg grad, Arg h, Arg k1, Arg k3, Arg k5, Arg alpha) {
  const Inputs in{h, k1, k3, k5, alpha};
  check("state_fusion_backward", in)("grad", grad, h.sizes());
  const auto [grad_h, grad_taps] = run(grad, in);
  return std::tuple_cat(std::make_tuple(grad_h), split_taps_gradient(grad_taps, k1, k3, k5, alpha));
}

at::Tensor cpu_forward(const Inputs& in) {
  const CpuFusionKernels kernels(in.k1, in.k3, in.k5, in.alpha);
  const FusionArgs args{shape_of(in.h), map_of(in.h), kernels.get()};
  at::Tensor g = at::empty_like(in.h, in.h.options().dtype(at::kFloat));
  const Map out = map_of(g);
  parallel_blocks(args, StateFusionCpu::forward_scratch(args.width),
                  [&](auto... task) { MMSPATIALMAMBA_CPU(state_fusion).forward(args, out, task...); });
  return g;
}

// The gradients of h and of the taps.
Tensors<2> cpu_backward(Arg grad, const Inputs& in) {
  const CpuFusionKernels kernels(in.k1, in.k3, in.k5, in.alpha);
  const FusionArgs args{shape_of(in.h), map_of(in.h), kernels.get()};
  at::Tensor grad_h = at::empty_like(in.h), sums = zero_floats({kTaps, args.batch, args.dim}, in.h);
  const Map grads = map_of(grad), out = map_of(grad_h);
  float* const partial = sums.mutable_data_ptr<float>();
  parallel_blocks(args, StateFusionCpu::backward_scratch(args.width),
                  [&](auto... task) { MMSPATIALMAMBA_CPU(state_fusion).backward(args, grads, out, partial, task...); });
  return {grad_h, sums.sum(1)};
}

MMSPATIALMAMBA_BIND(CPU, state_fusion, forward<cpu_forward>, backward<cpu_backward>)

#ifdef WITH_CUDA

// What the CUDA kernels take.
struct CudaInputs {
  at::Tensor h, taps;
  cuda::Size size;
  cuda::Plan plan;

  explicit CudaInputs(const Inputs& in)
      : h(cuda::as_input(in.h, at::kFloat)), taps(merge_taps(in.k1, in.k3, in.k5, in.alpha)),
        size(cuda::size_of("state_fusion", h)), plan(cuda::make_plan(size, cuda::multiprocessors())) {}
};

at::Tensor cuda_forward(const Inputs& in) {
  const c10::cuda::CUDAGuard guard(in.h.device());
  const CudaInputs gpu(in);
  cuda::Output out(in.h, at::kFloat, at::kFloat);
  if (in.h.numel() > 0) {
    cuda::state_fusion(gpu.size, gpu.plan, map_of(gpu.h), gpu.taps.const_data_ptr<float>(), map_of(out.written),
                       at::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return out.finish();
}

Tensors<2> cuda_backward(Arg grad, const Inputs& in) {
  const c10::cuda::CUDAGuard guard(in.h.device());
  const CudaInputs gpu(in);
  cuda::Output grad_h(in.h, in.h.scalar_type(), at::kFloat);
  at::Tensor sums =
      empty_floats({cuda::plan_blocks(gpu.size, gpu.plan), cuda::kParameters, cuda::padded_dim(gpu.size.dim)}, in.h);
  if (in.h.numel() > 0) {
    const at::Tensor grads = cuda::as_input(grad, at::kFloat);
    cuda::state_fusion_backward(gpu.size, gpu.plan, map_of(grads), map_of(gpu.h), gpu.taps.const_data_ptr<float>(),
                                map_of(grad_h.written), sums.mutable_data_ptr<float>(),
                                at::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  } else {
    sums.zero_();
  }
  return {grad_h.finish(), sums.sum(0).narrow(0, 0, kTaps).narrow(1, 0, gpu.size.dim)};
}

MMSPATIALMAMBA_BIND(CUDA, state_fusion, forward<cuda_forward>, backward<cuda_backward>)

#endif

}  // namespace
}  // namespace mmspatialmamba
