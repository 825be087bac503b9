#include "linear.h"
#include "matrix.h"

namespace mmspatialmamba {
namespace ISA {

namespace {

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

// A row of whole vectors; `scratch` has two pieces.
void norm_row(const NormArgs& args, int64_t row, float* y, float* scratch) {
  const int64_t dim = args.dim;
  const float* x = read(args.x, row, dim, scratch);
  const float* gate = args.gate.data ? read(args.gate, row, dim, scratch + vectors(dim)) : nullptr;
  const Moments m = moments(x, dim, args.eps);
  const auto normed = [&](int64_t c) {
    return (load(x + c) - m.mean) * m.scale * load(args.weight + c) + load(args.bias + c);
  };
  if (gate) {
    for (int64_t c = 0; c < dim; c += kLanes) store(y + c, normed(c) * load(gate + c) * logistic(load(gate + c)));
  } else {
    for (int64_t c = 0; c < dim; c += kLanes) store(y + c, normed(c));
  }
}

// Some channels of kBlock pixels, of which `count` are written, from pixels to planes.
template <class T>
void write_planes(const float* pixels, int64_t stride, int64_t count, const Matrix& planes, int64_t dim, int64_t first) {
  alignas(64) float part[kLanes * kPanel];
  for (int64_t c = 0; c < dim; c += kLanes) {
    for (int64_t i = 0; i < count; i += kLanes) {
      Vec square[kLanes];
#pragma GCC unroll 16
      for (int64_t j = 0; j < kLanes; ++j) square[j] = load(pixels + (i + j) * stride + c);
      transpose(square, part);
      for (int64_t j = 0; j < smaller(kLanes, dim - c); ++j) {
        T* target = static_cast<T*>(planes.data) + (c + j) * planes.row + first + i;
        if (i + kLanes <= count) {
          store(target, load(part + j * kPanel));
        } else {
          convert(part + j * kPanel, count - i, target);
        }
      }
    }
  }
}

}  // namespace

void gated_layer_norm(const NormArgs& args, const Matrix& out, int64_t first, int64_t last, float* scratch) {
  for (int64_t row = first; row < last; ++row) {
    float* y = open(out, row, args.dim, scratch + 2 * vectors(args.dim));
    norm_row(args, row, y, scratch);
    written(out, row, args.dim, y);
  }
}

void layer_norm_planes(const NormArgs& args, const Matrix& planes, int64_t first, int64_t last, float* scratch) {
  const int64_t stride = vectors(args.dim) + 16;
  float* pixels = scratch + 2 * vectors(args.dim);
  memset(pixels, 0, kBlock * stride * sizeof(float));
  for (; first < last; first += kBlock) {
    const int64_t count = smaller(kBlock, last - first);
    for (int64_t i = 0; i < count; ++i) norm_row(args, first + i, pixels + i * stride, scratch);
    const bool wide = planes.type == Type::kFloat;
    (wide ? write_planes<float> : write_planes<BFloat16>)(pixels, stride, count, planes, args.dim, first);
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
