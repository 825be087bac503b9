// Matrix products and norms of rows, which the ops that contain them share. T is float or BFloat16, what activations are
// in memory; norms' parameters and biases are floats.
#pragma once

#include <type_traits>

#include "ops.h"

namespace mmspatialmamba {

// At most so many rows of activations are computed at a time.
constexpr int64_t kMostRows = 144;

template <class T>
constexpr bool kIsFloat = std::is_same_v<T, float>;
template <class T>
constexpr at::ScalarType kScalarType = kIsFloat<T> ? at::kFloat : at::kBFloat16;
template <class T>
constexpr Type kType = kIsFloat<T> ? Type::kFloat : Type::kBFloat16;

// A matrix's or, without a column, a vector's elements from a place on; null where there is no tensor.
template <class T = float>
const T* data(const at::Tensor& t, int64_t row = 0, int64_t column = 0) {
  return t.defined() ? static_cast<const T*>(t.const_data_ptr()) + row * t.stride(0) + column : nullptr;
}

template <class T = float>
T* mutable_data(const at::Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline int64_t row_of(const at::Tensor& t) { return t.defined() ? t.stride(0) : 0; }

inline int64_t whole(int64_t size, int64_t unit) { return at::divup(size, unit) * unit; }

// as_matrix of a CPU tensor of T.
template <class T = float>
at::Tensor checked(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK(t.device().is_cpu() && t.scalar_type() == kScalarType<T>, op, ": ", name, " must be a ",
              kIsFloat<T> ? "float32" : "bfloat16", " CPU tensor, but is ", t.scalar_type(), " on ", t.device());
  TORCH_CHECK(t.size(-1) > 0, op, ": ", name, " must have at least one channel");
  return as_matrix(t);
}

// The distance of rows in scratch memory: whole cache lines, but not a power of two of them, lest rows push each other
// out of the caches.
template <class T = float>
int64_t spaced(int64_t channels) {
  constexpr int64_t kLine = 64 / sizeof(T);
  return at::divup(channels + kLine, kLine) * kLine;
}

template <class T = float>
at::Tensor spaced_matrix(int64_t rows, int64_t channels, const at::Tensor& like) {
  return at::empty({rows, spaced<T>(channels)}, like.options()).narrow(1, 0, channels);
}

// Floats of scratch memory for elements of T, and where they begin.
template <class T>
int64_t floats_for(int64_t count) {
  return at::divup(count * sizeof(T), sizeof(float));
}

template <class T>
T* in_scratch(float* memory) {
  return reinterpret_cast<T*>(memory);
}

// Runs task(first row, number of rows, scratch) for all rows, with `each` elements of scratch for each row, and before
// them `more` floats.
template <class T = float, class Task>
void over_rows(int64_t rows, int64_t each, int64_t more, const Task& task) {
  if (rows == 0) return;
  const int64_t threads = at::get_num_threads();
  const int64_t tile = kIsFloat<T> ? kernels().tile_rows : kernels().tile_rows_bfloat16;
  const int64_t step = whole(at::divup(rows, whole(at::divup(rows, kMostRows), threads)), tile);
  parallel_tasks(at::divup(rows, step), floats_for<T>(step * each) + more, [&](int64_t i, float* scratch) {
    task(i * step, std::min(step, rows - i * step), scratch);
  });
}

inline at::Tensor with_channels(const at::Tensor& x, int64_t channels) {
  auto sizes = x.sizes().vec();
  sizes.back() = channels;
  return at::empty(sizes, x.options());
}

template <class T>
Matrix matrix(const T* data, int64_t row) {
  return {const_cast<T*>(data), kType<T>, row};
}

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

  // A multiple of a cache line.
  int64_t scratch() const { return scratch::gated_layer_norm(dim); }

  // LayerNorm of rows, times SiLU of those of the gate if there is one.
  template <class T>
  void run(const T* x, int64_t x_row, const T* gate, int64_t gate_row, int64_t rows, T* y, int64_t y_row,
           float* scratch) const {
    const NormArgs args{rows, dim, matrix(x, x_row), matrix(gate, gate_row), data(weight), data(bias), eps};
    kernels().gated_layer_norm(args, matrix(y, y_row), 0, rows, scratch);
  }

  // For all rows of x.
  template <class T>
  at::Tensor apply(const at::Tensor& x, const at::Tensor& gate = {}) const {
    const at::Tensor y = spaced_matrix<T>(x.size(0), dim, x);
    T* target = mutable_data<T>(y);
    over_rows<T>(x.size(0), 0, scratch(), [&](int64_t first, int64_t rows, float* memory) {
      run(data<T>(x, first), row_of(x), data<T>(gate, first), row_of(gate), rows, target + first * row_of(y), row_of(y),
          memory);
    });
    return y;
  }
};

template <class T>
struct Product {
  at::Tensor weight, scale, bias, packed;
  Activation activation;
  int64_t in, out;

