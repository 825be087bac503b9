// The interface of the CPU kernels of gated_layer_norm.
#pragma once

#include "common/types.h"

namespace mmspatialmamba {

// `dim` floats in whole vectors of any instruction set.
static inline int64_t vectors(int64_t dim) { return (dim + 15) / 16 * 16; }

// A (rows, dim) tensor whose channels lie side by side; `row` counts elements.
struct Matrix {
  void* data;
  DType dtype;
  int64_t row;
};

struct NormArgs {
  int64_t rows, dim;
  Matrix x, gate;
  const float* weight;  // (dim), with zeros up to vectors(dim)
  const float* bias;    // like weight
  float eps;
};

struct GatedLayerNormCpu {
  // Rows `first` to `last` - 1.
  void (*forward)(const NormArgs&, const Matrix& y, int64_t first, int64_t last, float* scratch);
  // sums: (2, dim), of weight and bias
  void (*backward)(const NormArgs&, const Matrix& grad, const Matrix& grad_x, const Matrix& grad_gate, float* sums,
                   int64_t first, int64_t last, float* scratch);

  static int64_t forward_scratch(int64_t dim) { return 3 * vectors(dim); }
  static int64_t backward_scratch(int64_t dim) { return 7 * vectors(dim); }
};

extern const GatedLayerNormCpu gated_layer_norm_baseline, gated_layer_norm_avx2, gated_layer_norm_avx512;

}  // namespace mmspatialmamba
