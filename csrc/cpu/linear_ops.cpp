// Matrix products and their gradients; and layers of the network that run as one op where no gradients are needed: blocks
// of rows go through all their steps in the caches, so what lies between is never written to memory.
#include <torch/library.h>

#include <cstring>

#include "ops.h"

namespace mmspatialmamba {

namespace {

// At most so many rows of activations are computed at a time.
constexpr int64_t kRows = 144;

// A matrix's or, without a column, a vector's elements from a place on; null where there is no tensor.
const float* data(const at::Tensor& t, int64_t row = 0, int64_t column = 0) {
  return t.defined() ? t.const_data_ptr<float>() + row * t.stride(0) + column : nullptr;
}

int64_t row_of(const at::Tensor& t) { return t.defined() ? t.stride(0) : 0; }

int64_t whole(int64_t size, int64_t unit) { return at::divup(size, unit) * unit; }

// as_matrix of a float32 CPU tensor.
at::Tensor checked(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK(t.device().is_cpu() && t.scalar_type() == at::kFloat, op, ": ", name, " must be a float32 CPU tensor, but is ",
              t.scalar_type(), " on ", t.device());
  TORCH_CHECK(t.size(-1) > 0, op, ": ", name, " must have at least one channel");
  return as_matrix(t);
}

// The distance of rows in scratch memory: not a power of two, lest they push each other out of the caches.
int64_t spaced(int64_t channels) { return (channels + 31) / 16 * 16; }

at::Tensor spaced_matrix(int64_t rows, int64_t channels, const at::Tensor& like) {
  return at::empty({rows, spaced(channels)}, like.options()).narrow(1, 0, channels);
}

// Runs task(first row, number of rows, scratch) for all rows, with `each` floats of scratch for each row and `more`.
template <class Task>
void over_rows(int64_t rows, int64_t each, int64_t more, const Task& task) {
  if (rows == 0) return;
  const int64_t threads = at::get_num_threads(), tile = kernels().tile_rows;
  const int64_t step = whole(at::divup(rows, whole(at::divup(rows, kRows), threads)), tile);
  parallel_tasks(at::divup(rows, step), step * each + more, [&](int64_t i, float* scratch) {
    task(i * step, std::min(step, rows - i * step), scratch);
  });
}

at::Tensor with_channels(const at::Tensor& x, int64_t channels) {
  auto sizes = x.sizes().vec();
  sizes.back() = channels;
  return at::empty(sizes, x.options());
}

Matrix matrix(const float* data, int64_t row) { return {const_cast<float*>(data), Type::kFloat, row}; }

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
  bool gelu;
  int64_t in, out;

  Product(const char* op, int64_t in_, const at::Tensor& weight_, const std::optional<at::Tensor>& bias_ = std::nullopt,
          bool gelu_ = false)
      : weight(weight_.to(at::kFloat)), gelu(gelu_), in(in_), out(weight_.size(0)) {
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
    kernels().linear({rows, in, out, data(packed), data(bias), gelu, x, x_row, residual, residual_row, y, y_row});
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
      kernels().linear({rows, in, channels, memory, data(bias, first), gelu, data(x), row_of(x),
                        data(residual, 0, first), row_of(residual), target + first, y_row});
    });
  }
};

at::Tensor linear(const at::Tensor& x_, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const at::Tensor x = checked("linear", "x", x_);
  Product product("linear", x.size(1), weight, bias);
  const at::Tensor out = with_channels(x_, product.out);
  product.apply(x, out.view({x.size(0), product.out}));
  return out;
}

