// Layers of the network that run as one op where no gradients are needed: blocks of rows go through all their steps in
// the caches, so what lies between is never written to memory.
#include <torch/library.h>

#include <cstring>

#include "ops.h"

namespace mmspatialmamba {

namespace {

// At most so many rows of activations are computed at a time.
constexpr int64_t kRows = 144;

const float* data(const at::Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }

// as_matrix of a float32 CPU tensor.
at::Tensor checked(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK(t.device().is_cpu() && t.scalar_type() == at::kFloat, op, ": ", name, " must be a float32 CPU tensor, but is ",
              t.scalar_type(), " on ", t.device());
  TORCH_CHECK(t.size(-1) > 0, op, ": ", name, " must have at least one channel");
  return as_matrix(t);
}

struct RowNorm {
  at::Tensor weight, bias;
  int64_t dim;
  float eps;

  RowNorm(const at::Tensor& weight_, const at::Tensor& bias_, double eps_)
      : weight(padded(weight_)), bias(padded(bias_)), dim(weight_.size(0)), eps(static_cast<float>(eps_)) {}

  int64_t scratch() const { return scratch::gated_layer_norm(dim); }

  // LayerNorm of rows, times SiLU of those of the gate if there is one.
  void run(const float* x, int64_t x_row, const float* gate, int64_t gate_row, int64_t rows, float* y, int64_t y_row,
           float* scratch) const {
    const auto matrix = [](const float* data, int64_t row) {
      return Matrix{const_cast<float*>(data), Type::kFloat, row};
    };
    const NormArgs args{rows, dim, matrix(x, x_row), matrix(gate, gate_row), data(weight), data(bias), eps};
    kernels().gated_layer_norm(args, matrix(y, y_row), 0, rows, scratch);
  }
};

struct Product {
  at::Tensor packed, scale, bias;
  Activation activation;
  int64_t in, out;

  explicit Product(const at::Tensor& weight_, const std::optional<at::Tensor>& bias_ = std::nullopt,
                   Activation activation_ = Activation::kNone, const std::optional<at::Tensor>& scale_ = std::nullopt)
      : activation(activation_), in(weight_.size(1)), out(weight_.size(0)) {
    if (scale_) scale = padded(*scale_, kWidestPanel);
    if (bias_) bias = padded(*bias_, kWidestPanel);
    const at::Tensor weight = floats(weight_);
    packed = at::empty({(out + kWidestPanel - 1) / kWidestPanel * kWidestPanel, in}, weight.options());
    float* target = packed.mutable_data_ptr<float>();
    parallel_tasks(panels(), 0, [&](int64_t i, float*) { kernels().pack_linear(data(weight), out, in, target, i); });
  }

  int64_t panels() const { return (out + kernels().panel - 1) / kernels().panel; }

