#include "gated_layer_norm/cpu.h"

#include "common/vec.h"

namespace mmspatialmamba::ISA {
namespace {

// One row of a (rows, dim) matrix as floats, with zeros up to a whole vector.
const float* read(const Matrix& matrix, int64_t row, int64_t dim, float* staging) {
  const int64_t offset = row * matrix.row;
  if (matrix.dtype == DType::kFloat32) {
    const float* source = static_cast<const float*>(matrix.data) + offset;
    if (dim % kLanes == 0) return source;
    memcpy(staging, source, dim * sizeof(float));
  } else if (matrix.dtype == DType::kBFloat16) {
    convert(static_cast<const BFloat16*>(matrix.data) + offset, dim, staging);
  } else {
    convert(static_cast<const Half*>(matrix.data) + offset, dim, staging);
  }
  for (int64_t c = dim; c % kLanes; ++c) staging[c] = 0.f;
  return staging;
}

// Where to put the row as floats, and what to do when it is there.
float* open(const Matrix& matrix, int64_t row, int64_t dim, float* staging) {
  if (matrix.dtype == DType::kFloat32 && dim % kLanes == 0) return static_cast<float*>(matrix.data) + row * matrix.row;
  return staging;
}

void written(const Matrix& matrix, int64_t row, int64_t dim, const float* staging) {
  const int64_t offset = row * matrix.row;
  if (matrix.dtype == DType::kFloat32) {
    if (dim % kLanes) memcpy(static_cast<float*>(matrix.data) + offset, staging, dim * sizeof(float));
  } else if (matrix.dtype == DType::kBFloat16) {
    convert(staging, dim, static_cast<BFloat16*>(matrix.data) + offset);
  } else {
    convert(staging, dim, static_cast<Half*>(matrix.data) + offset);
  }
}

struct Moments {
  float mean, scale;
};

// The sum of value(channel) over the whole vectors of `dim` floats, and where they end. Four sums side by side: each
// addition would else wait for the one before.
template <class Value>
ALWAYS_INLINE Vec vector_sum(int64_t dim, int64_t& c, const Value& value) {
  Vec total[4] = {};
  for (c = 0; c + 4 * kLanes <= dim; c += 4 * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) total[i] += value(c + i * kLanes);
  }
  for (; c + kLanes <= dim; c += kLanes) total[0] += value(c);
  return (total[0] + total[1]) + (total[2] + total[3]);
}

// Of the first `dim` floats; the rest of the last vector are zeros.
Moments moments(const float* x, int64_t dim, float eps) {
  int64_t c;
  Vec total = vector_sum(dim, c, [&](int64_t i) { return load(x + i); });
  if (c < dim) total += load(x + c);
  const float mean = sum(total) / dim;
  const Vec squares = vector_sum(dim, c, [&](int64_t i) {
    const Vec centred = load(x + i) - mean;
    return centred * centred;
  });
  float rest = 0;
  for (; c < dim; ++c) rest += (x[c] - mean) * (x[c] - mean);
  return {mean, 1.f / __builtin_sqrtf((sum(squares) + rest) / dim + eps)};
}

void forward(const NormArgs& args, const Matrix& out, int64_t first, int64_t last, float* scratch) {
  const int64_t dim = args.dim, piece = vectors(dim);
  for (int64_t row = first; row < last; ++row) {
    const float* x = read(args.x, row, dim, scratch);
    const float* gate = read(args.gate, row, dim, scratch + piece);
    float* y = open(out, row, dim, scratch + 2 * piece);
    const Moments m = moments(x, dim, args.eps);
    for (int64_t c = 0; c < dim; c += kLanes) {
      const Vec normed = (load(x + c) - m.mean) * m.scale * load(args.weight + c) + load(args.bias + c);
      store(y + c, normed * load(gate + c) * logistic(load(gate + c)));
    }
    written(out, row, dim, y);
  }
}

void backward(const NormArgs& args, const Matrix& grad, const Matrix& grad_x, const Matrix& grad_gate, float* sums,
              int64_t first, int64_t last, float* scratch) {
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

}  // namespace
}  // namespace mmspatialmamba::ISA

const mmspatialmamba::GatedLayerNormCpu mmspatialmamba::MMSPATIALMAMBA_FOR_ISA(gated_layer_norm){ISA::forward,
                                                                                                 ISA::backward};