// The sums over rows run in a fixed order, whatever the number of threads: parts of the rows, then these.
at::Tensor linear_weight_gradient(const at::Tensor& grad_, const at::Tensor& x_) {
  constexpr int64_t kPart = 4096;    // most rows of a task
  constexpr int64_t kStep = 128;     // rows that are packed at a time
  constexpr int64_t kWidest = 256;   // most input channels of a task
  constexpr int64_t kBlock = 49152;  // most elements of the gradient that a task computes
  constexpr int64_t kTasks = 16;     // fewest tasks, where there are rows enough
  const at::Tensor grad = checked("linear", "the gradient", grad_), x = checked("linear", "x", x_);
  const int64_t rows = x.size(0), out = grad.size(1), in = x.size(1), tile = kernels().tile_rows, panel = kernels().panel;
  TORCH_CHECK(grad.size(0) == rows, "linear: the gradient has ", grad.size(0), " rows, but x has ", rows);
  // Blocks of about the same size, of whole tiles.
  const int64_t across = at::divup(in, kWidest), ins = whole(at::divup(in, across), panel);
  const int64_t outs = whole(at::divup(out, at::divup(out * ins, kBlock)), tile), blocks = at::divup(out, outs) * across;
  const int64_t part_rows = whole(std::clamp<int64_t>(rows * blocks / kTasks, 1, kPart), kStep);
  const int64_t parts = std::max<int64_t>(at::divup(rows, part_rows), 1);
  at::Tensor sums = at::empty({parts, out, in}, x.options());
  float* target = sums.mutable_data_ptr<float>();
  parallel_tasks(parts * blocks, kStep * (outs + ins) + outs * ins, [&](int64_t i, float* total) {
    const int64_t part = i / blocks, o = i % blocks / across * outs, c = i % across * ins;
    const int64_t height = std::min(out - o, outs), width = std::min(in - c, ins), last = std::min((part + 1) * part_rows, rows);
    std::memset(total, 0, outs * ins * sizeof(float));
    for (int64_t row = part * part_rows; row < last; row += kStep) {
      kernels().outer({std::min(kStep, last - row), height, width, data(grad, row, o), row_of(grad), data(x, row, c),
                       row_of(x), total, ins},
                      total + outs * ins);
    }
    for (int64_t k = 0; k < height; ++k) {
      std::memcpy(target + (part * out + o + k) * in + c, total + k * ins, width * sizeof(float));
    }
  });
  if (parts == 1) return sums.select(0, 0);
  at::Tensor result = sums.select(0, 0).clone();
  for (int64_t part = 1; part < parts; ++part) result.add_(sums.select(0, part));
  return result;
}

struct GeluLinear {
  static constexpr const char* kOp = "gelu_linear";
  at::Tensor x, bias;
  GeluArgs args;

  GeluLinear(const at::Tensor& x_, const at::Tensor& bias_) : x(checked(kOp, "x", x_)), bias(padded(bias_)) {
    TORCH_CHECK(bias_.dim() == 1 && bias_.size(0) == x.size(1), kOp, ": gelu_bias must have shape (", x.size(1),
                "), but has ", bias_.sizes());
    args = {x.size(0), x.size(1), matrix(data(x), row_of(x)), data(bias)};
  }
};

at::Tensor gelu_linear(const at::Tensor& x_, const at::Tensor& gelu_bias, const at::Tensor& weight,
                       const at::Tensor& bias) {
  const GeluLinear gelu(x_, gelu_bias);
  const int64_t rows = gelu.args.rows, dim = gelu.args.dim, row = spaced(dim), more = scratch::biased_gelu(dim);
  Product product(GeluLinear::kOp, dim, weight, bias);
  const at::Tensor out = with_channels(x_, product.out);
  if (product.outweighs(rows)) {
    const at::Tensor hidden = spaced_matrix(rows, dim, x_);
    over_rows(rows, 0, more, [&](int64_t first, int64_t count, float* memory) {
      kernels().biased_gelu(gelu.args, matrix(data(hidden), row), first, first + count, memory);
    });
    product.apply(hidden, out.view({rows, product.out}));
    return out;
  }
  product.pack_all();
  float* target = out.mutable_data_ptr<float>();
  over_rows(rows, row, more, [&](int64_t first, int64_t count, float* memory) {
    float* hidden = memory + more;
    GeluArgs part = gelu.args;
    part.x = matrix(data(gelu.x, first), row_of(gelu.x));
    kernels().biased_gelu(part, matrix(hidden, row), 0, count, memory);
    product.run(hidden, row, count, target + first * product.out, product.out);
  });
  return out;
}

