// Binds the CPU kernels to their ops.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include <cstdlib>
#include <memory>

#include "../taps.h"
#include "kernels.h"

namespace mmspatialmamba {

namespace baseline {
extern const Kernels table;
}
#ifdef WITH_AVX2
namespace avx2 {
extern const Kernels table;
}
#endif
#ifdef WITH_AVX512
namespace avx512 {
extern const Kernels table;
}
#endif

namespace {

using Tensors5 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Tensors11 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                             at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The kernels for the instruction set that PyTorch found, or was told by ATEN_CPU_CAPABILITY.
const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const std::string capability = at::get_cpu_capability();
#ifdef WITH_AVX512
    if (capability == "AVX512") return avx512::table;
#endif
#ifdef WITH_AVX2
    if (capability == "AVX2" || capability == "AVX512") return avx2::table;
#endif
    return baseline::table;
  }();
  return chosen;
}

Map map_of(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK(t.device().is_cpu(), op, ": ", name, " must be a CPU tensor as the others are, but is on ", t.device());
  Type type = Type::kFloat;
  if (t.scalar_type() == at::kBFloat16) {
    type = Type::kBFloat16;
  } else if (t.scalar_type() == at::kHalf) {
    type = Type::kHalf;
  } else {
    TORCH_CHECK(t.scalar_type() == at::kFloat, op, ": ", name,
                " must be float32, bfloat16 or float16 on the native backend, but is ", t.scalar_type());
  }
  if (t.dim() == 3) return {t.data_ptr(), type, t.stride(0), t.stride(1), 0, t.stride(2)};
  return {t.data_ptr(), type, t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

at::Tensor floats(const at::Tensor& t) { return t.to(at::kFloat).contiguous(); }

std::optional<at::Tensor> floats(const std::optional<at::Tensor>& t) {
  return t ? std::make_optional(floats(*t)) : std::nullopt;
}

const float* data_or_null(const std::optional<at::Tensor>& t) { return t ? t->const_data_ptr<float>() : nullptr; }

// Runs task(batch, block, scratch) for all of them, with `scratch` floats for each thread.
template <class Task>
void parallel(int64_t batch, int64_t dim, int64_t scratch, const Task& task) {
  const int64_t count = blocks(dim);
  at::parallel_for(0, batch * count, 1, [&](int64_t begin, int64_t end) {
    const size_t bytes = (scratch * sizeof(float) + 63) / 64 * 64;
    std::unique_ptr<float, decltype(&std::free)> memory(static_cast<float*>(std::aligned_alloc(64, bytes)), &std::free);
    TORCH_CHECK(memory, "no memory for ", bytes, " bytes of scratch space");
    for (int64_t i = begin; i < end; ++i) task(i / count, i % count, memory.get());
  });
}

at::Tensor as(const at::Tensor& value, const at::Tensor& like) {
  at::Tensor result = at::empty_like(like);
  result.copy_(value.reshape(like.sizes()));
  return result;
}

struct Scan {
  static constexpr const char* kOp = "structure_aware_scan";
  at::Tensor A, B, C, D, taps;
  std::optional<at::Tensor> bias;
  ScanArgs args;

  Scan(const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A_, const at::Tensor& B_, const at::Tensor& C_,
       const at::Tensor& D_, const at::Tensor& k1, const at::Tensor& k3, const at::Tensor& k5, const at::Tensor& alpha,
       const std::optional<at::Tensor>& bias_, bool softplus)
      : A(floats(A_)), B(floats(B_)), C(floats(C_)), D(floats(D_)), taps(merge_taps(k1, k3, k5, alpha)),
        bias(floats(bias_)) {
    args = {u.size(0), u.size(1), u.size(2), u.size(3), map_of(kOp, "u", u), map_of(kOp, "delta", delta),
            A.const_data_ptr<float>(), B.const_data_ptr<float>(), C.const_data_ptr<float>(), D.const_data_ptr<float>(),
            taps.const_data_ptr<float>(), data_or_null(bias), softplus};
  }
};

at::Tensor structure_aware_scan(const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A, const at::Tensor& B,
                                const at::Tensor& C, const at::Tensor& D, const at::Tensor& k1, const at::Tensor& k3,
                                const at::Tensor& k5, const at::Tensor& alpha, const std::optional<at::Tensor>& bias,
                                bool softplus) {
  const Scan scan(u, delta, A, B, C, D, k1, k3, k5, alpha, bias, softplus);
  at::Tensor y = at::empty_like(u);
  if (y.numel() == 0) return y;
  const Map out = map_of(Scan::kOp, "y", y);
  parallel(u.size(0), u.size(1), scratch::scan(u.size(3)), [&](int64_t batch, int64_t block, float* memory) {
    kernels().scan(scan.args, out, batch, block, memory);
  });
  return y;
}

Tensors11 structure_aware_scan_backward(const at::Tensor& grad, const at::Tensor& u, const at::Tensor& delta,
                                        const at::Tensor& A, const at::Tensor& B, const at::Tensor& C,
                                        const at::Tensor& D, const at::Tensor& k1, const at::Tensor& k3,
                                        const at::Tensor& k5, const at::Tensor& alpha,
                                        const std::optional<at::Tensor>& bias, bool softplus) {
  const Scan scan(u, delta, A, B, C, D, k1, k3, k5, alpha, bias, softplus);
  const ScanArgs& args = scan.args;
  at::Tensor grad_u = at::empty_like(u), grad_delta = at::empty_like(delta);
  const auto options = u.options().dtype(at::kFloat);
  at::Tensor partial_B = at::empty({blocks(args.dim), args.batch, args.height * args.width}, options);
  at::Tensor partial_C = at::empty_like(partial_B);
  at::Tensor sums = at::empty({kTaps + 3, args.batch, args.dim}, options);
  const ScanGradients gradients{map_of(Scan::kOp, "the gradient", grad), map_of(Scan::kOp, "u", grad_u),
                                map_of(Scan::kOp, "delta", grad_delta), partial_B.mutable_data_ptr<float>(),
                                partial_C.mutable_data_ptr<float>(), sums.mutable_data_ptr<float>()};
  if (u.numel() > 0) {
    parallel(args.batch, args.dim, scratch::scan_backward(args.height, args.width),
             [&](int64_t batch, int64_t block, float* memory) {
               kernels().scan_backward(args, gradients, batch, block, memory);
             });
  }
  sums = sums.sum(1);
  const auto [grad_k1, grad_k3, grad_k5, grad_alpha] =
      split_taps_gradient(sums.narrow(0, 0, kTaps), k1, k3, k5, alpha);
  const at::Tensor grad_bias = sums.select(0, kTaps + 2);
  return {grad_u, grad_delta, as(sums.select(0, kTaps), A), as(partial_B.sum(0), B), as(partial_C.sum(0), C),
          as(sums.select(0, kTaps + 1), D), grad_k1, grad_k3, grad_k5, grad_alpha,
          bias ? as(grad_bias, *bias) : at::zeros({args.dim}, A.options())};
}

FusionArgs fusion_args(const at::Tensor& h, const at::Tensor& taps) {
  return {h.size(0), h.size(1), h.size(2), h.size(3), map_of("state_fusion", "h", h), taps.const_data_ptr<float>()};
}

at::Tensor state_fusion(const at::Tensor& h, const at::Tensor& k1, const at::Tensor& k3, const at::Tensor& k5,
                        const at::Tensor& alpha) {
  const at::Tensor taps = merge_taps(k1, k3, k5, alpha);
  const FusionArgs args = fusion_args(h, taps);
  at::Tensor g = at::empty_like(h, h.options().dtype(at::kFloat));
  if (g.numel() == 0) return g;
  const Map out = map_of("state_fusion", "the output", g);
  parallel(args.batch, args.dim, scratch::fusion(args.width), [&](int64_t batch, int64_t block, float* memory) {
    kernels().fusion(args, out, batch, block, memory);
  });
  return g;
}

Tensors5 state_fusion_backward(const at::Tensor& grad, const at::Tensor& h, const at::Tensor& k1, const at::Tensor& k3,
                               const at::Tensor& k5, const at::Tensor& alpha) {
  const at::Tensor taps = merge_taps(k1, k3, k5, alpha);
  const FusionArgs args = fusion_args(h, taps);
  at::Tensor grad_h = at::empty_like(h);
  at::Tensor sums = at::zeros({kTaps, args.batch, args.dim}, h.options().dtype(at::kFloat));
  const Map in = map_of("state_fusion", "the gradient", grad), out = map_of("state_fusion", "h", grad_h);
  if (h.numel() > 0) {
    parallel(args.batch, args.dim, scratch::fusion_backward(args.width),
             [&](int64_t batch, int64_t block, float* memory) {
               kernels().fusion_backward(args, in, out, sums.mutable_data_ptr<float>(), batch, block, memory);
             });
  }
  return std::tuple_cat(std::make_tuple(grad_h), split_taps_gradient(sums.sum(1), k1, k3, k5, alpha));
}

struct SelectiveScan {
  static constexpr const char* kOp = "selective_scan";
  at::Tensor A, B;
  std::optional<at::Tensor> bias;
  SelectiveScanArgs args;

  SelectiveScan(const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A_, const at::Tensor& B_,
                const std::optional<at::Tensor>& bias_, bool softplus)
      : A(floats(A_)), B(floats(B_)), bias(floats(bias_)) {
    args = {u.size(0), u.size(1), u.size(2), A.size(1), map_of(kOp, "u", u), map_of(kOp, "delta", delta),
            A.const_data_ptr<float>(), B.const_data_ptr<float>(), data_or_null(bias), softplus};
  }
};

at::Tensor selective_scan(const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A, const at::Tensor& B,
                          const std::optional<at::Tensor>& bias, bool softplus) {
  const SelectiveScan scan(u, delta, A, B, bias, softplus);
  const SelectiveScanArgs& args = scan.args;
  at::Tensor h = at::empty({args.batch, args.dim, args.state, args.length}, u.options().dtype(at::kFloat));
  if (h.numel() == 0) return h;
  parallel(args.batch, args.dim, scratch::selective_scan(), [&](int64_t batch, int64_t block, float* memory) {
    kernels().selective_scan(args, h.mutable_data_ptr<float>(), batch, block, memory);
  });
  return h;
}

Tensors5 selective_scan_backward(const at::Tensor& grad, const at::Tensor& h, const at::Tensor& u,
                                 const at::Tensor& delta, const at::Tensor& A, const at::Tensor& B,
                                 const std::optional<at::Tensor>& bias, bool softplus) {
  const SelectiveScan scan(u, delta, A, B, bias, softplus);
  const SelectiveScanArgs& args = scan.args;
  const at::Tensor grads = floats(grad), states = floats(h);
  at::Tensor grad_u = at::empty_like(u), grad_delta = at::empty_like(delta);
  const auto options = u.options().dtype(at::kFloat);
  at::Tensor grad_A = at::zeros({args.batch, args.dim, args.state}, options);
  at::Tensor partial_B = at::zeros({blocks(args.dim), args.batch, args.state, args.length}, options);
  at::Tensor grad_bias = at::zeros({args.batch, args.dim}, options);
  const Map out_u = map_of(SelectiveScan::kOp, "u", grad_u), out_delta = map_of(SelectiveScan::kOp, "delta", grad_delta);
  if (states.numel() > 0) {
    parallel(args.batch, args.dim, scratch::selective_scan_backward(args.state),
             [&](int64_t batch, int64_t block, float* memory) {
               kernels().selective_scan_backward(
                   args, grads.const_data_ptr<float>(), states.const_data_ptr<float>(), out_u, out_delta,
                   grad_A.mutable_data_ptr<float>(), partial_B.mutable_data_ptr<float>(),
                   grad_bias.mutable_data_ptr<float>(), batch, block, memory);
             });
  }
  return {grad_u, grad_delta, as(grad_A.sum(0), A), as(partial_B.sum(0), B),
          bias ? as(grad_bias.sum(0), *bias) : at::zeros({args.dim}, A.options())};
}

}  // namespace
}  // namespace mmspatialmamba

TORCH_LIBRARY_IMPL(mmspatialmamba_native, CPU, m) {
  m.impl("selective_scan", mmspatialmamba::selective_scan);
  m.impl("selective_scan_backward", mmspatialmamba::selective_scan_backward);
  m.impl("state_fusion", mmspatialmamba::state_fusion);
  m.impl("state_fusion_backward", mmspatialmamba::state_fusion_backward);
  m.impl("structure_aware_scan", mmspatialmamba::structure_aware_scan);
  m.impl("structure_aware_scan_backward", mmspatialmamba::structure_aware_scan_backward);
}
