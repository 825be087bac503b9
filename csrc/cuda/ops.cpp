// Binds the CUDA kernels to their ops.
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <limits>

#include "../taps.h"
#include "kernels.h"

namespace mmspatialmamba {
namespace {

using Tensors5 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Tensors11 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                             at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using OptionalTensor = std::optional<at::Tensor>;

void check(const char* op, const char* name, const at::Tensor& t, const at::Device& device) {
  TORCH_CHECK(t.device() == device, op, ": ", name, " must be on ", device, " as the first input is, but is on ",
              t.device());
  TORCH_CHECK(t.scalar_type() == at::kFloat || t.scalar_type() == at::kHalf || t.scalar_type() == at::kBFloat16, op,
              ": ", name, " must be float32, bfloat16 or float16 on the native backend, but is ", t.scalar_type());
}

// In one dtype: the kernels take no two.
at::ScalarType common_dtype(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() ? a.scalar_type() : at::kFloat;
}

cuda::DType kernel_dtype(at::ScalarType dtype) {
  if (dtype == at::kHalf) return cuda::DType::kFloat16;
  return dtype == at::kBFloat16 ? cuda::DType::kBFloat16 : cuda::DType::kFloat32;
}

// The kernels take maps whose channels or whose columns lie together.
bool is_usable(const at::Tensor& map) {
  return (map.size(1) > 1 && map.stride(1) == 1) || map.size(3) == 1 || map.stride(3) == 1;
}

at::Tensor as_input(const at::Tensor& t, at::ScalarType dtype) {
  const at::Tensor value = t.to(dtype);
  return is_usable(value) ? value : value.contiguous();
}

// A map for a kernel to write in one dtype, and what it is to become.
struct Output {
  at::Tensor result, written;

  Output(const at::Tensor& like, at::ScalarType dtype, at::ScalarType written_dtype)
      : result(at::empty_like(like, like.options().dtype(dtype))) {
    written = dtype == written_dtype && is_usable(result)
                  ? result
                  : at::empty(like.sizes(), like.options().dtype(written_dtype));
  }

  at::Tensor finish() { return written.is_same(result) ? result : result.copy_(written); }
};

cuda::Map map_of(const at::Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

at::Tensor floats(const at::Tensor& t) { return t.to(at::kFloat).contiguous(); }

OptionalTensor floats(const OptionalTensor& t) { return t ? std::make_optional(floats(*t)) : std::nullopt; }

const float* data_or_null(const OptionalTensor& t) { return t ? t->const_data_ptr<float>() : nullptr; }

at::Tensor as(const at::Tensor& value, const at::Tensor& like) {
  at::Tensor result = at::empty_like(like);
  result.copy_(value.reshape(like.sizes()));
  return result;
}

at::Tensor grad_of_bias(const at::Tensor& value, const OptionalTensor& bias, const at::Tensor& A) {
  return bias ? as(value, *bias) : at::zeros({A.size(0)}, A.options());
}

at::Tensor float_buffer(at::IntArrayRef sizes, const at::Tensor& like) {
  return at::empty(sizes, like.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous));
}

int multiprocessors() { return at::cuda::getCurrentDeviceProperties()->multiProcessorCount; }

int32_t narrow(const char* op, int64_t size) {
  TORCH_CHECK(size <= std::numeric_limits<int32_t>::max() / 16, op, ": a dimension of ", size, " is too large");
  return static_cast<int32_t>(size);
}

cuda::Size size_of(const char* op, const at::Tensor& map) {
  return {narrow(op, map.size(0)), narrow(op, map.size(1)), narrow(op, map.size(2)), narrow(op, map.size(3))};
}

struct Scan {
  static constexpr const char* kOp = "structure_aware_scan";
  at::ScalarType dtype;
  at::Tensor u, delta, A, B, C, D, taps;
  OptionalTensor bias;
  cuda::ScanInputs inputs;
  cuda::Plan plan;

