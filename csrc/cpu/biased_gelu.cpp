#include "matrix.h"

namespace mmspatialmamba {
namespace ISA {

namespace {

struct Normal {
  Vec distribution, density;
};

// The standard normal distribution. Its tail, of relative error 5e-8 before rounding, is exp(-x^2 / 2) times a polynomial
// in 1 / (1 + 0.3 |x| / sqrt(2)) fitted to half of the scaled complementary error function.
ALWAYS_INLINE Normal normal(Vec x) {
  const Vec bell = exp2(x * x * (-0.5f * kLog2E));
  const Vec t = 1.f / (absolute(x) * 0.212132034f + 1.f), t2 = t * t, t4 = t2 * t2;
  const Vec low = (1.07462958e-01f * t + 7.41695985e-02f) * t2 + (8.53576139e-02f * t + 8.45940039e-02f);
  const Vec high = (2.42781460e-01f * t + -2.56138742e-01f) * t2 + (2.73859710e-01f * t + -4.73251715e-02f);
  const Vec scaled = (-6.47614226e-02f * t4 + high) * t4 + low;
  const Vec tail = bell * t * scaled;
  return {x < 0.f ? tail : 1.f - tail, bell * 0.398942280f};
}

}  // namespace

void biased_gelu(const GeluArgs& args, const Matrix& out, int64_t first, int64_t last, float* scratch) {
  const int64_t dim = args.dim, piece = vectors(dim);
  for (int64_t row = first; row < last; ++row) {
    const float* x = read(args.x, row, dim, scratch);
    float* y = open(out, row, dim, scratch + piece);
    for (int64_t c = 0; c < dim; c += kLanes) {
      const Vec input = load(x + c) + load(args.bias + c);
      store(y + c, input * normal(input).distribution);
    }
    written(out, row, dim, y);
  }
}

void biased_gelu_backward(const GeluArgs& args, const Matrix& grad, const Matrix& grad_x, float* sums, int64_t first,
                          int64_t last, float* scratch) {
  const int64_t dim = args.dim, piece = vectors(dim);
  float* grad_bias = scratch + 3 * piece;
  memset(grad_bias, 0, piece * sizeof(float));
  for (int64_t row = first; row < last; ++row) {
    const float* x = read(args.x, row, dim, scratch);
    const float* g = read(grad, row, dim, scratch + piece);
    float* to_x = open(grad_x, row, dim, scratch + 2 * piece);
    for (int64_t c = 0; c < dim; c += kLanes) {
      const Vec input = load(x + c) + load(args.bias + c);
      const Normal n = normal(input);
      const Vec outgoing = load(g + c) * (n.distribution + input * n.density);
      store(to_x + c, outgoing);
      store(grad_bias + c, load(grad_bias + c) + outgoing);
    }
    written(grad_x, row, dim, to_x);
  }
  memcpy(sums, grad_bias, dim * sizeof(float));
}

}  // namespace ISA
}  // namespace mmspatialmamba
