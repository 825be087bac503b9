// What the files that bind CPU kernels share: which kernels run, and how.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <atomic>
#include <string>

#include "common/tensors.h"

// The table of an op's functions for this processor, from those that its cpu.cpp defines.
#ifdef WITH_AVX
#define MMSPATIALMAMBA_CPU(op)                                \
  (instruction_set() == InstructionSet::kAvx512 ? op##_avx512 \
   : instruction_set() == InstructionSet::kAvx2 ? op##_avx2   \
                                                : op##_baseline)
#else
#define MMSPATIALMAMBA_CPU(op) op##_baseline
#endif

namespace mmspatialmamba {

enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

// The one that PyTorch found, or was told by ATEN_CPU_CAPABILITY. Beyond x86 it is always the baseline.
inline InstructionSet instruction_set() {
  static const InstructionSet chosen = [] {
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return InstructionSet::kAvx512;
    return capability == "AVX2" ? InstructionSet::kAvx2 : InstructionSet::kBaseline;
  }();
  return chosen;
}

// Runs task(index, scratch) for all indices, each by the thread that is free next, with `scratch` floats for each
// thread. What a task computes must not depend on the thread.
template <class Task>
void parallel_tasks(int64_t count, int64_t scratch, const Task& task) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t begin, int64_t end) {
    const c10::DataPtr memory = c10::GetCPUAllocator()->allocate(scratch * sizeof(float));  // aligned to 64 bytes
    float* const own = static_cast<float*>(memory.get());
    // One index of this loop is a thread's share, but torch may give a thread several.
    for (int64_t share = begin; share < end; ++share) {
      for (int64_t i = next++; i < count; i = next++) task(i, own);
    }
  });
}

// Runs task(image, block of channels, scratch) for all of them, unless the maps are empty.
template <class Task>
void parallel_blocks(const Shape& shape, int64_t scratch, const Task& task) {
  if (shape.height * shape.width == 0) return;
  const int64_t count = blocks(shape.dim);
  parallel_tasks(shape.batch * count, scratch, [&](int64_t i, float* memory) { task(i / count, i % count, memory); });
}

// Of a (batch, dim, height, width) tensor.
inline Shape shape_of(const at::Tensor& t) { return {t.size(0), t.size(1), t.size(2), t.size(3)}; }

// What Kernels3x3 can hold as it is, else as floats.
inline at::Tensor dense_kernels(const at::Tensor& t) {
  return t.scalar_type() == at::kBFloat16 && t.is_contiguous() ? t : floats(t);
}

inline Kernels3x3 kernels3x3(const at::Tensor& dense) {
  return {dense.const_data_ptr(), dtype_of(dense.scalar_type())};
}

}  // namespace mmspatialmamba