  Scan(const at::Tensor& u_, const at::Tensor& delta_, const at::Tensor& A_, const at::Tensor& B_,
       const at::Tensor& C_, const at::Tensor& D_, const at::Tensor& k1, const at::Tensor& k3, const at::Tensor& k5,
       const at::Tensor& alpha, const OptionalTensor& bias_, bool softplus) {
    const auto device = u_.device();
    check(kOp, "u", u_, device);
    check(kOp, "delta", delta_, device);
    check(kOp, "A", A_, device);
    check(kOp, "B", B_, device);
    check(kOp, "C", C_, device);
    check(kOp, "D", D_, device);
    for (const at::Tensor& kernel : {k1, k3, k5}) check(kOp, "kernels", kernel, device);
    check(kOp, "alpha", alpha, device);
    if (bias_) check(kOp, "delta_bias", *bias_, device);
    dtype = common_dtype(u_, delta_);
    u = as_input(u_, dtype);
    delta = as_input(delta_, dtype);
    A = floats(A_);
    B = floats(B_);
    C = floats(C_);
    D = floats(D_);
    taps = merge_taps(k1, k3, k5, alpha).contiguous();
    bias = floats(bias_);
    const cuda::Size size = size_of(kOp, u);
    plan = cuda::make_plan(size, multiprocessors());
    inputs = {size,
              kernel_dtype(dtype),
              softplus,
              map_of(u),
              map_of(delta),
              A.const_data_ptr<float>(),
              B.const_data_ptr<float>(),
              C.const_data_ptr<float>(),
              D.const_data_ptr<float>(),
              taps.const_data_ptr<float>(),
              data_or_null(bias)};
  }
};

at::Tensor structure_aware_scan(const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A, const at::Tensor& B,
                                const at::Tensor& C, const at::Tensor& D, const at::Tensor& k1, const at::Tensor& k3,
                                const at::Tensor& k5, const at::Tensor& alpha, const OptionalTensor& bias,
                                bool softplus) {
  const c10::cuda::CUDAGuard guard(u.device());
  const Scan scan(u, delta, A, B, C, D, k1, k3, k5, alpha, bias, softplus);
  Output y(u, u.scalar_type(), scan.dtype);
  if (u.numel() > 0) {
    at::Tensor workspace = float_buffer({cuda::scan_workspace(scan.inputs.size, scan.plan)}, u);
    C10_CUDA_CHECK(cuda::structure_aware_scan(scan.inputs, scan.plan, map_of(y.written),
                                              workspace.mutable_data_ptr<float>(), at::cuda::getCurrentCUDAStream()));
  }
  return y.finish();
}

Tensors11 structure_aware_scan_backward(const at::Tensor& grad, const at::Tensor& u, const at::Tensor& delta,
                                        const at::Tensor& A, const at::Tensor& B, const at::Tensor& C,
                                        const at::Tensor& D, const at::Tensor& k1, const at::Tensor& k3,
                                        const at::Tensor& k5, const at::Tensor& alpha, const OptionalTensor& bias,
                                        bool softplus) {
  const c10::cuda::CUDAGuard guard(u.device());
  const Scan scan(u, delta, A, B, C, D, k1, k3, k5, alpha, bias, softplus);
  check(Scan::kOp, "the gradient", grad, u.device());
  const cuda::Size& size = scan.inputs.size;
  const int64_t width = cuda::padded_dim(size.dim);
  Output grad_u(u, u.scalar_type(), scan.dtype), grad_delta(delta, delta.scalar_type(), scan.dtype);
  at::Tensor partial_B = float_buffer({width / cuda::kChannels, u.size(0), u.size(2) * u.size(3)}, u);
  at::Tensor partial_C = at::empty_like(partial_B);
  at::Tensor sums = float_buffer({cuda::plan_blocks(size, scan.plan), cuda::kParameters, width}, u);
  if (u.numel() > 0) {
    const at::Tensor grads = as_input(grad, scan.dtype);
    at::Tensor workspace = float_buffer({cuda::scan_backward_workspace(size, scan.plan)}, u);
    const cuda::ScanGradients out{map_of(grad_u.written), map_of(grad_delta.written),
                                  partial_B.mutable_data_ptr<float>(), partial_C.mutable_data_ptr<float>(),
                                  sums.mutable_data_ptr<float>()};
    C10_CUDA_CHECK(cuda::structure_aware_scan_backward(scan.inputs, scan.plan, map_of(grads), out,
                                                       workspace.mutable_data_ptr<float>(),
                                                       at::cuda::getCurrentCUDAStream()));
  } else {
    sums.zero_();
    partial_B.zero_();
    partial_C.zero_();
  }
  sums = sums.sum(0).narrow(1, 0, size.dim);
  const auto [grad_k1, grad_k3, grad_k5, grad_alpha] = split_taps_gradient(sums.narrow(0, 0, 25), k1, k3, k5, alpha);
  return {grad_u.finish(),
          grad_delta.finish(),
          as(sums.select(0, 25), A),
          as(partial_B.sum(0), B),
          as(partial_C.sum(0), C),
          as(sums.select(0, 26), D),
          grad_k1,
          grad_k3,
          grad_k5,
          grad_alpha,
          grad_of_bias(sums.select(0, 27), bias, A)};
}

struct Fusion {
  static constexpr const char* kOp = "state_fusion";
  at::Tensor h, taps;
  cuda::Size size;
  cuda::Plan plan;

