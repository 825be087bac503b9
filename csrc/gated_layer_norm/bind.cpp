// Binds the CPU kernels of gated_layer_norm to its ops.
#include "common/bind_cpu.h"
#include "gated_layer_norm/cpu.h"

namespace mmspatialmamba {
namespace {

constexpr int64_t kTaskRows = 64;

int64_t row_tasks(int64_t rows) { return (rows + kTaskRows - 1) / kTaskRows; }

// Runs task(first row, behind the last row, scratch).
template <class Task>
void parallel_rows(int64_t rows, int64_t scratch, const Task& task) {
  parallel_tasks(row_tasks(rows), scratch, [&](int64_t number, float* memory) {
    task(number * kTaskRows, std::min((number + 1) * kTaskRows, rows), memory);
  });
}

// A (rows, dim) view, or copy where there is none with its channels side by side.
at::Tensor as_matrix(Arg t) {
  const int64_t dim = t.size(-1);
  const at::Tensor flat = t.reshape({dim ? t.numel() / dim : 0, dim});
  return flat.stride(1) == 1 ? flat : flat.contiguous();
}

Matrix matrix_of(Arg t) { return {t.data_ptr(), dtype_of(t.scalar_type()), t.stride(0)}; }

// A vector as floats, with zeros up to whole vectors.
at::Tensor padded(Arg t) {
  const int64_t missing = vectors(t.size(0)) - t.size(0);
  return missing ? at::constant_pad_nd(floats(t), {0, missing}) : floats(t);
}

// The checked arguments of the kernels, and the tensors that they point into.
struct Inputs {
  Checks checks;
  at::Tensor x, gate, weight, bias;
  NormArgs args;

  Inputs(const char* op, Arg x_, Arg gate_, Arg weight_, Arg bias_, double eps) : checks(op, "x", x_) {
    TORCH_CHECK(x_.dim() > 0, op, ": x must have at least 1 dimension, but has none");
    checks("gate", gate_, x_.sizes());
    checks("weight", weight_, {x_.size(-1)});
    checks("bias", bias_, {x_.size(-1)});
    x = as_matrix(x_);
    gate = as_matrix(gate_);
    weight = padded(weight_);
    bias = padded(bias_);
    args = {x.size(0), x.size(1), matrix_of(x), matrix_of(gate)};
    args.weight = weight.const_data_ptr<float>();
    args.bias = bias.const_data_ptr<float>();
    args.eps = static_cast<float>(eps);
  }
};

at::Tensor gated_layer_norm(Arg x, Arg gate, Arg weight, Arg bias, double eps) {
  const Inputs in("gated_layer_norm", x, gate, weight, bias, eps);
  at::Tensor y = at::empty(x.sizes(), x.options());
  const Matrix out = matrix_of(as_matrix(y));
  parallel_rows(in.args.rows, GatedLayerNormCpu::forward_scratch(in.args.dim),
                [&](auto... task) { MMSPATIALMAMBA_CPU(gated_layer_norm).forward(in.args, out, task...); });
  return y;
}

Tensors<4> gated_layer_norm_backward(Arg grad, Arg x, Arg gate, Arg weight, Arg bias, double eps) {
  const Inputs in("gated_layer_norm_backward", x, gate, weight, bias, eps);
  in.checks("grad", grad, x.sizes());
  const int64_t rows = in.args.rows, dim = in.args.dim;
  const at::Tensor grads = as_matrix(grad);
  at::Tensor grad_x = at::empty(x.sizes(), x.options()), grad_gate = at::empty(gate.sizes(), gate.options());
  at::Tensor sums = zero_floats({row_tasks(rows), 2, dim}, x);
  const Matrix incoming = matrix_of(grads), to_x = matrix_of(as_matrix(grad_x)),
               to_gate = matrix_of(as_matrix(grad_gate));
  float* const partial = sums.mutable_data_ptr<float>();
  parallel_rows(rows, GatedLayerNormCpu::backward_scratch(dim), [&](int64_t first, auto... task) {
    float* const own = partial + first / kTaskRows * 2 * dim;
    MMSPATIALMAMBA_CPU(gated_layer_norm).backward(in.args, incoming, to_x, to_gate, own, first, task...);
  });
  sums = sums.sum(0);
  return {grad_x, grad_gate, as(sums.select(0, 0), weight), as(sums.select(0, 1), bias)};
}

MMSPATIALMAMBA_BIND(CPU, gated_layer_norm, gated_layer_norm, gated_layer_norm_backward)

}  // namespace
}  // namespace mmspatialmamba
