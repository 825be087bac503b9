#include "rows.h"

namespace mmspatialmamba {
namespace ISA {

namespace {

struct Moments {
  float mean, scale;
};

// Of the first `dim` floats; the rest of the last vector are zeros.
Moments moments(const float* x, int64_t dim, float eps) {
  Vec total{};
  for (int64_t c = 0; c < dim; c += kLanes) total += load(x + c);
  const float mean = sum(total) / dim;
  Vec squares{};
  int64_t c = 0;
  for (; c + kLanes <= dim; c += kLanes) {
    const Vec centred = load(x + c) - mean;
    squares += centred * centred;
  }
  float rest = 0;
  for (; c < dim; ++c) rest += (x[c] - mean) * (x[c] - mean);
  return {mean, 1.f / __builtin_sqrtf((sum(squares) + rest) / dim + eps)};
}

// One row of a (rows, dim) matrix as floats, with zeros up to a whole vector.
const float* read(const Matrix& matrix, int64_t row, int64_t dim, float* staging) {
  const int64_t offset = row * matrix.row;
  if (matrix.type == Type::kFloat) {
    const float* source = static_cast<const float*>(matrix.data) + offset;
    if (dim % kLanes == 0) return source;
    memcpy(staging, source, dim * sizeof(float));
  } else if (matrix.type == Type::kBFloat16) {
    const BFloat16* source = static_cast<const BFloat16*>(matrix.data) + offset;
    for (int64_t c = 0; c < dim; ++c) staging[c] = to_float(source[c]);
  } else {
    const Half* source = static_cast<const Half*>(matrix.data) + offset;
    for (int64_t c = 0; c < dim; ++c) staging[c] = to_float(source[c]);
  }
  for (int64_t c = dim; c % kLanes; ++c) staging[c] = 0.f;
  return staging;
}

float* open(const Matrix& matrix, int64_t row, int64_t dim, float* staging) {
  if (matrix.type == Type::kFloat && dim % kLanes == 0) return static_cast<float*>(matrix.data) + row * matrix.row;
  return staging;
}

void written(const Matrix& matrix, int64_t row, int64_t dim, const float* staging) {
  const int64_t offset = row * matrix.row;
  if (matrix.type == Type::kFloat) {
    if (dim % kLanes) memcpy(static_cast<float*>(matrix.data) + offset, staging, dim * sizeof(float));
  } else if (matrix.type == Type::kBFloat16) {
    BFloat16* target = static_cast<BFloat16*>(matrix.data) + offset;
    for (int64_t c = 0; c < dim; ++c) target[c] = from_float<BFloat16>(staging[c]);
  } else {
    Half* target = static_cast<Half*>(matrix.data) + offset;
    for (int64_t c = 0; c < dim; ++c) target[c] = from_float<Half>(staging[c]);
  }
}

}  // namespace

void gated_layer_norm(const NormArgs& args, const Matrix& out, int64_t first, int64_t last, float* scratch) {
  const int64_t dim = args.dim, piece = vectors(dim);
  for (int64_t row = first; row < last; ++row) {
    const float* x = read(args.x, row, dim, scratch);
    const float* gate = read(args.gate, row, dim, scratch + piece);
    float* y = open(out, row, dim, scratch + 2 * piece);
    const Moments m = moments(x, dim, args.eps);
    for (int64_t c = 0; c < dim; c += kLanes) {
      const Vec normed = (load(x + c) - m.mean) * m.scale * load(args.weight + c) + load(args.bias + c);
      const Vec z = load(gate + c);
      store(y + c, normed * z * logistic(z));
    }
    written(out, row, dim, y);
  }
}

void gated_layer_norm_backward(const NormArgs& args, const Matrix& grad, const Matrix& grad_x, const Matrix& grad_gate,
                               float* sums, int64_t first, int64_t last, float* scratch) {
  const int64_t dim = args.dim, piece = vectors(dim);
  float* grad_weight = scratch + 5 * piece;
  float* grad_bias = grad_weight + piece;
  memset(grad_weight, 0, 2 * piece * sizeof(float));
  for (int64_t row = first; row < last; ++row) {
    const float* x = read(args.x, row, dim, scratch);
    const float* gate = read(args.gate, row, dim, scratch + piece);
    const float* g = read(grad, row, dim, scratch + 2 * piece);
    float* to_x = open(grad_x, row, dim, scratch + 3 * piece);
    float* to_gate = open(grad_gate, row, dim, scratch + 4 * piece);
    const Moments m = moments(x, dim, args.eps);
    Vec total{}, projected{};
    for (int64_t c = 0; c < dim; c += kLanes) {
      const Vec unit = (load(x + c) - m.mean) * m.scale, weight = load(args.weight + c);
      const Vec z = load(gate + c), slope = logistic(z), incoming = load(g + c);
      store(to_gate + c, incoming * (unit * weight + load(args.bias + c)) * slope * (1.f + z * (1.f - slope)));
      const Vec to_normed = incoming * z * slope, to_unit = to_normed * weight;
      store(grad_weight + c, load(grad_weight + c) + to_normed * unit);
      store(grad_bias + c, load(grad_bias + c) + to_normed);
      store(to_x + c, to_unit);
      total += to_unit;
      projected += to_unit * unit;
    }
    const float mean = sum(total) / dim, slope = sum(projected) / dim;
    for (int64_t c = 0; c < dim; c += kLanes) {
      const Vec unit = (load(x + c) - m.mean) * m.scale;
      store(to_x + c, (load(to_x + c) - mean - unit * slope) * m.scale);
    }
    written(grad_x, row, dim, to_x);
    written(grad_gate, row, dim, to_gate);
  }
  memcpy(sums, grad_weight, dim * sizeof(float));
  memcpy(sums + dim, grad_bias, dim * sizeof(float));
}

}  // namespace ISA
}  // namespace mmspatialmamba