  Fusion(const at::Tensor& h_, const at::Tensor& k1, const at::Tensor& k3, const at::Tensor& k5,
         const at::Tensor& alpha) {
    const auto device = h_.device();
    check(kOp, "h", h_, device);
    for (const at::Tensor& kernel : {k1, k3, k5}) check(kOp, "kernels", kernel, device);
    check(kOp, "alpha", alpha, device);
    h = as_input(h_, at::kFloat);
    taps = merge_taps(k1, k3, k5, alpha).contiguous();
    size = size_of(kOp, h);
    plan = cuda::make_plan(size, multiprocessors());
  }
};

at::Tensor state_fusion(const at::Tensor& h, const at::Tensor& k1, const at::Tensor& k3, const at::Tensor& k5,
                        const at::Tensor& alpha) {
  const c10::cuda::CUDAGuard guard(h.device());
  const Fusion fusion(h, k1, k3, k5, alpha);
  Output out(h, at::kFloat, at::kFloat);
  if (h.numel() > 0) {
    C10_CUDA_CHECK(cuda::state_fusion(fusion.size, fusion.plan, map_of(fusion.h), fusion.taps.const_data_ptr<float>(),
                                      map_of(out.written), at::cuda::getCurrentCUDAStream()));
  }
  return out.finish();
}

Tensors5 state_fusion_backward(const at::Tensor& grad, const at::Tensor& h, const at::Tensor& k1, const at::Tensor& k3,
                               const at::Tensor& k5, const at::Tensor& alpha) {
  const c10::cuda::CUDAGuard guard(h.device());
  const Fusion fusion(h, k1, k3, k5, alpha);
  check(Fusion::kOp, "the gradient", grad, h.device());
  Output grad_h(h, h.scalar_type(), at::kFloat);
  at::Tensor sums = float_buffer(
      {cuda::plan_blocks(fusion.size, fusion.plan), cuda::kParameters, cuda::padded_dim(fusion.size.dim)}, h);
  if (h.numel() > 0) {
    const at::Tensor grads = as_input(grad, at::kFloat);
    C10_CUDA_CHECK(cuda::state_fusion_backward(fusion.size, fusion.plan, map_of(grads), map_of(fusion.h),
                                               fusion.taps.const_data_ptr<float>(), map_of(grad_h.written),
                                               sums.mutable_data_ptr<float>(), at::cuda::getCurrentCUDAStream()));
  } else {
    sums.zero_();
  }
  const at::Tensor grad_taps = sums.sum(0).narrow(0, 0, 25).narrow(1, 0, fusion.size.dim);
  return std::tuple_cat(std::make_tuple(grad_h.finish()), split_taps_gradient(grad_taps, k1, k3, k5, alpha));
}

struct SelectiveScan {
  static constexpr const char* kOp = "selective_scan";
  at::ScalarType dtype;
  at::Tensor u, delta, A, B;
  OptionalTensor bias;
  cuda::SelectiveInputs inputs;