// The gradients of x, gelu_bias, weight and bias. Sums do not depend on the number of threads.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gelu_linear_backward(
    const at::Tensor& grad_, const at::Tensor& x_, const at::Tensor& gelu_bias, const at::Tensor& weight,
    const at::Tensor& bias) {
  const GeluLinear gelu(x_, gelu_bias);
  const int64_t rows = gelu.args.rows, dim = gelu.args.dim, tasks = at::divup(rows, kRows);
  const at::Tensor grad = checked(GeluLinear::kOp, "the gradient", grad_);
  Product product(GeluLinear::kOp, grad.size(1), weight.t());
  TORCH_CHECK(grad.size(0) == rows && product.out == dim, GeluLinear::kOp, ": the gradient has shape ", grad_.sizes(),
              ", but x has ", x_.sizes(), " and weight ", weight.sizes());
  const at::Tensor grad_x = at::empty(x_.sizes(), x_.options()), flat = grad_x.view({rows, dim});
  const at::Tensor hidden = at::empty_like(flat), sums = at::empty({tasks, dim}, flat.options());
  const bool shares = product.outweighs(rows);
  if (shares) {
    product.apply(grad, flat);
  } else {
    product.pack_all();
  }
  float *target = flat.mutable_data_ptr<float>(), *partial = sums.mutable_data_ptr<float>();
  const Matrix to_x = matrix(target, dim), out = matrix(data(hidden), dim);
  parallel_tasks(tasks, scratch::biased_gelu_backward(dim), [&](int64_t i, float* memory) {
    const int64_t first = i * kRows, last = std::min(first + kRows, rows);
    if (!shares) product.run(data(grad, first), row_of(grad), last - first, target + first * dim, dim);
    kernels().biased_gelu_backward(gelu.args, to_x, to_x, out, partial + i * dim, first, last, memory);
  });
  return {grad_x, sums.sum(0), linear_weight_gradient(grad, hidden), grad.sum(0)};
}

at::Tensor norm_linear(const at::Tensor& x_, const at::Tensor& norm_weight, const at::Tensor& norm_bias, double eps,
                       const at::Tensor& weight) {
  const at::Tensor x = checked("norm_linear", "x", x_);
  const RowNorm norm("norm_linear", x.size(1), norm_weight, norm_bias, eps);
  Product product("norm_linear", norm.dim, weight);
  const at::Tensor out = with_channels(x_, product.out), y = out.view({x.size(0), product.out});
  if (product.outweighs(x.size(0))) {
    product.apply(norm.apply(x), y);
    return out;
  }
  product.pack_all();
  float* target = out.mutable_data_ptr<float>();
  const int64_t row = spaced(norm.dim);
  over_rows(x.size(0), row, norm.scratch(), [&](int64_t first, int64_t rows, float* memory) {
    float* normed = memory + norm.scratch();
    norm.run(data(x, first), row_of(x), nullptr, 0, rows, normed, row, memory);
    product.run(normed, row, rows, target + first * product.out, product.out);
  });
  return out;
}

at::Tensor gated_output(const at::Tensor& y_, const at::Tensor& x_, const at::Tensor& norm_weight,
                        const at::Tensor& norm_bias, double eps, const at::Tensor& gate_weight,
                        const at::Tensor& out_norm_weight, const at::Tensor& out_norm_bias, double out_eps,
                        const at::Tensor& weight) {
  const char* op = "gated_output";
  const at::Tensor y = checked(op, "y", y_), x = checked(op, "x", x_);
  const RowNorm norm(op, x.size(1), norm_weight, norm_bias, eps);
  const RowNorm out_norm(op, y.size(1), out_norm_weight, out_norm_bias, out_eps);
  Product gate(op, norm.dim, gate_weight), product(op, gate.out, weight);
  TORCH_CHECK(y.size(0) == x.size(0) && out_norm.dim == gate.out && product.out == x.size(1), op, ": shapes do not fit: x ",
              x_.sizes(), ", y ", y_.sizes(), ", gate_weight ", gate_weight.sizes(), ", weight ", weight.sizes());
  const at::Tensor out = with_channels(x_, product.out);
  if (product.outweighs(x.size(0))) {
    const at::Tensor gates = spaced_matrix(x.size(0), gate.out, x);
    gate.apply(norm.apply(x), gates);
    product.apply(out_norm.apply(y, gates), out.view({x.size(0), product.out}), x);
    return out;
  }
  gate.pack_all();
  product.pack_all();
  float* target = out.mutable_data_ptr<float>();
  const int64_t more = std::max(norm.scratch(), out_norm.scratch());
  const int64_t row = spaced(norm.dim), inner = spaced(gate.out);
  over_rows(x.size(0), row + 2 * inner, more, [&](int64_t first, int64_t rows, float* memory) {
    float* normed = memory + more;
    float* gates = normed + rows * row;
    float* gated = gates + rows * inner;
    const float* residual = data(x, first);
    norm.run(residual, row_of(x), nullptr, 0, rows, normed, row, memory);
    gate.run(normed, row, rows, gates, inner);
    out_norm.run(data(y, first), row_of(y), gates, inner, rows, gated, inner, memory);
    product.run(gated, inner, rows, target + first * product.out, product.out, residual, row_of(x));
  });
  return out;
}

