// What the files that bind CUDA kernels share.
#pragma once

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include <limits>

#include "common/plan.h"
#include "common/tensors.h"

namespace mmspatialmamba::cuda {

// In one dtype: the kernels take no two.
inline at::ScalarType common_dtype(Arg a, Arg b) {
  return a.scalar_type() == b.scalar_type() ? a.scalar_type() : at::kFloat;
}

// The kernels take maps whose channels or whose columns lie together.
inline bool is_usable(Arg map) {
  return (map.size(1) > 1 && map.stride(1) == 1) || map.size(3) == 1 || map.stride(3) == 1;
}

inline at::Tensor as_input(Arg t, at::ScalarType dtype) {
  const at::Tensor value = t.to(dtype);
  return is_usable(value) ? value : value.contiguous();
}

// A map for a kernel to write in one dtype, and what it is to become.
struct Output {
  at::Tensor result, written;

  Output(Arg like, at::ScalarType dtype, at::ScalarType written_dtype)
      : result(at::empty_like(like, like.options().dtype(dtype))) {
    written = dtype == written_dtype && is_usable(result)
                  ? result
                  : at::empty(like.sizes(), like.options().dtype(written_dtype));
  }

  at::Tensor finish() { return written.is_same(result) ? result : result.copy_(written); }
};

inline int multiprocessors() { return at::cuda::getCurrentDeviceProperties()->multiProcessorCount; }

inline int32_t narrow(const char* op, int64_t size) {
  TORCH_CHECK(size <= std::numeric_limits<int32_t>::max() / 16, op, ": a dimension of ", size, " is too large");
  return static_cast<int32_t>(size);
}

inline Size size_of(const char* op, Arg map) {
  return {narrow(op, map.size(0)), narrow(op, map.size(1)), narrow(op, map.size(2)), narrow(op, map.size(3))};
}

}  // namespace mmspatialmamba::cuda