  SelectiveScan(const at::Tensor& u_, const at::Tensor& delta_, const at::Tensor& A_, const at::Tensor& B_,
                const OptionalTensor& bias_, bool softplus) {
    const auto device = u_.device();
    check(kOp, "u", u_, device);
    check(kOp, "delta", delta_, device);
    check(kOp, "A", A_, device);
    check(kOp, "B", B_, device);
    if (bias_) check(kOp, "delta_bias", *bias_, device);
    dtype = common_dtype(u_, delta_);
    u = u_.to(dtype).contiguous();
    delta = delta_.to(dtype).contiguous();
    A = floats(A_);
    B = floats(B_);
    bias = floats(bias_);
    const int32_t batch = narrow(kOp, u.size(0)), dim = narrow(kOp, u.size(1)), state = narrow(kOp, A.size(1));
    const int64_t length = u.size(2), rows = static_cast<int64_t>(batch) * dim * state;
    inputs = {batch,
              dim,
              state,
              cuda::selective_chunks(rows, length, multiprocessors()),
              length,
              kernel_dtype(dtype),
              softplus,
              u.data_ptr(),
              delta.data_ptr(),
              A.const_data_ptr<float>(),
              B.const_data_ptr<float>(),
              data_or_null(bias)};
  }
};

at::Tensor selective_scan(const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A, const at::Tensor& B,
                          const OptionalTensor& bias, bool softplus) {
  const c10::cuda::CUDAGuard guard(u.device());
  const SelectiveScan scan(u, delta, A, B, bias, softplus);
  at::Tensor h = float_buffer({u.size(0), u.size(1), A.size(1), u.size(2)}, u);
  if (h.numel() > 0) {
    at::Tensor workspace = float_buffer({cuda::selective_workspace(scan.inputs)}, u);
    C10_CUDA_CHECK(cuda::selective_scan(scan.inputs, h.mutable_data_ptr<float>(), workspace.mutable_data_ptr<float>(),
                                        at::cuda::getCurrentCUDAStream()));
  }
  return h;
}

Tensors5 selective_scan_backward(const at::Tensor& grad, const at::Tensor& h, const at::Tensor& u,
                                 const at::Tensor& delta, const at::Tensor& A, const at::Tensor& B,
                                 const OptionalTensor& bias, bool softplus) {
  const c10::cuda::CUDAGuard guard(u.device());
  const SelectiveScan scan(u, delta, A, B, bias, softplus);
  check(SelectiveScan::kOp, "the gradient", grad, u.device());
  check(SelectiveScan::kOp, "h", h, u.device());
  const int64_t state = A.size(1);
  at::Tensor grad_u = at::empty_like(scan.u), grad_delta = at::empty_like(scan.delta), grad_B = at::empty_like(scan.B);
  at::Tensor sums = float_buffer({u.size(0) * scan.inputs.chunks, u.size(1), state + 1}, u);
  if (h.numel() > 0) {
    const at::Tensor grads = floats(grad), states = floats(h);
    at::Tensor workspace = float_buffer({cuda::selective_backward_workspace(scan.inputs)}, u);
    const cuda::SelectiveGradients out{grad_u.data_ptr(), grad_delta.data_ptr(), grad_B.mutable_data_ptr<float>(),
                                       sums.mutable_data_ptr<float>()};
    C10_CUDA_CHECK(cuda::selective_scan_backward(scan.inputs, grads.const_data_ptr<float>(),
                                                 states.const_data_ptr<float>(), out,
                                                 workspace.mutable_data_ptr<float>(),
                                                 at::cuda::getCurrentCUDAStream()));
  } else {
    for (at::Tensor* gradient : {&grad_u, &grad_delta, &grad_B, &sums}) gradient->zero_();
  }
  sums = sums.sum(0);
  return {as(grad_u, u), as(grad_delta, delta), as(sums.narrow(1, 0, state), A), as(grad_B, B),
          grad_of_bias(sums.select(1, state), bias, A)};
}

}  // namespace
}  // namespace mmspatialmamba

TORCH_LIBRARY_IMPL(mmspatialmamba_native, CUDA, m) {
  m.impl("selective_scan", mmspatialmamba::selective_scan);
  m.impl("selective_scan_backward", mmspatialmamba::selective_scan_backward);
  m.impl("state_fusion", mmspatialmamba::state_fusion);
  m.impl("state_fusion_backward", mmspatialmamba::state_fusion_backward);
  m.impl("structure_aware_scan", mmspatialmamba::structure_aware_scan);
  m.impl("structure_aware_scan_backward", mmspatialmamba::structure_aware_scan_backward);
}