at::Tensor norm_mlp(const at::Tensor& x_, const at::Tensor& norm_weight, const at::Tensor& norm_bias, double eps,
                    const at::Tensor& weight1, const at::Tensor& bias1, const at::Tensor& weight2,
                    const at::Tensor& bias2) {
  const char* op = "norm_mlp";
  const at::Tensor x = checked(op, "x", x_);
  const RowNorm norm(op, x.size(1), norm_weight, norm_bias, eps);
  Product widen(op, norm.dim, weight1, bias1, true), narrow(op, widen.out, weight2, bias2);
  TORCH_CHECK(narrow.out == x.size(1), op, ": weight2 must have ", x.size(1), " rows, but has ", narrow.out);
  const at::Tensor out = with_channels(x_, narrow.out);
  if (widen.outweighs(x.size(0))) {
    const at::Tensor hidden = spaced_matrix(x.size(0), widen.out, x);
    widen.apply(norm.apply(x), hidden);
    narrow.apply(hidden, out.view({x.size(0), narrow.out}), x);
    return out;
  }
  widen.pack_all();
  narrow.pack_all();
  float* target = out.mutable_data_ptr<float>();
  const int64_t row = spaced(norm.dim), wide = spaced(widen.out);
  over_rows(x.size(0), row + wide, norm.scratch(), [&](int64_t first, int64_t rows, float* memory) {
    float* normed = memory + norm.scratch();
    float* hidden = normed + rows * row;
    const float* residual = data(x, first);
    norm.run(residual, row_of(x), nullptr, 0, rows, normed, row, memory);
    widen.run(normed, row, rows, hidden, wide);
    narrow.run(hidden, wide, rows, target + first * narrow.out, narrow.out, residual, row_of(x));
  });
  return out;
}

