// Layers of the network as one op each, for inference: blocks of rows go through several steps in the caches, so what lies
// between is never written to memory.
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "products.h"

namespace mmspatialmamba {

namespace {

// glibc gives freed memory back to the system where it is more than twice the largest piece, of at most 32 MB, that was
// ever freed. To get it again takes longer than to use it, so the largest is freed first, untouched.
void keep_memory() {
  constexpr int64_t kLargest = (1 << 25) - (1 << 16);
  static const bool done = at::empty({kLargest}, at::kByte).numel() > 0;
  static_cast<void>(done);
}

// linear(x, weight).
template <class T>
at::Tensor product_of(const char* op, const at::Tensor& x_, const at::Tensor& weight) {
  const at::Tensor x = checked<T>(op, "x", x_);
  Product<T> product(op, x.size(1), weight);
  const at::Tensor out = with_channels(x_, product.out);
  product.apply(x, out.view({x.size(0), product.out}));
  return out;
}

// linear(norm(x), weight).
template <class T>
at::Tensor norm_linear(const char* op, const at::Tensor& x_, const at::Tensor& norm_weight, const at::Tensor& norm_bias,
                       double eps, const at::Tensor& weight) {
  const at::Tensor x = checked<T>(op, "x", x_);
  const RowNorm norm(op, x.size(1), norm_weight, norm_bias, eps);
  Product<T> product(op, norm.dim, weight);
  const at::Tensor out = with_channels(x_, product.out), y = out.view({x.size(0), product.out});
  if (product.outweighs(x.size(0))) {
    product.apply(norm.apply<T>(x), y);
    return out;
  }
  product.pack_all();
  T* target = mutable_data<T>(out);
  const int64_t row = spaced<T>(norm.dim);
  over_rows<T>(x.size(0), row, norm.scratch(), [&](int64_t first, int64_t rows, float* memory) {
    T* normed = in_scratch<T>(memory + norm.scratch());
    norm.run<T>(data<T>(x, first), row_of(x), nullptr, 0, rows, normed, row, memory);
    product.run(normed, row, rows, target + first * product.out, product.out);
  });
  return out;
}

// x + linear(out_norm(y) * silu(linear(norm(x), gate_weight)), weight).
template <class T>
at::Tensor gated_output(const char* op, const at::Tensor& y_, const at::Tensor& x_, const at::Tensor& norm_weight,
                        const at::Tensor& norm_bias, double eps, const at::Tensor& gate_weight,
                        const at::Tensor& out_norm_weight, const at::Tensor& out_norm_bias, double out_eps,
                        const at::Tensor& weight) {
  const at::Tensor y = checked<T>(op, "y", y_), x = checked<T>(op, "x", x_);
  const RowNorm norm(op, x.size(1), norm_weight, norm_bias, eps);
  const RowNorm out_norm(op, y.size(1), out_norm_weight, out_norm_bias, out_eps);
  Product<T> gate(op, norm.dim, gate_weight), product(op, gate.out, weight);
  TORCH_CHECK(y.size(0) == x.size(0) && out_norm.dim == gate.out && product.out == x.size(1), op, ": shapes do not fit: x ",
              x_.sizes(), ", y ", y_.sizes(), ", gate_weight ", gate_weight.sizes(), ", weight ", weight.sizes());
  const at::Tensor out = with_channels(x_, product.out);
  if (product.outweighs(x.size(0))) {
    const at::Tensor gates = spaced_matrix<T>(x.size(0), gate.out, x);
    gate.apply(norm.apply<T>(x), gates);
    product.apply(out_norm.apply<T>(y, gates), out.view({x.size(0), product.out}), x);
    return out;
  }
  gate.pack_all();
  product.pack_all();
  T* target = mutable_data<T>(out);
  const int64_t more = std::max(norm.scratch(), out_norm.scratch());
  const int64_t row = spaced<T>(norm.dim), inner = spaced<T>(gate.out);
  over_rows<T>(x.size(0), row + 2 * inner, more, [&](int64_t first, int64_t rows, float* memory) {
    T* normed = in_scratch<T>(memory + more);
    T* gates = normed + rows * row;
    T* gated = gates + rows * inner;
    const T* residual = data<T>(x, first);
    norm.run<T>(residual, row_of(x), nullptr, 0, rows, normed, row, memory);
    gate.run(normed, row, rows, gates, inner);
    out_norm.run<T>(data<T>(y, first), row_of(y), gates, inner, rows, gated, inner, memory);
    product.run(gated, inner, rows, target + first * product.out, product.out, residual, row_of(x));
  });
  return out;
}

// x + linear(gelu(linear(norm(x), weight1, bias1)), weight2, bias2).
template <class T>
at::Tensor norm_mlp(const char* op, const at::Tensor& x_, const at::Tensor& norm_weight, const at::Tensor& norm_bias,
                    double eps, const at::Tensor& weight1, const at::Tensor& bias1, const at::Tensor& weight2,
                    const at::Tensor& bias2) {
  const at::Tensor x = checked<T>(op, "x", x_);
  const RowNorm norm(op, x.size(1), norm_weight, norm_bias, eps);
  Product<T> widen(op, norm.dim, weight1, bias1, Activation::kGelu), narrow(op, widen.out, weight2, bias2);
  TORCH_CHECK(narrow.out == x.size(1), op, ": the last weight must have ", x.size(1), " rows, but has ", narrow.out);
  const at::Tensor out = with_channels(x_, narrow.out);
  if (widen.outweighs(x.size(0))) {
    const at::Tensor hidden = spaced_matrix<T>(x.size(0), widen.out, x);
    widen.apply(norm.apply<T>(x), hidden);
    narrow.apply(hidden, out.view({x.size(0), narrow.out}), x);
    return out;
  }
  widen.pack_all();
  narrow.pack_all();
  T* target = mutable_data<T>(out);
  const int64_t row = spaced<T>(norm.dim), wide = spaced<T>(widen.out);
  over_rows<T>(x.size(0), row + wide, norm.scratch(), [&](int64_t first, int64_t rows, float* memory) {
    T* normed = in_scratch<T>(memory + norm.scratch());
    T* hidden = normed + rows * row;
    const T* residual = data<T>(x, first);
    norm.run<T>(residual, row_of(x), nullptr, 0, rows, normed, row, memory);
    widen.run(normed, row, rows, hidden, wide);
    narrow.run(hidden, wide, rows, target + first * narrow.out, narrow.out, residual, row_of(x));
  });
  return out;
}

// A convolution, and in `scale` and `bias`, both floats, what its bias and its BatchNorm do to its output; `scale` is
// undefined where there is no norm.
struct ConvLayer {
  at::Tensor weight, scale, bias;

