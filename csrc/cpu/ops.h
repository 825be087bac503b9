// What the files that bind CPU kernels to ops share.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>

#include "kernels.h"

namespace mmspatialmamba {

const Kernels& kernels();

using Scratch = std::unique_ptr<float, decltype(&std::free)>;

// Memory for one thread's use.
inline Scratch allocate(int64_t count) {
  const size_t bytes = (count * sizeof(float) + 63) / 64 * 64;
  Scratch memory(static_cast<float*>(std::aligned_alloc(64, bytes)), &std::free);
  TORCH_CHECK(memory || bytes == 0, "no memory for ", bytes, " bytes of scratch space");
  return memory;
}

// Runs task(index, scratch) for all indices, each by the thread that is free next, with `scratch` floats for each thread.
// What a task computes must not depend on the thread.
template <class Task>
void parallel_tasks(int64_t count, int64_t scratch, const Task& task) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t begin, int64_t end) {
    const Scratch memory = allocate(scratch);
    // One index of this loop is a thread's share, but torch may give a thread several.
    for (int64_t share = begin; share < end; ++share) {
      for (int64_t i = next++; i < count; i = next++) task(i, memory.get());
    }
  });
}

inline void check_sizes(const char* op, const char* name, const at::Tensor& t, at::IntArrayRef sizes) {
  TORCH_CHECK(t.sizes() == sizes, op, ": ", name, " must have shape (", c10::Join(", ", sizes), "), but has ", t.sizes());
}

inline at::Tensor floats(const at::Tensor& t) {
  constexpr int64_t kFew = 1 << 16;
  // PyTorch takes several microseconds to convert the few numbers of a parameter.
  if (t.scalar_type() != at::kBFloat16 || !t.is_contiguous() || t.numel() > kFew) return t.to(at::kFloat).contiguous();
  const at::Tensor result = at::empty(t.sizes(), t.options().dtype(at::kFloat));
  std::copy_n(t.const_data_ptr<at::BFloat16>(), t.numel(), result.mutable_data_ptr<float>());
  return result;
}

inline std::optional<at::Tensor> floats(const std::optional<at::Tensor>& t) {
  return t ? std::make_optional(floats(*t)) : std::nullopt;
}

// A vector as floats, with zeros up to a multiple of `unit`: by default whole vectors of any instruction set.
inline at::Tensor padded(const at::Tensor& t, int64_t unit = vectors(1)) {
  const int64_t missing = (unit - t.size(0) % unit) % unit;
  return missing ? at::constant_pad_nd(floats(t), {0, missing}) : floats(t);
}

// A (rows, dim) view, or copy where there is none with its channels side by side.
inline at::Tensor as_matrix(const at::Tensor& t) {
  const at::Tensor flat = t.reshape({-1, t.size(-1)});
  return flat.stride(1) == 1 ? flat : flat.contiguous();
}

// Ops that others are made of.
// The scan's output goes to y, which may be delta: a row is written when those that it needs were read.
void structure_aware_scan_to(const at::Tensor& y, const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A,
                             const at::Tensor& B, const at::Tensor& C, const at::Tensor& D, const at::Tensor& k1,
                             const at::Tensor& k3, const at::Tensor& k5, const at::Tensor& alpha,
                             const std::optional<at::Tensor>& bias, bool softplus);
at::Tensor depthwise_conv(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                          const std::string& finish);
// LayerNorm alone where the gate is undefined.
at::Tensor gated_layer_norm(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& weight,
                            const at::Tensor& bias, double eps);
at::Tensor biased_gelu(const at::Tensor& x, const at::Tensor& bias);
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias);

}  // namespace mmspatialmamba