  // The weight is multiplied by a scale, floats, for each output channel if it is defined.
  Product(const char* op, int64_t in_, const at::Tensor& weight_, const std::optional<at::Tensor>& bias_ = std::nullopt,
          Activation activation_ = Activation::kNone, const at::Tensor& scale_ = {})
      : weight(kIsFloat<T> || weight_.scalar_type() != at::kBFloat16 ? weight_.to(at::kFloat) : weight_), scale(scale_),
        activation(activation_), in(in_), out(weight_.size(0)) {
    TORCH_CHECK(weight_.dim() == 2 && weight_.size(1) == in, op, ": weight must have shape (out, ", in, "), but has ",
                weight_.sizes());
    if (!bias_) return;
    check_sizes(op, "bias", *bias_, {out});
    bias = padded(*bias_, kWidestPanel);
  }

  // Whether the weights are more than what they meet. Then threads share them, not the rows: each packs some output
  // channels' weights and uses them at once, before they leave the caches.
  bool outweighs(int64_t rows) const { return in * out > rows * (in + out); }

  static int64_t panels(int64_t channels) { return at::divup(channels, kernels().panel); }

  // Packed weights of an output channel.
  int64_t depth() const { return kIsFloat<T> ? in : whole(in, kDepth); }

  void pack(int64_t first, int64_t channels, T* target, int64_t panel) const {
    const bool wide = weight.scalar_type() == at::kFloat;
    const WeightArgs args{wide ? static_cast<const void*>(data(weight, first)) : data<T>(weight, first),
                          wide ? Type::kFloat : Type::kBFloat16, weight.stride(0), weight.stride(1), channels, in,
                          data(scale, first)};
    if constexpr (kIsFloat<T>) {
      kernels().pack_linear(args, target, panel);
    } else {
      kernels().pack_linear_bfloat16(args, target, panel);
    }
  }

  // For a product with some output channels alone.
  void pack_part(int64_t first, int64_t channels, T* target) const {
    for (int64_t panel = 0; panel < panels(channels); ++panel) pack(first, channels, target, panel);
  }

  // Before the first call of run.
  void pack_all() {
    packed = at::empty({whole(out, kWidestPanel), depth()}, weight.options().dtype(kScalarType<T>));
    T* target = mutable_data<T>(packed);
    parallel_tasks(panels(out), 0, [&](int64_t i, float*) { pack(0, out, target, i); });
  }

  static void multiply(const LinearArgs<T>& args) {
    if constexpr (kIsFloat<T>) {
      kernels().linear(args);
    } else {
      kernels().linear_bfloat16(args);
    }
  }

  void run(const T* x, int64_t x_row, int64_t rows, T* y, int64_t y_row, const T* residual = nullptr,
           int64_t residual_row = 0) const {
    multiply({rows, in, out, {{x, data<T>(packed)}}, 1, x_row, data(bias), activation, residual, residual_row, y, y_row});
  }

  // For all rows of x, to those of y.
  void apply(const at::Tensor& x, const at::Tensor& y, const at::Tensor& residual = {}) {
    T* target = mutable_data<T>(y);
    const int64_t rows = x.size(0), y_row = row_of(y);
    if (!outweighs(rows)) {
      pack_all();
      return over_rows<T>(rows, 0, 0, [&](int64_t first, int64_t count, float*) {
        run(data<T>(x, first), row_of(x), count, target + first * y_row, y_row, data<T>(residual, first),
            row_of(residual));
      });
    }
    const int64_t share = 131072 / static_cast<int64_t>(sizeof(T));
    const int64_t group = std::max<int64_t>(share / in / kWidestPanel, 1) * kWidestPanel;
    parallel_tasks(at::divup(out, group), floats_for<T>(group * depth()), [&](int64_t i, float* memory) {
      const int64_t first = i * group, channels = std::min(group, out - first);
      T* part = in_scratch<T>(memory);
      pack_part(first, channels, part);
      multiply({rows, in, channels, {{data<T>(x), part}}, 1, row_of(x), data(bias, first), activation,
                data<T>(residual, 0, first), row_of(residual), target + first, y_row});
    });
  }
};

}  // namespace mmspatialmamba
