// Rows of a (rows, dim) matrix of any type, as floats.
#pragma once

#include "rows.h"

namespace mmspatialmamba {
namespace ISA {

// One row of a (rows, dim) matrix as floats, with zeros up to a whole vector.
static const float* read(const Matrix& matrix, int64_t row, int64_t dim, float* staging) {
  const int64_t offset = row * matrix.row;
  if (matrix.type == Type::kFloat) {
    const float* source = static_cast<const float*>(matrix.data) + offset;
    if (dim % kLanes == 0) return source;
    memcpy(staging, source, dim * sizeof(float));
  } else if (matrix.type == Type::kBFloat16) {
    convert(static_cast<const BFloat16*>(matrix.data) + offset, dim, staging);
  } else {
    convert(static_cast<const Half*>(matrix.data) + offset, dim, staging);
  }
  for (int64_t c = dim; c % kLanes; ++c) staging[c] = 0.f;
  return staging;
}

// Where to put the row as floats, and what to do when it is there.
static float* open(const Matrix& matrix, int64_t row, int64_t dim, float* staging) {
  if (matrix.type == Type::kFloat && dim % kLanes == 0) return static_cast<float*>(matrix.data) + row * matrix.row;
  return staging;
}

static void written(const Matrix& matrix, int64_t row, int64_t dim, const float* staging) {
  const int64_t offset = row * matrix.row;
  if (matrix.type == Type::kFloat) {
    if (dim % kLanes) memcpy(static_cast<float*>(matrix.data) + offset, staging, dim * sizeof(float));
  } else if (matrix.type == Type::kBFloat16) {
    convert(staging, dim, static_cast<BFloat16*>(matrix.data) + offset);
  } else {
    convert(staging, dim, static_cast<Half*>(matrix.data) + offset);
  }
}

}  // namespace ISA
}  // namespace mmspatialmamba