  // norm: weight, bias, running mean and running variance, or nothing
  ConvLayer(const char* op, const at::Tensor& weight_, const std::optional<at::Tensor>& bias_, at::TensorList norm,
            double eps)
      : weight(weight_) {
    const int64_t out = weight.size(0);
    bias = bias_ ? floats(*bias_) : at::zeros({out}, weight.options().dtype(at::kFloat));
    check_sizes(op, "a convolution's bias", bias, {out});
    if (norm.empty()) return;
    TORCH_CHECK(norm.size() == 4, op, ": a norm must have weight, bias, mean and variance, but has ", norm.size(),
                " tensors");
    const at::Tensor parts[] = {floats(norm[0]), floats(norm[1]), floats(norm[2]), floats(norm[3])};
    for (const at::Tensor& part : parts) {
      TORCH_CHECK(part.sizes() == bias.sizes(), op, ": a norm's tensors must have shape (", out, "), but one has ",
                  part.sizes());
    }
    const at::Tensor before = bias;
    scale = at::empty_like(before), bias = at::empty_like(before);
    float *scales = mutable_data(scale), *biases = mutable_data(bias);
    for (int64_t c = 0; c < out; ++c) {
      scales[c] = data(parts[0])[c] / std::sqrt(data(parts[3])[c] + static_cast<float>(eps));
      biases[c] = data(parts[1])[c] + (data(before)[c] - data(parts[2])[c]) * scales[c];
    }
  }
};

// Tasks compute some hidden channels of some output rows: rows of the input enter the hidden width in the caches, and
// only what the depthwise convolution leaves of them goes to memory.
template <class T>
at::Tensor downsample(const at::Tensor& x_, const at::Tensor& weight1, const std::optional<at::Tensor>& bias1,
                      at::TensorList norm1, double eps1, const at::Tensor& weight2,
                      const std::optional<at::Tensor>& bias2, at::TensorList norm2, double eps2,
                      const at::Tensor& weight3, const std::optional<at::Tensor>& bias3, at::TensorList norm3,
                      double eps3) {
  constexpr int64_t kMap = (1 << 18) / sizeof(T);  // about so many elements of the wide map are in the caches at a time
  constexpr int64_t kHidden = 1 << 22;             // so many of what the convolution leaves are in memory
  constexpr int64_t kPixels = 64;                  // fewest output pixels at a time, where a task has them
  constexpr int64_t kBand = 8;                     // fewest output rows of a task, where there are so many
  const char* op = "downsample";
  TORCH_CHECK(x_.dim() == 4, op, ": x must have shape (batch, height, width, channels), but has ", x_.sizes());
  const at::Tensor x = checked<T>(op, "x", x_);
  const int64_t batch = x_.size(0), height = x_.size(1), width = x_.size(2), in = x_.size(3);
  const ConvLayer first(op, weight1, bias1, norm1, eps1), last(op, weight3, bias3, norm3, eps3);
  Product<T> narrow(op, first.weight.size(0), last.weight.flatten(1), last.bias, Activation::kNone, last.scale);
  const int64_t hidden = narrow.in, out = narrow.out;
  TORCH_CHECK(hidden > 0, op, ": weight1 must have at least one output channel");
  const int64_t out_height = at::divup(height, 2), out_width = at::divup(width, 2);
  TORCH_CHECK(weight2.numel() == 9 * hidden && weight2.size(0) == hidden, op, ": the depthwise convolution must have ",
              hidden, " channels, but its weight has shape ", weight2.sizes());
  const ConvLayer depthwise(op, weight2, bias2, norm2, eps2);
  const at::Tensor result = at::empty({batch, out_height, out_width, out}, x.options());
  if (result.numel() == 0) return result;

  const int64_t group = std::clamp<int64_t>(kMap / (3 * width) / 32, 1, 4) * 32, groups = at::divup(hidden, group);
  const int64_t step = at::divup(kPixels, out_width), row = spaced<T>(group), line = width * row;
  const int64_t share = at::divup(batch * out_height * groups, 4 * at::get_num_threads());
  const int64_t band = std::clamp<int64_t>(kHidden / (out_width * hidden), 1, std::max(share, kBand));
  const int64_t bands = at::divup(out_height, band);
  const int64_t held = std::clamp<int64_t>(kHidden / (band * out_width * hidden), 1, batch * bands);
  const at::Tensor kernels_ = floats(weight2).view({hidden, 9}).t();
  const at::Tensor rows_of_taps = depthwise.scale.defined() ? kernels_ * depthwise.scale : kernels_;
  const at::Tensor taps = at::constant_pad_nd(rows_of_taps, {0, vectors(hidden) - hidden}).contiguous();
  const at::Tensor bias = padded(depthwise.bias), pixels = spaced_matrix<T>(held * band * out_width, hidden, x);
  const at::Tensor flat = result.view({-1, out});
  const Product<T> widen(op, in, first.weight.flatten(1), first.bias, Activation::kNone, first.scale);
  T* kept = mutable_data<T>(pixels);
  const auto first_row = [&](int64_t i) { return i / bands * out_height + std::min(i % bands * band, out_height); };
  for (int64_t start = 0; start < batch * bands; start += held) {
    const int64_t stop = std::min(start + held, batch * bands), origin = first_row(start);
    const int64_t held_rows = (2 * step + 1) * line;
    parallel_tasks((stop - start) * groups, floats_for<T>(held_rows + group * widen.depth()), [&](int64_t task, float* memory) {
      const int64_t part = start + task / groups, image = part / bands, begin = part % bands * band;
      const int64_t end = std::min(begin + band, out_height), first = task % groups * group;
      const int64_t channels = std::min(group, hidden - first);
      T *rows = in_scratch<T>(memory), *packed = rows + held_rows;
      widen.pack_part(first, channels, packed);
      const DownsamplingArgs conv{width, vectors(channels), vectors(hidden), data(taps, 0, first), data(bias, first),
                                  row, row_of(pixels)};
      // The first of the rows is the last of the step before, which two steps need.
      int64_t done = std::max<int64_t>(2 * begin - 1, 0);
      for (int64_t r = begin; r < end; r += step) {
        const int64_t next = std::min(r + step, end), last = std::min(2 * next, height), above = 2 * r - 1;
        if (r > begin) std::memcpy(rows, rows + 2 * step * line, line * sizeof(T));
        const T* source = data<T>(x, (image * height + done) * width);
        Product<T>::multiply({(last - done) * width, in, channels, {{source, packed}}, 1, row_of(x), data(widen.bias, first),
                              Activation::kNone, nullptr, 0, rows + (done - above) * line, row});
        done = last;
        for (int64_t q = r; q < next; ++q) {
          const T* sources[3];
          for (int64_t i = 0; i < 3; ++i) {
            const int64_t at = 2 * q + i - 1;
            sources[i] = at < 0 || at >= height ? nullptr : rows + (at - above) * line;
          }
          const int64_t target = (image * out_height + q - origin) * out_width;
          T* y = kept + target * row_of(pixels) + first;
          if constexpr (kIsFloat<T>) {
            kernels().downsampling_conv(conv, sources, y);
          } else {
            kernels().downsampling_conv_bfloat16(conv, sources, y);
          }
        }
      }
    });
    const int64_t from = origin * out_width, count = (first_row(stop) - origin) * out_width;
    narrow.apply(pixels.narrow(0, 0, count), flat.narrow(0, from, count));
  }
  return result;
}

// A convolution of 3x3, padded by 1, as products: rows of the input, where three pixels side by side are a product's
// input channels, meet the three rows of the kernel.
template <class T>
struct Convolution {
  static constexpr int64_t kBand = 8;  // most output rows of a task
  const char* op;
  at::Tensor bias;
  std::vector<Product<T>> rows_of_kernel;
  int64_t in, out, stride;
  Activation activation;

