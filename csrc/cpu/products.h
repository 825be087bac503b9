// Matrix products and norms of rows, which the ops that contain them share.
#pragma once

#include "ops.h"

namespace mmspatialmamba {

// At most so many rows of activations are computed at a time.
constexpr int64_t kMostRows = 144;

// A matrix's or, without a column, a vector's elements from a place on; null where there is no tensor.
inline const float* data(const at::Tensor& t, int64_t row = 0, int64_t column = 0) {
  return t.defined() ? t.const_data_ptr<float>() + row * t.stride(0) + column : nullptr;
}

inline int64_t row_of(const at::Tensor& t) { return t.defined() ? t.stride(0) : 0; }

inline int64_t whole(int64_t size, int64_t unit) { return at::divup(size, unit) * unit; }

// as_matrix of a float32 CPU tensor.
inline at::Tensor checked(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK(t.device().is_cpu() && t.scalar_type() == at::kFloat, op, ": ", name, " must be a float32 CPU tensor, but is ",
              t.scalar_type(), " on ", t.device());
  TORCH_CHECK(t.size(-1) > 0, op, ": ", name, " must have at least one channel");
  return as_matrix(t);
}

// The distance of rows in scratch memory: not a power of two, lest they push each other out of the caches.
inline int64_t spaced(int64_t channels) { return (channels + 31) / 16 * 16; }

inline at::Tensor spaced_matrix(int64_t rows, int64_t channels, const at::Tensor& like) {
  return at::empty({rows, spaced(channels)}, like.options()).narrow(1, 0, channels);
}

// Runs task(first row, number of rows, scratch) for all rows, with `each` floats of scratch for each row and `more`.
template <class Task>
void over_rows(int64_t rows, int64_t each, int64_t more, const Task& task) {
  if (rows == 0) return;
  const int64_t threads = at::get_num_threads(), tile = kernels().tile_rows;
  const int64_t step = whole(at::divup(rows, whole(at::divup(rows, kMostRows), threads)), tile);
  parallel_tasks(at::divup(rows, step), step * each + more, [&](int64_t i, float* scratch) {
    task(i * step, std::min(step, rows - i * step), scratch);
  });
}

inline at::Tensor with_channels(const at::Tensor& x, int64_t channels) {
  auto sizes = x.sizes().vec();
  sizes.back() = channels;
  return at::empty(sizes, x.options());
}

inline Matrix matrix(const float* data, int64_t row) { return {const_cast<float*>(data), Type::kFloat, row}; }

struct RowNorm {
  at::Tensor weight, bias;
  int64_t dim;
  float eps;

  RowNorm(const char* op, int64_t dim_, const at::Tensor& weight_, const at::Tensor& bias_, double eps_)
      : weight(padded(weight_)), bias(padded(bias_)), dim(dim_), eps(static_cast<float>(eps_)) {
    for (const at::Tensor& t : {weight_, bias_}) {
      TORCH_CHECK(t.dim() == 1 && t.size(0) == dim, op, ": a norm's weight and bias must have shape (", dim, "), but one has ",
                  t.sizes());
    }
  }

  int64_t scratch() const { return scratch::gated_layer_norm(dim); }

  // LayerNorm of rows, times SiLU of those of the gate if there is one.
  void run(const float* x, int64_t x_row, const float* gate, int64_t gate_row, int64_t rows, float* y, int64_t y_row,
           float* scratch) const {
    const NormArgs args{rows, dim, matrix(x, x_row), matrix(gate, gate_row), data(weight), data(bias), eps};
    kernels().gated_layer_norm(args, matrix(y, y_row), 0, rows, scratch);
  }

  // For all rows of x.
  at::Tensor apply(const at::Tensor& x, const at::Tensor& gate = {}) const {
    const at::Tensor y = spaced_matrix(x.size(0), dim, x);
    float* target = y.mutable_data_ptr<float>();
    over_rows(x.size(0), 0, scratch(), [&](int64_t first, int64_t rows, float* memory) {
      run(data(x, first), row_of(x), data(gate, first), row_of(gate), rows, target + first * row_of(y), row_of(y), memory);
    });
    return y;
  }
};

struct Product {
  at::Tensor weight, bias, packed;
  Activation activation;
  int64_t in, out;

  Product(const char* op, int64_t in_, const at::Tensor& weight_, const std::optional<at::Tensor>& bias_ = std::nullopt,
          Activation activation_ = Activation::kNone)
      : weight(weight_.to(at::kFloat)), activation(activation_), in(in_), out(weight_.size(0)) {
    TORCH_CHECK(weight_.dim() == 2 && weight_.size(1) == in, op, ": weight must have shape (out, ", in, "), but has ",
                weight_.sizes());
    TORCH_CHECK(!bias_ || (bias_->dim() == 1 && bias_->size(0) == out), op, ": bias must have shape (", out, "), but has ",
                bias_ ? bias_->sizes() : at::IntArrayRef());
    if (bias_) bias = padded(*bias_, kWidestPanel);
  }

  // Whether the weights are more than what they meet. Then threads share them, not the rows: each packs some output
  // channels' weights and uses them at once, before they leave the caches.
  bool outweighs(int64_t rows) const { return in * out > rows * (in + out); }

  static int64_t panels(int64_t channels) { return at::divup(channels, kernels().panel); }

  void pack(int64_t first, int64_t channels, float* target, int64_t panel) const {
    kernels().pack_linear(data(weight, first), weight.stride(0), weight.stride(1), channels, in, target, panel);
  }

  // For a product with some output channels alone.
  void pack_part(int64_t first, int64_t channels, float* target) const {
    for (int64_t panel = 0; panel < panels(channels); ++panel) pack(first, channels, target, panel);
  }

  // Before the first call of run.
  void pack_all() {
    packed = at::empty({whole(out, kWidestPanel), in}, weight.options());
    float* target = packed.mutable_data_ptr<float>();
    parallel_tasks(panels(out), 0, [&](int64_t i, float*) { pack(0, out, target, i); });
  }

  void run(const float* x, int64_t x_row, int64_t rows, float* y, int64_t y_row, const float* residual = nullptr,
           int64_t residual_row = 0) const {
    kernels().linear({rows, in, out, data(packed), data(bias), activation, x, x_row, residual, residual_row, y, y_row});
  }

  // For all rows of x, to those of y.
  void apply(const at::Tensor& x, const at::Tensor& y, const at::Tensor& residual = {}) {
    float* target = y.mutable_data_ptr<float>();
    const int64_t rows = x.size(0), y_row = row_of(y);
    if (!outweighs(rows)) {
      pack_all();
      return over_rows(rows, 0, 0, [&](int64_t first, int64_t count, float*) {
        run(data(x, first), row_of(x), count, target + first * y_row, y_row, data(residual, first), row_of(residual));
      });
    }
    const int64_t group = std::max<int64_t>(32768 / in / kWidestPanel, 1) * kWidestPanel;
    parallel_tasks(at::divup(out, group), group * in, [&](int64_t i, float* memory) {
      const int64_t first = i * group, channels = std::min(group, out - first);
      pack_part(first, channels, memory);
      kernels().linear({rows, in, channels, memory, data(bias, first), activation, data(x), row_of(x),
                        data(residual, 0, first), row_of(residual), target + first, y_row});
    });
  }
};

}  // namespace mmspatialmamba
