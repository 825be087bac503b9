// Chooses the CPU kernels.
#pragma once

#include <ATen/Version.h>

#include <string>

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

}  // namespace mmspatialmamba

// The table of an op's functions for this processor, from those that its cpu.cpp defines.
#ifdef WITH_AVX
#define MMSPATIALMAMBA_CPU(op)                                \
  (instruction_set() == InstructionSet::kAvx512 ? op##_avx512 \
   : instruction_set() == InstructionSet::kAvx2 ? op##_avx2   \
                                                : op##_baseline)
#else
#define MMSPATIALMAMBA_CPU(op) op##_baseline
#endif
