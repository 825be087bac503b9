// Arithmetic of the CUDA kernels, and the types that they keep in memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "common/types.h"

namespace mmspatialmamba::cuda {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16(x);
  } else {
    return x;
  }
}

// Runs run(value) with a value of the type that a dtype stands for.
template <class Run>
void by_dtype(DType dtype, const Run& run) {
  if (dtype == DType::kFloat32) run(float{});
  if (dtype == DType::kFloat16) run(__half{});
  if (dtype == DType::kBFloat16) run(__nv_bfloat16{});
}

// exp within 1 unit in the last place. The hardware's own is a little coarser, and near 1 the error of a decay adds up
// over the 1 / (1 - decay) steps that a state lives. Denormals, zero, infinity and NaN come out as they should.
__device__ __forceinline__ float accurate_exp(float x) {
  x = x < -105.f ? -105.f : x;
  x = x > 89.f ? 89.f : x;
  const float n = rintf(x * 1.44269504f);
  float f = fmaf(n, -0.693145752f, x);
  f = fmaf(n, -1.42860682e-6f, f);
  float p = fmaf(f, 1.f / 5040, 1.f / 720);
  p = fmaf(f, p, 1.f / 120);
  p = fmaf(f, p, 1.f / 24);
  p = fmaf(f, p, 1.f / 6);
  p = fmaf(f, p, 0.5f);
  p = fmaf(f, p, 1.f);
  p = fmaf(f, p, 1.f);
  const int exponent = static_cast<int>(n);
  const int half = exponent >> 1;
  return p * __int_as_float((half + 127) << 23) * __int_as_float((exponent - half + 127) << 23);
}

// The time step: x itself, or softplus(x) = max(x, 0) + log1p(z) with z = exp(-|x|) and log1p(z) = 2 atanh(z / (2 +
// z)), which keeps its relative accuracy where z is tiny. `slope`, where asked for, gets the derivative.
__device__ __forceinline__ float time_step(float x, bool softplus, float* slope = nullptr) {
  if (!softplus) {
    if (slope) *slope = 1.f;
    return x;
  }
  const float z = accurate_exp(-fabsf(x));
  const float w = __fdividef(z, 2.f + z);
  const float s = w * w;
  float p = fmaf(s, 2.f / 13, 2.f / 11);
  p = fmaf(s, p, 2.f / 9);
  p = fmaf(s, p, 2.f / 7);
  p = fmaf(s, p, 2.f / 5);
  p = fmaf(s, p, 2.f / 3);
  p = fmaf(s, p, 2.f);
  if (slope) *slope = __fdividef(x < 0.f ? z : 1.f, 1.f + z);
  return fmaf(w, p, fmaxf(x, 0.f));
}

}  // namespace mmspatialmamba::cuda
