// Binds the CPU kernels to their ops.
#include <torch/library.h>

#include "../taps.h"
#include "ops.h"

namespace mmspatialmamba {

namespace {

using Tensors2 = std::tuple<at::Tensor, at::Tensor>;
using Tensors3 = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Tensors4 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Tensors5 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Tensors11 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                             at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Map map_of(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK(t.dim() == 3 || t.dim() == 4, op, ": ", name, " must have 3 or 4 dimensions, but has ", t.dim());
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

const float* data_or_null(const std::optional<at::Tensor>& t) { return t ? t->const_data_ptr<float>() : nullptr; }

// Runs task(batch, block, scratch) for all of them, with `scratch` floats for each thread.
template <class Task>
void parallel(int64_t batch, int64_t dim, int64_t scratch, const Task& task) {
  const int64_t count = blocks(dim);
  parallel_tasks(batch * count, scratch, [&](int64_t i, float* memory) { task(i / count, i % count, memory); });
}

at::Tensor as(const at::Tensor& value, const at::Tensor& like) {
  at::Tensor result = at::empty_like(like);
  result.copy_(value.reshape(like.sizes()));
  return result;
}

// What Kernels3x3 can hold as it is, else as floats.
at::Tensor dense_kernels(const at::Tensor& t) {
  return t.scalar_type() == at::kBFloat16 && t.is_contiguous() ? t : floats(t);
}

Kernels3x3 kernels3x3(const at::Tensor& t) {
  return {t.const_data_ptr(), t.scalar_type() == at::kFloat ? Type::kFloat : Type::kBFloat16};
}

struct Fusion {
  at::Tensor k1, k3, k5, alpha;
  FusionKernels kernels;

  Fusion(const char* op, int64_t dim, const at::Tensor& k1_, const at::Tensor& k3_, const at::Tensor& k5_,
         const at::Tensor& alpha_)
      : k1(dense_kernels(k1_)), k3(dense_kernels(k3_)), k5(dense_kernels(k5_)), alpha(floats(alpha_)) {
    TORCH_CHECK(k1.numel() == 9 * dim && k3.numel() == 9 * dim && k5.numel() == 9 * dim && alpha.numel() == 3, op,
                ": k1, k3 and k5 must have 9 elements for each of ", dim, " channels and alpha 3, but they have shapes ",
                k1.sizes(), ", ", k3.sizes(), ", ", k5.sizes(), " and ", alpha.sizes());
    const float* a = alpha.const_data_ptr<float>();
    kernels = {{kernels3x3(k1), kernels3x3(k3), kernels3x3(k5)}, {a[0], a[1], a[2]}};
  }
};

struct Scan {
  static constexpr const char* kOp = "structure_aware_scan";
  at::Tensor A, B, C, D;
  Fusion fusion;
  std::optional<at::Tensor> bias;
  ScanArgs args;

  Scan(const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A_, const at::Tensor& B_, const at::Tensor& C_,
       const at::Tensor& D_, const at::Tensor& k1, const at::Tensor& k3, const at::Tensor& k5, const at::Tensor& alpha,
       const std::optional<at::Tensor>& bias_, bool softplus)
      : A(floats(A_)), B(floats(B_)), C(floats(C_)), D(floats(D_)), fusion(kOp, u.size(1), k1, k3, k5, alpha),
        bias(floats(bias_)) {
    const int64_t batch = u.size(0), dim = u.size(1), pixels = u.size(2) * u.size(3);
    TORCH_CHECK(delta.sizes() == u.sizes() && A.numel() == dim && D.numel() == dim && (!bias || bias->numel() == dim), kOp,
                ": delta must have u's shape ", u.sizes(), " and A, D and delta_bias ", dim, " elements");
    TORCH_CHECK(B.numel() == batch * pixels && C.numel() == batch * pixels, kOp, ": B and C must have an element for each "
                "of ", batch, " images and ", pixels, " pixels");
    args = {batch, dim, u.size(2), u.size(3), map_of(kOp, "u", u), map_of(kOp, "delta", delta),
            A.const_data_ptr<float>(), B.const_data_ptr<float>(), C.const_data_ptr<float>(), D.const_data_ptr<float>(),
            fusion.kernels, data_or_null(bias), softplus};
  }
};

}  // namespace

void structure_aware_scan_to(const at::Tensor& y, const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A,
                             const at::Tensor& B, const at::Tensor& C, const at::Tensor& D, const at::Tensor& k1,
                             const at::Tensor& k3, const at::Tensor& k5, const at::Tensor& alpha,
                             const std::optional<at::Tensor>& bias, bool softplus) {
  const Scan scan(u, delta, A, B, C, D, k1, k3, k5, alpha, bias, softplus);
  if (y.numel() == 0) return;
  const Map out = map_of(Scan::kOp, "y", y);
  parallel(u.size(0), u.size(1), scratch::scan(u.size(3)), [&](int64_t batch, int64_t block, float* memory) {
    kernels().scan(scan.args, out, batch, block, memory);
  });
}

namespace {

at::Tensor structure_aware_scan(const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A, const at::Tensor& B,
                                const at::Tensor& C, const at::Tensor& D, const at::Tensor& k1, const at::Tensor& k3,
                                const at::Tensor& k5, const at::Tensor& alpha, const std::optional<at::Tensor>& bias,
                                bool softplus) {
  at::Tensor y = at::empty_like(u);
  structure_aware_scan_to(y, u, delta, A, B, C, D, k1, k3, k5, alpha, bias, softplus);
  return y;
}

Tensors11 structure_aware_scan_backward(const at::Tensor& grad, const at::Tensor& u, const at::Tensor& delta,
                                        const at::Tensor& A, const at::Tensor& B, const at::Tensor& C,
                                        const at::Tensor& D, const at::Tensor& k1, const at::Tensor& k3,
                                        const at::Tensor& k5, const at::Tensor& alpha,
                                        const std::optional<at::Tensor>& bias, bool softplus) {
  const Scan scan(u, delta, A, B, C, D, k1, k3, k5, alpha, bias, softplus);
  const ScanArgs& args = scan.args;
  check_sizes(Scan::kOp, "the gradient", grad, u.sizes());
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

struct StateFusion : Fusion {
  static constexpr const char* kOp = "state_fusion";
  FusionArgs args;

  StateFusion(const at::Tensor& h, const at::Tensor& k1, const at::Tensor& k3, const at::Tensor& k5,
              const at::Tensor& alpha)
      : Fusion(kOp, h.size(1), k1, k3, k5, alpha),
        args{h.size(0), h.size(1), h.size(2), h.size(3), map_of(kOp, "h", h), kernels} {}
};

at::Tensor state_fusion(const at::Tensor& h, const at::Tensor& k1, const at::Tensor& k3, const at::Tensor& k5,
                        const at::Tensor& alpha) {
  const StateFusion fusion(h, k1, k3, k5, alpha);
  const FusionArgs& args = fusion.args;
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
  const StateFusion fusion(h, k1, k3, k5, alpha);
  const FusionArgs& args = fusion.args;
  check_sizes(StateFusion::kOp, "the gradient", grad, h.sizes());
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
    TORCH_CHECK(u.dim() == 3 && A.dim() == 2, kOp, ": u must have 3 dimensions and A 2, but they have shapes ",
                u.sizes(), " and ", A.sizes());
    const int64_t batch = u.size(0), dim = u.size(1), length = u.size(2), state = A.size(1);
    TORCH_CHECK(delta.sizes() == u.sizes() && A.size(0) == dim && B.numel() == batch * state * length &&
                    (!bias || bias->numel() == dim), kOp, ": delta must have u's shape ", u.sizes(), ", A's rows and "
                "delta_bias's elements be ", dim, " and B have ", state, " rows of ", length, " for each image");
    args = {batch, dim, length, state, map_of(kOp, "u", u), map_of(kOp, "delta", delta),
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
  check_sizes(SelectiveScan::kOp, "the gradient", grad, {args.batch, args.dim, args.state, args.length});
  check_sizes(SelectiveScan::kOp, "h", h, grad.sizes());
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

Finish finish_of(const std::string& name) {
  if (name == "silu") return Finish::kSilu;
  if (name == "residual") return Finish::kResidual;
  TORCH_CHECK(name == "none", "depthwise_conv: finish must be 'none', 'silu' or 'residual', but is '", name, "'");
  return Finish::kNone;
}

struct Conv {
  static constexpr const char* kOp = "depthwise_conv";
  at::Tensor weights, bias;
  ConvArgs args;

  Conv(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias_, const std::string& finish)
      : weights(dense_kernels(weight)), bias(floats(bias_)) {
    const int64_t dim = x.size(1);
    TORCH_CHECK(weights.numel() == 9 * dim, kOp, ": weight must have shape (", dim, ", 1, 3, 3), but has ",
                weights.sizes());
    check_sizes(kOp, "bias", bias, {dim});
    args = {x.size(0), x.size(1), x.size(2), x.size(3), map_of(kOp, "x", x), kernels3x3(weights),
            bias.const_data_ptr<float>(), finish_of(finish)};
  }
};

}  // namespace

at::Tensor depthwise_conv(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                          const std::string& finish) {
  const Conv conv(x, weight, bias, finish);
  const ConvArgs& args = conv.args;
  at::Tensor y = at::empty_like(x);
  if (y.numel() == 0) return y;
  const Map out = map_of(Conv::kOp, "y", y);
  constexpr int64_t kRows = 32;
  const int64_t pieces = (args.height + kRows - 1) / kRows;
  parallel(args.batch * pieces, args.dim, scratch::depthwise_conv(args.width),
           [&](int64_t piece, int64_t block, float* memory) {
             const int64_t first = piece % pieces * kRows;
             kernels().depthwise_conv(args, out, piece / pieces, block, first, std::min(first + kRows, args.height),
                                      memory);
           });
  return y;
}

namespace {

Tensors3 depthwise_conv_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                                 const at::Tensor& bias, const std::string& finish) {
  const Conv conv(x, weight, bias, finish);
  const ConvArgs& args = conv.args;
  check_sizes(Conv::kOp, "the gradient", grad, x.sizes());
  at::Tensor grad_x = at::empty_like(x);
  at::Tensor sums = at::zeros({10, args.batch, args.dim}, x.options().dtype(at::kFloat));
  const Map in = map_of(Conv::kOp, "the gradient", grad), out = map_of(Conv::kOp, "x", grad_x);
  if (x.numel() > 0) {
    parallel(args.batch, args.dim, scratch::depthwise_conv_backward(args.width),
             [&](int64_t batch, int64_t block, float* memory) {
               kernels().depthwise_conv_backward(args, in, out, sums.mutable_data_ptr<float>(), batch, block, memory);
             });
  }
  sums = sums.sum(1);
  return {grad_x, as(sums.narrow(0, 0, 9).t(), weight), as(sums.select(0, 9), bias)};
}

struct DownsamplingConv {
  static constexpr const char* kOp = "downsampling_conv";
  static constexpr int64_t kChannels = 512;  // of a task
  static constexpr int64_t kRows = 8;        // of a task's output
  at::Tensor x, weights, bias;
  int64_t batch, dim, height, width, out_height, out_width, bands, groups;

  DownsamplingConv(const at::Tensor& x_, const at::Tensor& weight, const at::Tensor& bias_)
      : x(dense("x", x_)), weights(floats(floats(weight).view({-1, 9}).t())), bias(floats(bias_)), batch(x.size(0)),
        dim(x.size(1)), height(x.size(2)), width(x.size(3)), out_height(at::divup(height, 2)),
        out_width(at::divup(width, 2)), bands(at::divup(out_height, kRows)), groups(at::divup(dim, kChannels)) {
    TORCH_CHECK(dim % vectors(1) == 0, kOp, ": the number of channels must be a multiple of ", vectors(1), ", but is ",
                dim);
    TORCH_CHECK(weights.size(1) == dim && bias.sizes() == at::IntArrayRef({dim}), kOp, ": weight and bias must have ",
                dim, " channels, but have shapes ", weight.sizes(), " and ", bias_.sizes());
  }

  static at::Tensor dense(const char* name, const at::Tensor& t) {
    TORCH_CHECK(t.device().is_cpu() && t.scalar_type() == at::kFloat && t.dim() == 4, kOp, ": ", name,
                " must be a float32 CPU tensor of shape (batch, dim, height, width), but is ", t.scalar_type(), " on ",
                t.device(), " of shape ", t.sizes());
    return t.contiguous(at::MemoryFormat::ChannelsLast);
  }

  // Runs task(number, image, first output row, behind the last, first channel, arguments).
  template <class Task>
  void run(int64_t scratch, const Task& task) const {
    parallel_tasks(batch * bands * groups, scratch, [&](int64_t i, float* memory) {
      const int64_t part = i / groups, c = i % groups * kChannels, first = part % bands * kRows;
      const DownsamplingArgs args{width, std::min(kChannels, dim - c), dim, weights.const_data_ptr<float>() + c,
                                  bias.const_data_ptr<float>() + c, dim, dim};
      task(part, part / bands, first, std::min(first + kRows, out_height), c, args, memory);
    });
  }
};

at::Tensor downsampling_conv(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  const DownsamplingConv conv(x, weight, bias);
  const int64_t row = conv.width * conv.dim, out_row = conv.out_width * conv.dim;
  at::Tensor y = at::empty({conv.batch, conv.dim, conv.out_height, conv.out_width},
                           x.options().memory_format(at::MemoryFormat::ChannelsLast));
  const float* source = conv.x.const_data_ptr<float>();
  float* target = y.mutable_data_ptr<float>();
  conv.run(0, [&](int64_t, int64_t image, int64_t first, int64_t last, int64_t c, const DownsamplingArgs& args,
                  float*) {
    for (int64_t r = first; r < last; ++r) {
      const float* rows[3];
      for (int64_t i = 0; i < 3; ++i) {
        const int64_t at = 2 * r + i - 1;
        rows[i] = at < 0 || at >= conv.height ? nullptr : source + (image * conv.height + at) * row + c;
      }
      kernels().downsampling_conv(args, rows, target + (image * conv.out_height + r) * out_row + c);
    }
  });
  return y;
}

Tensors3 downsampling_conv_backward(const at::Tensor& grad_, const at::Tensor& y_, const at::Tensor& x,
                                    const at::Tensor& weight, const at::Tensor& bias) {
  const DownsamplingConv conv(x, weight, bias);
  const at::Tensor grad = conv.dense("the gradient", grad_), y = conv.dense("y", y_);
  check_sizes(conv.kOp, "the gradient", grad, {conv.batch, conv.dim, conv.out_height, conv.out_width});
  check_sizes(conv.kOp, "y", y, grad.sizes());
  const int64_t row = conv.width * conv.dim, out_row = conv.out_width * conv.dim;
  at::Tensor grad_x = at::empty_like(conv.x);
  at::Tensor sums = at::empty({10, conv.batch * conv.bands, conv.dim}, x.options());
  const float *inputs = conv.x.const_data_ptr<float>(), *outputs = y.const_data_ptr<float>(),
              *grads = grad.const_data_ptr<float>();
  float *target = grad_x.mutable_data_ptr<float>(), *partial = sums.mutable_data_ptr<float>();
  const int64_t own = scratch::downsampling_conv_backward(conv.width, conv.kChannels);
  conv.run(own + 10 * conv.kChannels, [&](int64_t part, int64_t image, int64_t first, int64_t last, int64_t c,
                                          const DownsamplingArgs& args, float* memory) {
    const int64_t from = image * conv.height * row + c, to = image * conv.out_height * out_row + c;
    float* own_sums = memory + own;
    kernels().downsampling_conv_backward(args, inputs + from, row, outputs + to, grads + to, out_row, conv.height,
                                         first, last, target + from, own_sums, memory);
    for (int64_t i = 0; i < 10; ++i) {
      std::copy_n(own_sums + i * args.dim, args.dim, partial + (i * conv.batch * conv.bands + part) * conv.dim + c);
    }
  });
  sums = sums.sum(1);
  return {grad_x, as(sums.narrow(0, 0, 9).t(), weight), as(sums.select(0, 9), bias)};
}

Matrix matrix_of(const char* op, const char* name, const at::Tensor& t) {
  const Map map = map_of(op, name, t.dim() == 3 ? t : t.unsqueeze(0));
  return {map.data, map.type, t.stride(-2)};
}

struct Norm {
  static constexpr const char* kOp = "gated_layer_norm";
  at::Tensor x, gate, weight, bias;
  NormArgs args;

  Norm(const at::Tensor& x_, const at::Tensor& gate_, const at::Tensor& weight_, const at::Tensor& bias_, double eps)
      : x(as_matrix(x_)), gate(gate_.defined() ? as_matrix(gate_) : gate_), weight(padded(weight_)), bias(padded(bias_)) {
    if (gate.defined()) check_sizes(kOp, "gate", gate_, x_.sizes());
    const Matrix gates = gate.defined() ? matrix_of(kOp, "gate", gate) : Matrix{};
    check_sizes(kOp, "weight", weight_, {x.size(1)});
    check_sizes(kOp, "bias", bias_, {x.size(1)});
    args = {x.size(0), x.size(1), matrix_of(kOp, "x", x), gates, weight.const_data_ptr<float>(),
            bias.const_data_ptr<float>(), static_cast<float>(eps)};
  }
};

constexpr int64_t kTaskRows = 64;

int64_t row_tasks(int64_t rows) { return (rows + kTaskRows - 1) / kTaskRows; }

// Runs task(number, first row, behind the last row, scratch).
template <class Task>
void parallel_rows(int64_t rows, int64_t scratch, const Task& task) {
  parallel(row_tasks(rows), 1, scratch, [&](int64_t number, int64_t, float* memory) {
    task(number, number * kTaskRows, std::min((number + 1) * kTaskRows, rows), memory);
  });
}

}  // namespace

at::Tensor gated_layer_norm(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& weight,
                            const at::Tensor& bias, double eps) {
  const Norm norm(x, gate, weight, bias, eps);
  at::Tensor y = at::empty(x.sizes(), x.options());
  if (y.numel() == 0) return y;
  const Matrix out = matrix_of(Norm::kOp, "y", y.view({norm.args.rows, norm.args.dim}));
  parallel_rows(norm.args.rows, scratch::gated_layer_norm(norm.args.dim),
                [&](int64_t, int64_t first, int64_t last, float* memory) {
                  kernels().gated_layer_norm(norm.args, out, first, last, memory);
                });
  return y;
}

namespace {

Tensors4 gated_layer_norm_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& gate,
                                   const at::Tensor& weight, const at::Tensor& bias, double eps) {
  const Norm norm(x, gate, weight, bias, eps);
  const int64_t rows = norm.args.rows, dim = norm.args.dim;
  check_sizes(Norm::kOp, "the gradient", grad, x.sizes());
  const at::Tensor grads = as_matrix(grad);
  at::Tensor grad_x = at::empty(x.sizes(), x.options()), grad_gate = at::empty(gate.sizes(), gate.options());
  at::Tensor sums = at::zeros({row_tasks(rows), 2, dim}, x.options().dtype(at::kFloat));
  if (x.numel() > 0) {
    const Matrix in = matrix_of(Norm::kOp, "the gradient", grads),
                 to_x = matrix_of(Norm::kOp, "x", grad_x.view({rows, dim})),
                 to_gate = matrix_of(Norm::kOp, "gate", grad_gate.view({rows, dim}));
    float* partial = sums.mutable_data_ptr<float>();
    parallel_rows(rows, scratch::gated_layer_norm_backward(dim),
                  [&](int64_t number, int64_t first, int64_t last, float* memory) {
                    kernels().gated_layer_norm_backward(norm.args, in, to_x, to_gate, partial + number * 2 * dim, first,
                                                        last, memory);
                  });
  }
  sums = sums.sum(0);
  return {grad_x, grad_gate, as(sums.select(0, 0), weight), as(sums.select(0, 1), bias)};
}

struct Gelu {
  static constexpr const char* kOp = "biased_gelu";
  at::Tensor x, bias;
  GeluArgs args;

  Gelu(const at::Tensor& x_, const at::Tensor& bias_) : x(as_matrix(x_)), bias(padded(bias_)) {
    check_sizes(kOp, "bias", bias_, {x.size(1)});
    args = {x.size(0), x.size(1), matrix_of(kOp, "x", x), bias.const_data_ptr<float>()};
  }
};

}  // namespace

at::Tensor biased_gelu(const at::Tensor& x, const at::Tensor& bias) {
  const Gelu gelu(x, bias);
  const int64_t rows = gelu.args.rows, dim = gelu.args.dim;
  at::Tensor y = at::empty(x.sizes(), x.options());
  if (y.numel() == 0) return y;
  const Matrix out = matrix_of(Gelu::kOp, "y", y.view({rows, dim}));
  parallel_rows(rows, scratch::biased_gelu(dim), [&](int64_t, int64_t first, int64_t last, float* memory) {
    kernels().biased_gelu(gelu.args, out, first, last, memory);
  });
  return y;
}

namespace {

Tensors2 biased_gelu_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& bias) {
  const Gelu gelu(x, bias);
  const int64_t rows = gelu.args.rows, dim = gelu.args.dim;
  check_sizes(Gelu::kOp, "the gradient", grad, x.sizes());
  const at::Tensor grads = as_matrix(grad);
  at::Tensor grad_x = at::empty(x.sizes(), x.options());
  at::Tensor sums = at::zeros({row_tasks(rows), dim}, x.options().dtype(at::kFloat));
  if (x.numel() > 0) {
    const Matrix in = matrix_of(Gelu::kOp, "the gradient", grads),
                 to_x = matrix_of(Gelu::kOp, "x", grad_x.view({rows, dim}));
    float* partial = sums.mutable_data_ptr<float>();
    parallel_rows(rows, scratch::biased_gelu_backward(dim),
                  [&](int64_t number, int64_t first, int64_t last, float* memory) {
                    kernels().biased_gelu_backward(gelu.args, in, to_x, {}, partial + number * dim, first, last,
                                                   memory);
                  });
  }
  return {grad_x, as(sums.sum(0), bias)};
}

}  // namespace
}  // namespace mmspatialmamba

TORCH_LIBRARY_FRAGMENT(mmspatialmamba_native, m) {
  m.def("instruction_set() -> str", []() -> std::string { return mmspatialmamba::kernels().instruction_set; });
}

TORCH_LIBRARY_IMPL(mmspatialmamba_native, CPU, m) {
  m.impl("selective_scan", mmspatialmamba::selective_scan);
  m.impl("selective_scan_backward", mmspatialmamba::selective_scan_backward);
  m.impl("state_fusion", mmspatialmamba::state_fusion);
  m.impl("state_fusion_backward", mmspatialmamba::state_fusion_backward);
  m.impl("structure_aware_scan", mmspatialmamba::structure_aware_scan);
  m.impl("structure_aware_scan_backward", mmspatialmamba::structure_aware_scan_backward);
  m.impl("depthwise_conv", mmspatialmamba::depthwise_conv);
  m.impl("depthwise_conv_backward", mmspatialmamba::depthwise_conv_backward);
  m.impl("downsampling_conv", mmspatialmamba::downsampling_conv);
  m.impl("downsampling_conv_backward", mmspatialmamba::downsampling_conv_backward);
  m.impl("gated_layer_norm", mmspatialmamba::gated_layer_norm);
  m.impl("gated_layer_norm_backward", mmspatialmamba::gated_layer_norm_backward);
  m.impl("biased_gelu", mmspatialmamba::biased_gelu);
  m.impl("biased_gelu_backward", mmspatialmamba::biased_gelu_backward);
}