  Convolution(const char* op_, int64_t in_, const ConvLayer& layer, int64_t stride_, Activation activation_)
      : op(op_), bias(padded(layer.bias, kWidestPanel)), in(in_), out(layer.weight.size(0)), stride(stride_),
        activation(activation_) {
    TORCH_CHECK(layer.weight.sizes() == at::IntArrayRef({out, in, 3, 3}), op,
                ": a convolution's weight must have shape (out, ", in, ", 3, 3), but has ", layer.weight.sizes());
    for (int64_t i = 0; i < 3; ++i) {
      const at::Tensor row = layer.weight.select(2, i).transpose(1, 2).reshape({out, 3 * in});
      rows_of_kernel.emplace_back(op, 3 * in, row, std::nullopt, Activation::kNone, layer.scale);
      rows_of_kernel.back().pack_all();
    }
  }

  // Some pixels of an output row; the rows of the input, null where there is none, start a pixel to the left.
  void run(const T* const* rows, int64_t pixels, const T* residual, T* y, int64_t y_row) const {
    LinearArgs<T> args{pixels, 3 * in, out, {}, 0, stride * in, data(bias), activation, residual, out, y, y_row};
    for (int i : {0, 1, 2}) {
      if (rows[i]) args.factors[args.count++] = {rows[i], data<T>(rows_of_kernel[i].packed)};
    }
    Product<T>::multiply(args);
  }

