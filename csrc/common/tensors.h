// Tensors for kernels, and what becomes of their results, for CPU and CUDA.
#pragma once

#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "common/checks.h"
#include "common/types.h"

// Registers an op's function and its gradient's for CPU or CUDA tensors.
#define MMSPATIALMAMBA_BIND(device, op, forward, backward) \
  TORCH_LIBRARY_IMPL(mmspatialmamba_native, device, m) {   \
    m.impl(#op, forward);                                  \
    m.impl(#op "_backward", backward);                     \
  }

namespace mmspatialmamba {

using Arg = const at::Tensor&;

// A tuple of `count` tensors.
template <size_t count>
using Tensors = decltype(std::tuple_cat(std::array<at::Tensor, count>()));

inline DType dtype_of(at::ScalarType dtype) {
  if (dtype == at::kHalf) return DType::kFloat16;
  return dtype == at::kBFloat16 ? DType::kBFloat16 : DType::kFloat32;
}

// Of a (batch, dim, height, width) tensor, or a (batch, dim, length) one.
inline Map map_of(Arg t) {
  return {t.data_ptr(), dtype_of(t.scalar_type()),      t.stride(0),
          t.stride(1),  t.dim() == 4 ? t.stride(2) : 0, t.stride(-1)};
}

// A contiguous float32 tensor.
inline at::Tensor floats(Arg t) {
  constexpr int64_t kFew = 1 << 16;
  // PyTorch takes several microseconds to convert the few numbers of a parameter.
  const bool is_fast = t.is_cpu() && t.scalar_type() == at::kBFloat16 && t.is_contiguous() && t.numel() <= kFew;
  if (!is_fast) return t.to(at::kFloat).contiguous();
  const at::Tensor result = at::empty(t.sizes(), t.options().dtype(at::kFloat));
  std::copy_n(t.const_data_ptr<at::BFloat16>(), t.numel(), result.mutable_data_ptr<float>());
  return result;
}

inline OptionalTensor floats(const OptionalTensor& t) { return t ? OptionalTensor(floats(*t)) : OptionalTensor(); }

inline const float* data_or_null(const OptionalTensor& t) { return t ? t->const_data_ptr<float>() : nullptr; }

// Memory for float32 numbers, on a tensor's device.
inline at::Tensor empty_floats(at::IntArrayRef sizes, Arg like) {
  return at::empty(sizes, at::TensorOptions().device(like.device()).dtype(at::kFloat));
}

inline at::Tensor zero_floats(at::IntArrayRef sizes, Arg like) { return empty_floats(sizes, like).zero_(); }

// A value in the shape, dtype and memory format of another tensor.
inline at::Tensor as(Arg value, Arg like) {
  at::Tensor result = at::empty_like(like);
  result.copy_(value.reshape(like.sizes()));
  return result;
}

// The gradient of delta_bias; zeros where there is none.
inline at::Tensor grad_of_bias(Arg value, const OptionalTensor& bias, Arg A) {
  return bias ? as(value, *bias) : at::zeros({A.size(0)}, A.options());
}

}  // namespace mmspatialmamba
