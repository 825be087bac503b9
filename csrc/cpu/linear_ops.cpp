// Matrix products and their gradients.
#include <torch/library.h>

#include <cstring>

#include "products.h"

namespace mmspatialmamba {

at::Tensor linear(const at::Tensor& x_, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const at::Tensor x = checked("linear", "x", x_);
  Product<float> product("linear", x.size(1), weight, bias);
  const at::Tensor out = with_channels(x_, product.out);
  product.apply(x, out.view({x.size(0), product.out}));
  return out;
}

namespace {

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
    check_sizes(kOp, "gelu_bias", bias_, {x.size(1)});
    args = {x.size(0), x.size(1), matrix(data(x), row_of(x)), data(bias)};
  }
};

at::Tensor gelu_linear(const at::Tensor& x_, const at::Tensor& gelu_bias, const at::Tensor& weight,
                       const at::Tensor& bias) {
  const GeluLinear gelu(x_, gelu_bias);
  const int64_t rows = gelu.args.rows, dim = gelu.args.dim, row = spaced(dim), more = scratch::biased_gelu(dim);
  Product<float> product(GeluLinear::kOp, dim, weight, bias);
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
  const int64_t rows = gelu.args.rows, dim = gelu.args.dim, tasks = at::divup(rows, kMostRows);
  const at::Tensor grad = checked(GeluLinear::kOp, "the gradient", grad_);
  Product<float> product(GeluLinear::kOp, grad.size(1), weight.t());
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
    const int64_t first = i * kMostRows, last = std::min(first + kMostRows, rows);
    if (!shares) product.run(data(grad, first), row_of(grad), last - first, target + first * dim, dim);
    kernels().biased_gelu_backward(gelu.args, to_x, to_x, out, partial + i * dim, first, last, memory);
  });
  return {grad_x, sums.sum(0), linear_weight_gradient(grad, hidden), grad.sum(0)};
}

}  // namespace
}  // namespace mmspatialmamba

TORCH_LIBRARY_IMPL(mmspatialmamba_native, CPU, m) {
  m.impl("linear", mmspatialmamba::linear);
  m.impl("linear_weight_gradient", mmspatialmamba::linear_weight_gradient);
  m.impl("gelu_linear", mmspatialmamba::gelu_linear);
  m.impl("gelu_linear_backward", mmspatialmamba::gelu_linear_backward);
}