  // Of x, (batch, height, width, in). The residual has the output's shape. A product may follow.
  at::Tensor apply(const at::Tensor& x, const at::Tensor& residual = {}, Product<T>* then = nullptr) const {
    const int64_t batch = x.size(0), height = x.size(1), width = x.size(2);
    const int64_t out_height = at::divup(height, stride), out_width = at::divup(width, stride);
    const at::Tensor result = at::empty({batch, out_height, out_width, then ? then->out : out}, x.options());
    if (then) then->pack_all();
    const T *source = data<T>(x), *added = data<T>(residual);
    T* target = mutable_data<T>(result);
    const int64_t band = std::clamp<int64_t>(at::divup(batch * out_height, 8 * at::get_num_threads()), 2, kBand);
    const int64_t bands = at::divup(out_height, band), line = (width + 2) * in, wide = spaced<T>(out);
    parallel_tasks(batch * bands, floats_for<T>(3 * line + (then ? kMostRows * wide : 0)), [&](int64_t task, float* scratch) {
      T* memory = in_scratch<T>(scratch);
      const int64_t image = task / bands, begin = task % bands * band, end = std::min(begin + band, out_height);
      const auto row = [&](int64_t r) { return memory + (r + 3) % 3 * line; };
      for (int64_t r = 0; r < 3; ++r) {
        std::fill_n(row(r), in, T{});
        std::fill_n(row(r) + line - in, in, T{});
      }
      int64_t entered = std::max<int64_t>(begin * stride - 1, 0);
      for (int64_t q = begin; q < end; ++q) {
        const int64_t centre = q * stride;
        for (; entered < std::min(centre + 2, height); ++entered) {
          std::copy_n(source + (image * height + entered) * width * in, width * in, row(entered) + in);
        }
        for (int64_t p = 0; p < out_width; p += kMostRows) {
          const T* rows[3];
          for (int64_t i = 0; i < 3; ++i) {
            const int64_t r = centre + i - 1;
            rows[i] = r < 0 || r >= height ? nullptr : row(r) + p * stride * in;
          }
          const int64_t pixels = std::min(kMostRows, out_width - p), at = (image * out_height + q) * out_width + p;
          T* y = then ? memory + 3 * line : target + at * out;
          run(rows, pixels, added ? added + at * out : nullptr, y, then ? wide : out);
          if (then) then->run(y, wide, pixels, target + at * then->out, then->out);
        }
      }
    });
    return result;
  }
};

template <class T>
at::Tensor stem(const at::Tensor& x_, const at::Tensor& weight1, const std::optional<at::Tensor>& bias1,
                at::TensorList norm1, double eps1, const at::Tensor& weight2, const std::optional<at::Tensor>& bias2,
                at::TensorList norm2, double eps2, const at::Tensor& weight3, const std::optional<at::Tensor>& bias3,
                at::TensorList norm3, double eps3, const at::Tensor& weight4, const std::optional<at::Tensor>& bias4,
                at::TensorList norm4, double eps4, const at::Tensor& weight5, const std::optional<at::Tensor>& bias5,
                at::TensorList norm5, double eps5) {
  const char* op = "stem";
  TORCH_CHECK(x_.dim() == 4, op, ": x must have shape (batch, height, width, channels), but has ", x_.sizes());
  const at::Tensor image = x_.contiguous();
  checked<T>(op, "x", image);
  const Convolution<T> first(op, x_.size(3), {op, weight1, bias1, norm1, eps1}, 2, Activation::kRelu);
  const Convolution<T> second(op, first.out, {op, weight2, bias2, norm2, eps2}, 1, Activation::kRelu);
  const Convolution<T> third(op, second.out, {op, weight3, bias3, norm3, eps3}, 1, Activation::kNone);
  const Convolution<T> fourth(op, third.out, {op, weight4, bias4, norm4, eps4}, 2, Activation::kRelu);
  const ConvLayer pointwise(op, weight5, bias5, norm5, eps5);
  Product<T> last(op, fourth.out, pointwise.weight.flatten(1), pointwise.bias, Activation::kNone, pointwise.scale);
  TORCH_CHECK(third.out == first.out, op, ": weight3 must have ", first.out, " output channels, but has ", third.out);
  const at::Tensor x = first.apply(image);
  return fourth.apply(third.apply(second.apply(x), x), {}, &last);
}

// A channel of pixels, (batch, height, width, channels), as a map of floats.
template <class T>
at::Tensor column_map(const at::Tensor& pixels, int64_t channel) {
  using Element = std::conditional_t<kIsFloat<T>, float, at::BFloat16>;
  const at::Tensor map = at::empty({pixels.size(0), 1, pixels.size(1), pixels.size(2)}, pixels.options().dtype(at::kFloat));
  const int64_t channels = pixels.size(3);
  const Element* source = pixels.const_data_ptr<Element>() + channel;
  float* target = mutable_data(map);
  at::parallel_for(0, map.numel(), 1 << 14, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) target[i] = source[i * channels];
  });
  return map;
}

