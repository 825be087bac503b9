// Vectors of floats from and to memory in bfloat16.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace mmspatialmamba {
namespace ISA {

template <class To, class From>
static ALWAYS_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

static ALWAYS_INLINE float to_float(float x) { return x; }

static ALWAYS_INLINE float to_float(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

static ALWAYS_INLINE Vec load(const BFloat16* p) {
  typedef uint16_t Short __attribute__((vector_size(kLanes * sizeof(uint16_t))));
  Short half;
  memcpy(&half, p, sizeof(half));
  return reinterpret_cast<Vec>(__builtin_convertvector(half, IntVec) << 16);
}

// To the nearest, ties to even.
static ALWAYS_INLINE void store(BFloat16* p, Vec v) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh(v);
#else
  typedef uint16_t Short __attribute__((vector_size(kLanes * sizeof(uint16_t))));
  typedef uint32_t Wide __attribute__((vector_size(kLanes * sizeof(uint32_t))));
  const Wide wide = reinterpret_cast<Wide>(v), rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
  const Short half = __builtin_convertvector(v == v ? rounded : rounded * 0 + 0x7fc0, Short);
#endif
  memcpy(p, &half, sizeof(half));
}

}  // namespace ISA
}  // namespace mmspatialmamba