// Tasks compute some hidden channels of some output rows: rows of the input enter the hidden width in the caches, and
// only what the depthwise convolution leaves of them goes to memory.
at::Tensor downsample(const at::Tensor& x_, const at::Tensor& weight1, const at::Tensor& bias1,
                      const at::Tensor& weight2, const at::Tensor& bias2, const at::Tensor& weight3,
                      const at::Tensor& bias3) {
  constexpr int64_t kMap = 1 << 16;     // about so many elements of the wide map are in the caches at a time
  constexpr int64_t kHidden = 1 << 22;  // so many of what the convolution leaves are in memory
  constexpr int64_t kPixels = 64;       // fewest output pixels at a time, where a task has them
  constexpr int64_t kBand = 8;          // fewest output rows of a task, where there are so many
  const char* op = "downsample";
  TORCH_CHECK(x_.dim() == 4, op, ": x must have shape (batch, height, width, channels), but has ", x_.sizes());
  const at::Tensor x = checked(op, "x", x_);
  const int64_t batch = x_.size(0), height = x_.size(1), width = x_.size(2), in = x_.size(3);
  Product narrow(op, weight1.size(0), weight3, bias3);
  const int64_t hidden = narrow.in, out = narrow.out;
  const int64_t out_height = at::divup(height, 2), out_width = at::divup(width, 2);
  TORCH_CHECK(weight2.numel() == 9 * hidden && bias2.numel() == hidden, op, ": the depthwise convolution must have ",
              hidden, " channels, but its weight has shape ", weight2.sizes());
  const at::Tensor result = at::empty({batch, out_height, out_width, out}, x.options());
  if (result.numel() == 0) return result;

  const int64_t group = std::clamp<int64_t>(kMap / (3 * width) / 32, 1, 4) * 32, groups = at::divup(hidden, group);
  const int64_t step = at::divup(kPixels, out_width), row = spaced(group), line = width * row;
  const int64_t share = at::divup(batch * out_height * groups, 4 * at::get_num_threads());
  const int64_t band = std::clamp<int64_t>(kHidden / (out_width * hidden), 1, std::max(share, kBand));
  const int64_t bands = at::divup(out_height, band);
  const int64_t held = std::clamp<int64_t>(kHidden / (band * out_width * hidden), 1, batch * bands);
  const at::Tensor rows_of_taps = floats(weight2).view({hidden, 9}).t();
  const at::Tensor taps = at::constant_pad_nd(rows_of_taps, {0, vectors(hidden) - hidden}).contiguous();
  const at::Tensor bias = padded(bias2), pixels = spaced_matrix(held * band * out_width, hidden, x);
  const at::Tensor flat = result.view({-1, out});
  const Product widen(op, in, weight1, bias1);
  float* kept = pixels.mutable_data_ptr<float>();
  const auto first_row = [&](int64_t i) { return i / bands * out_height + std::min(i % bands * band, out_height); };
  for (int64_t start = 0; start < batch * bands; start += held) {
    const int64_t stop = std::min(start + held, batch * bands), origin = first_row(start);
    parallel_tasks((stop - start) * groups, (2 * step + 1) * line + group * in, [&](int64_t task, float* rows) {
      const int64_t part = start + task / groups, image = part / bands, begin = part % bands * band;
      const int64_t end = std::min(begin + band, out_height), first = task % groups * group;
      const int64_t channels = std::min(group, hidden - first);
      float* packed = rows + (2 * step + 1) * line;
      widen.pack_part(first, channels, packed);
      const DownsamplingArgs conv{width, vectors(channels), vectors(hidden), data(taps, 0, first), data(bias, first),
                                  row, row_of(pixels)};
      // The first of the rows is the last of the step before, which two steps need.
      int64_t done = std::max<int64_t>(2 * begin - 1, 0);
      for (int64_t r = begin; r < end; r += step) {
        const int64_t next = std::min(r + step, end), last = std::min(2 * next, height), above = 2 * r - 1;
        if (r > begin) std::memcpy(rows, rows + 2 * step * line, line * sizeof(float));
        const float* source = data(x, (image * height + done) * width);
        kernels().linear({(last - done) * width, in, channels, packed, data(widen.bias, first), false, source,
                          row_of(x), nullptr, 0, rows + (done - above) * line, row});
        done = last;
        for (int64_t q = r; q < next; ++q) {
          const float* sources[3];
          for (int64_t i = 0; i < 3; ++i) {
            const int64_t at = 2 * q + i - 1;
            sources[i] = at < 0 || at >= height ? nullptr : rows + (at - above) * line;
          }
          const int64_t target = (image * out_height + q - origin) * out_width;
          kernels().downsampling_conv(conv, sources, kept + target * row_of(pixels) + first);
        }
      }
    });
    const int64_t from = origin * out_width, count = (first_row(stop) - origin) * out_width;
    narrow.apply(pixels.narrow(0, 0, count), flat.narrow(0, from, count));
  }
  return result;
}

}  // namespace
}  // namespace mmspatialmamba

TORCH_LIBRARY_IMPL(mmspatialmamba_native, CPU, m) {
  m.impl("linear", mmspatialmamba::linear);
  m.impl("linear_weight_gradient", mmspatialmamba::linear_weight_gradient);
  m.impl("gelu_linear", mmspatialmamba::gelu_linear);
  m.impl("gelu_linear_backward", mmspatialmamba::gelu_linear_backward);
  m.impl("norm_linear", mmspatialmamba::norm_linear);
  m.impl("gated_output", mmspatialmamba::gated_output);
  m.impl("norm_mlp", mmspatialmamba::norm_mlp);
  m.impl("downsample", mmspatialmamba::downsample);
}