// -exp(t) as a vector of floats.
at::Tensor negative_exp(const at::Tensor& t_) {
  const at::Tensor t = floats(t_), result = at::empty({t.numel()}, t.options());
  const float* source = data(t);
  std::transform(source, source + t.numel(), mutable_data(result), [](float x) { return -std::exp(x); });
  return result;
}

template <class T>
at::Tensor block(const at::Tensor& x_, const at::Tensor& cpe1_weight, const at::Tensor& cpe1_bias,
                 const at::Tensor& ln1_weight, const at::Tensor& ln1_bias, double ln1_eps,
                 const at::Tensor& in_proj_weight, const at::Tensor& conv_weight, const at::Tensor& conv_bias,
                 const at::Tensor& x_proj_weight, const at::Tensor& dt_proj_weight, const at::Tensor& dt_bias,
                 const at::Tensor& A_log, const at::Tensor& D, const at::Tensor& k1, const at::Tensor& k3,
                 const at::Tensor& k5, const at::Tensor& alpha, const at::Tensor& out_norm_weight,
                 const at::Tensor& out_norm_bias, double out_norm_eps, const at::Tensor& out_proj_weight,
                 const at::Tensor& cpe2_weight, const at::Tensor& cpe2_bias, const at::Tensor& ln2_weight,
                 const at::Tensor& ln2_bias, double ln2_eps, const at::Tensor& fc1_weight, const at::Tensor& fc1_bias,
                 const at::Tensor& fc2_weight, const at::Tensor& fc2_bias) {
  const char* op = "block";
  TORCH_CHECK(x_.dim() == 4, op, ": x must have shape (batch, channels, height, width), but has ", x_.sizes());
  const int64_t inner = D.numel(), rank = dt_proj_weight.size(-1);
  TORCH_CHECK(out_proj_weight.size(0) == x_.size(1) && fc2_weight.size(0) == x_.size(1) && fc2_bias.numel() == x_.size(1),
              op, ": the last products must have ", x_.size(1), " output channels as x has, but out_proj_weight has shape ",
              out_proj_weight.sizes(), ", fc2_weight ", fc2_weight.sizes(), ", fc2_bias ", fc2_bias.sizes());
  TORCH_CHECK(in_proj_weight.size(0) == 2 * inner && dt_proj_weight.size(0) == inner &&
                  x_proj_weight.size(0) == rank + 2 && A_log.numel() == inner && dt_bias.numel() == inner &&
                  alpha.numel() == 3 && k1.numel() == 9 * inner && k3.numel() == 9 * inner && k5.numel() == 9 * inner,
              op, ": the mixer's parameters do not fit each other: D has ", inner, " channels, in_proj_weight ",
              in_proj_weight.sizes(), ", x_proj_weight ", x_proj_weight.sizes(), ", dt_proj_weight ",
              dt_proj_weight.sizes(), ", dt_bias ", dt_bias.sizes(), ", A_log ", A_log.sizes(), ", alpha ", alpha.sizes(),
              ", the fusion's kernels ", k1.sizes(), ", ", k3.sizes(), " and ", k5.sizes());
  const auto pixels = [](const at::Tensor& t) { return t.permute({0, 2, 3, 1}); };
  const auto planes = [](const at::Tensor& t) { return t.permute({0, 3, 1, 2}); };
  const at::Tensor dense = x_.contiguous(at::MemoryFormat::ChannelsLast);
  at::Tensor x = pixels(depthwise_conv(dense, cpe1_weight, cpe1_bias, "residual")), y;
  {
    at::Tensor u = norm_linear<T>(op, x, ln1_weight, ln1_bias, ln1_eps, in_proj_weight.narrow(0, 0, inner));
    u = depthwise_conv(planes(u), conv_weight, conv_bias, "silu");
    const at::Tensor projected = product_of<T>(op, pixels(u), x_proj_weight);
    y = product_of<T>(op, projected.narrow(3, 0, rank), dt_proj_weight);
    structure_aware_scan_to(planes(y), u, planes(y), negative_exp(A_log), column_map<T>(projected, rank),
                            column_map<T>(projected, rank + 1), D, k1, k3, k5, alpha, dt_bias, true);
  }
  x = gated_output<T>(op, y, x, ln1_weight, ln1_bias, ln1_eps, in_proj_weight.narrow(0, inner, inner), out_norm_weight,
                      out_norm_bias, out_norm_eps, out_proj_weight);
  y.reset();
  x = pixels(depthwise_conv(planes(x), cpe2_weight, cpe2_bias, "residual"));
  return planes(norm_mlp<T>(op, x, ln2_weight, ln2_bias, ln2_eps, fc1_weight, fc1_bias, fc2_weight, fc2_bias));
}

