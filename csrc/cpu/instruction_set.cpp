// Chooses the CPU kernels.
#include <ATen/Version.h>

#include <cctype>
#include <cstdlib>
#include <string>

#if defined(WITH_AVX512_BF16)
#include <cpuid.h>
#endif
#if defined(WITH_AVX512_BF16) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "ops.h"

namespace mmspatialmamba {

namespace baseline {
extern const Kernels table;
}
#ifdef WITH_AVX2
namespace avx2 {
extern const Kernels table;
}
#endif
#ifdef WITH_AVX512
namespace avx512 {
extern const Kernels table;
}
#endif

#ifdef WITH_AVX512_BF16
namespace avx512_bf16 {
extern const Kernels table;
extern const Kernels amx_table;
}  // namespace avx512_bf16

namespace {

// Whether oneDNN, and so this, may use an instruction set, given part of its name.
bool is_allowed(const std::string& name) {
  const char* most = std::getenv("ONEDNN_MAX_CPU_ISA");
  if (!most) most = std::getenv("DNNL_MAX_CPU_ISA");
  std::string allowed = most && *most ? most : "DEFAULT";
  for (char& c : allowed) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  return allowed == "DEFAULT" || allowed == "ALL" || allowed.find(name) != std::string::npos;
}

bool has_bfloat16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool allowed = is_allowed("BF16") || is_allowed("FP16") || is_allowed("AMX") || is_allowed("AVX10");
  return allowed && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

// Linux lends a process AMX's registers when it asks for them.
bool has_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  return is_allowed("AMX") && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace
#endif

// Those for the instruction set that PyTorch found, or was told by ATEN_CPU_CAPABILITY. It knows none with bfloat16.
const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const std::string capability = at::get_cpu_capability();
#ifdef WITH_AVX512_BF16
    if (capability == "AVX512" && !std::getenv("ATEN_CPU_CAPABILITY") && has_bfloat16()) {
      return has_amx() ? avx512_bf16::amx_table : avx512_bf16::table;
    }
#endif
#ifdef WITH_AVX512
    if (capability == "AVX512") return avx512::table;
#endif
#ifdef WITH_AVX2
    if (capability == "AVX2" || capability == "AVX512") return avx2::table;
#endif
    return baseline::table;
  }();
  return chosen;
}

}  // namespace mmspatialmamba