  void run(const float* x, int64_t x_row, int64_t rows, float* y, int64_t y_row, const float* residual = nullptr,
           int64_t residual_row = 0) const {
    kernels().linear({rows, in, out, data(packed), data(scale), data(bias), activation, x, x_row, residual, residual_row,
                      y, y_row},
                     0, panels());
  }
};

// The distance of rows in scratch memory: not a power of two, lest they push each other out of the caches.
int64_t spaced(int64_t channels) { return (channels + 31) / 16 * 16; }

// Runs task(first row, number of rows, scratch) for all rows, with `each` floats of scratch for each row and `more`.
template <class Task>
void over_rows(int64_t rows, int64_t each, int64_t more, const Task& task) {
  if (rows == 0) return;
  const int64_t threads = at::get_num_threads(), tile = kernels().tile_rows;
  int64_t tasks = (rows + kRows - 1) / kRows;
  tasks = (tasks + threads - 1) / threads * threads;
  const int64_t step = ((rows + tasks - 1) / tasks + tile - 1) / tile * tile;
  parallel_tasks((rows + step - 1) / step, step * each + more, [&](int64_t i, float* scratch) {
    task(i * step, std::min(step, rows - i * step), scratch);
  });
}

at::Tensor with_channels(const at::Tensor& x, int64_t channels) {
  auto sizes = x.sizes().vec();
  sizes.back() = channels;
  return at::empty(sizes, x.options());
}

at::Tensor linear(const at::Tensor& x_, const at::Tensor& weight) {
  const at::Tensor x = checked("linear", "x", x_);
  const Product product(weight);
  at::Tensor out = with_channels(x_, product.out);
  float* y = out.mutable_data_ptr<float>();
  over_rows(x.size(0), 0, 0, [&](int64_t first, int64_t rows, float*) {
    product.run(data(x) + first * x.stride(0), x.stride(0), rows, y + first * product.out, product.out);
  });
  return out;
}

at::Tensor norm_linear(const at::Tensor& x_, const at::Tensor& norm_weight, const at::Tensor& norm_bias, double eps,
                       const at::Tensor& weight) {
  const at::Tensor x = checked("norm_linear", "x", x_);
  const RowNorm norm(norm_weight, norm_bias, eps);
  const Product product(weight);
  at::Tensor out = with_channels(x_, product.out);
  float* y = out.mutable_data_ptr<float>();
  const int64_t row = spaced(norm.dim);
  over_rows(x.size(0), row, norm.scratch(), [&](int64_t first, int64_t rows, float* memory) {
    float* normed = memory + norm.scratch();
    norm.run(data(x) + first * x.stride(0), x.stride(0), nullptr, 0, rows, normed, row, memory);
    product.run(normed, row, rows, y + first * product.out, product.out);
  });
  return out;
}

at::Tensor gated_output(const at::Tensor& y_, const at::Tensor& x_, const at::Tensor& norm_weight,
                        const at::Tensor& norm_bias, double eps, const at::Tensor& gate_weight,
                        const at::Tensor& out_norm_weight, const at::Tensor& out_norm_bias, double out_eps,
                        const at::Tensor& weight) {
  const at::Tensor y = checked("gated_output", "y", y_), x = checked("gated_output", "x", x_);
  const RowNorm norm(norm_weight, norm_bias, eps), out_norm(out_norm_weight, out_norm_bias, out_eps);
  const Product gate(gate_weight), product(weight);
  at::Tensor out = with_channels(x_, product.out);
  float* target = out.mutable_data_ptr<float>();
  const int64_t more = std::max(norm.scratch(), out_norm.scratch());
  const int64_t row = spaced(norm.dim), inner = spaced(gate.out);
  over_rows(x.size(0), row + 2 * inner, more, [&](int64_t first, int64_t rows, float* memory) {
    float* normed = memory + more;
    float* gates = normed + rows * row;
    float* gated = gates + rows * inner;
    const float* residual = data(x) + first * x.stride(0);
    norm.run(residual, x.stride(0), nullptr, 0, rows, normed, row, memory);
    gate.run(normed, row, rows, gates, inner);
    out_norm.run(data(y) + first * y.stride(0), y.stride(0), gates, inner, rows, gated, inner, memory);
    product.run(gated, inner, rows, target + first * product.out, product.out, residual, x.stride(0));
  });
  return out;
}

at::Tensor norm_mlp(const at::Tensor& x_, const at::Tensor& norm_weight, const at::Tensor& norm_bias, double eps,
                    const at::Tensor& weight1, const at::Tensor& bias1, const at::Tensor& weight2,
                    const at::Tensor& bias2) {
  const at::Tensor x = checked("norm_mlp", "x", x_);
  const RowNorm norm(norm_weight, norm_bias, eps);
  const Product first_product(weight1, bias1, Activation::kGelu), second(weight2, bias2);
  at::Tensor out = with_channels(x_, second.out);
  float* y = out.mutable_data_ptr<float>();
  const int64_t row = spaced(norm.dim), wide = spaced(first_product.out);
  over_rows(x.size(0), row + wide, norm.scratch(), [&](int64_t first, int64_t rows, float* memory) {
    float* normed = memory + norm.scratch();
    float* hidden = normed + rows * row;
    const float* residual = data(x) + first * x.stride(0);
    norm.run(residual, x.stride(0), nullptr, 0, rows, normed, row, memory);
    first_product.run(normed, row, rows, hidden, wide);
    second.run(hidden, wide, rows, y + first * second.out, second.out, residual, x.stride(0));
  });
  return out;
}

// The 3x3 neighbourhoods of some output pixels of a (batch, height, width, channels) map, with zeros outside it.
struct Patches {
  const float* x;
  int64_t height, width, channels, out_height, out_width, stride;

