#include "matrix.h"
#include "normal.h"

namespace mmspatialmamba {
namespace ISA {

void biased_gelu(const GeluArgs& args, const Matrix& out, int64_t first, int64_t last, float* scratch) {
  const int64_t dim = args.dim, piece = vectors(dim);
  for (int64_t row = first; row < last; ++row) {
    const float* x = read(args.x, row, dim, scratch);
    float* y = open(out, row, dim, scratch + piece);
    for (int64_t c = 0; c < dim; c += kLanes) {
      store(y + c, gelu(load(x + c) + load(args.bias + c)));
    }
    written(out, row, dim, y);
  }
}

void biased_gelu_backward(const GeluArgs& args, const Matrix& grad, const Matrix& grad_x, const Matrix& out,
                          float* sums, int64_t first, int64_t last, float* scratch) {
  const int64_t dim = args.dim, piece = vectors(dim);
  float *grad_bias = scratch + 3 * piece, *spare = scratch + 4 * piece;
  memset(grad_bias, 0, piece * sizeof(float));
  for (int64_t row = first; row < last; ++row) {
    const float* x = read(args.x, row, dim, scratch);
    const float* g = read(grad, row, dim, scratch + piece);
    float* to_x = open(grad_x, row, dim, scratch + 2 * piece);
    float* y = out.data ? open(out, row, dim, spare) : spare;
    for (int64_t c = 0; c < dim; c += kLanes) {
      const Vec input = load(x + c) + load(args.bias + c);
      const Normal n = normal(input);
      const Vec outgoing = load(g + c) * (n.distribution + input * n.density);
      store(y + c, input * n.distribution);
      store(to_x + c, outgoing);
      store(grad_bias + c, load(grad_bias + c) + outgoing);
    }
    written(grad_x, row, dim, to_x);
    if (out.data) written(out, row, dim, y);
  }
  memcpy(sums, grad_bias, dim * sizeof(float));
}

}  // namespace ISA
}  // namespace mmspatialmamba