// LayerNorm over the channels of a map, best in the channels-last memory format, to a contiguous one.
template <class T>
at::Tensor layer_norm_planes(const at::Tensor& x_, const at::Tensor& weight, const at::Tensor& bias, double eps) {
  const char* op = "layer_norm_planes";
  TORCH_CHECK(x_.dim() == 4, op, ": x must have shape (batch, channels, height, width), but has ", x_.sizes());
  const int64_t channels = x_.size(1), pixels = x_.size(2) * x_.size(3);
  const at::Tensor dense = x_.contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor x = checked<T>(op, "x", dense.permute({0, 2, 3, 1}));
  const RowNorm norm(op, channels, weight, bias, eps);
  const at::Tensor out = at::empty(x_.sizes(), x_.options().memory_format(at::MemoryFormat::Contiguous));
  if (out.numel() == 0) return out;
  constexpr int64_t kPixels = 64;  // of a task
  const int64_t pieces = at::divup(pixels, kPixels);
  T* target = mutable_data<T>(out);
  parallel_tasks(x_.size(0) * pieces, scratch::layer_norm_planes(channels), [&](int64_t task, float* memory) {
    const int64_t image = task / pieces, first = task % pieces * kPixels;
    const NormArgs args{pixels, channels, matrix(data<T>(x, image * pixels), row_of(x)), {}, data(norm.weight),
                        data(norm.bias), norm.eps};
    kernels().layer_norm_planes(args, matrix(target + image * channels * pixels, pixels), first,
                                std::min(first + kPixels, pixels), memory);
  });
  return out;
}

// The function for the first tensor's dtype.
template <auto kRun, auto kRunBFloat16>
struct ByDtype;

template <class... Args, at::Tensor (*kRun)(const at::Tensor&, Args...),
          at::Tensor (*kRunBFloat16)(const at::Tensor&, Args...)>
struct ByDtype<kRun, kRunBFloat16> {
  static at::Tensor run(const at::Tensor& x, Args... args) {
    // What PyTorch does here needs no graph either.
    const at::AutoDispatchBelowADInplaceOrView guard;
    keep_memory();
    return x.scalar_type() == at::kBFloat16 ? kRunBFloat16(x, args...) : kRun(x, args...);
  }
};

}  // namespace
}  // namespace mmspatialmamba

TORCH_LIBRARY_IMPL(mmspatialmamba_native, CPU, m) {
  using namespace mmspatialmamba;
  m.impl("stem", ByDtype<stem<float>, stem<BFloat16>>::run);
  m.impl("block", ByDtype<block<float>, block<BFloat16>>::run);
  m.impl("layer_norm_planes", ByDtype<layer_norm_planes<float>, layer_norm_planes<BFloat16>>::run);
  m.impl("downsample", ByDtype<downsample<float>, downsample<BFloat16>>::run);
}