  void gather(int64_t first, int64_t count, float* target) const {
    const int64_t line = 3 * channels;
    for (int64_t p = first; p < first + count; ++p) {
      const int64_t column = p % out_width * stride - 1, row = p / out_width % out_height * stride - 1;
      const float* image = x + p / out_width / out_height * height * width * channels;
      const int64_t left = std::max<int64_t>(-column, 0), right = std::min<int64_t>(width - column, 3);
      for (int64_t i = 0; i < 3; ++i, target += line) {
        const bool inside = row + i >= 0 && row + i < height;
        if (!inside || right - left < 3) std::memset(target, 0, line * sizeof(float));
        if (!inside) continue;
        std::memcpy(target + left * channels, image + ((row + i) * width + column + left) * channels,
                    (right - left) * channels * sizeof(float));
      }
    }
  }
};

at::Tensor conv_layer(const at::Tensor& x_, const at::Tensor& weight, const std::optional<at::Tensor>& scale,
                      const std::optional<at::Tensor>& bias, bool relu, int64_t stride,
                      const std::optional<at::Tensor>& residual_) {
  const char* op = "conv_layer";
  const at::Tensor x = checked(op, "x", x_.contiguous());
  const int64_t channels = x_.size(3), size = weight.size(2);
  TORCH_CHECK(size == 3 || (size == 1 && stride == 1), op, ": weight must be 3x3, or 1x1 with stride 1");
  const Product product(weight.permute({0, 2, 3, 1}).reshape({weight.size(0), size * size * channels}), bias,
                        relu ? Activation::kRelu : Activation::kNone, scale);
  const Patches patches{data(x), x_.size(1), x_.size(2), channels, (x_.size(1) - 1) / stride + 1,
                        (x_.size(2) - 1) / stride + 1, stride};
  at::Tensor out = at::empty({x_.size(0), patches.out_height, patches.out_width, product.out}, x.options());
  const at::Tensor residual = residual_ ? checked(op, "residual", *residual_) : at::Tensor();
  float* y = out.mutable_data_ptr<float>();
  const int64_t residual_row = residual_ ? residual.stride(0) : 0;
  const bool gathers = size == 3;
  over_rows(out.numel() / product.out, gathers ? product.in : 0, 0, [&](int64_t first, int64_t rows, float* memory) {
    if (gathers) patches.gather(first, rows, memory);
    product.run(gathers ? memory : data(x) + first * product.in, product.in, rows, y + first * product.out, product.out,
                residual_ ? data(residual) + first * residual_row : nullptr, residual_row);
  });
  return out;
}

}  // namespace
}  // namespace mmspatialmamba

TORCH_LIBRARY_IMPL(mmspatialmamba_native, CPU, m) {
  m.impl("linear", mmspatialmamba::linear);
  m.impl("norm_linear", mmspatialmamba::norm_linear);
  m.impl("gated_output", mmspatialmamba::gated_output);
  m.impl("norm_mlp", mmspatialmamba::norm_mlp);
  m.impl("conv_layer", mmspatialmamba::conv_layer);
}
