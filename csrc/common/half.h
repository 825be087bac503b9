// Floats from and to memory in bfloat16 and float16.
#pragma once

#include "common/vec.h"

namespace mmspatialmamba::ISA {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

template <class T>
constexpr bool kIsHalf = false;
template <>
constexpr bool kIsHalf<Half> = true;

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
  typedef uint16_t Short __attribute__((vector_size(kLanes * sizeof(uint16_t))));
  typedef uint32_t Wide __attribute__((vector_size(kLanes * sizeof(uint32_t))));
  const Wide wide = reinterpret_cast<Wide>(v), rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
  const Short half = __builtin_convertvector(v == v ? rounded : rounded * 0 + 0x7fc0, Short);
  memcpy(p, &half, sizeof(half));
}

// float16 has 5 bits of exponent, of bias 15: moved to their place in a float they lack a factor of 2^112.
static ALWAYS_INLINE float to_float(Half x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  return bit_cast<float>(sign | finite | ((x.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u));
}

// To the nearest, ties to even.
template <class T>
static ALWAYS_INLINE T from_float(float x);

template <>
ALWAYS_INLINE float from_float<float>(float x) {
  return x;
}

template <>
ALWAYS_INLINE BFloat16 from_float<BFloat16>(float x) {
  const uint32_t wide = bit_cast<uint32_t>(x);
  const uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>((wide & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded)};
}

template <>
ALWAYS_INLINE Half from_float<Half>(float x) {
  const uint32_t wide = bit_cast<uint32_t>(x), sign = (wide >> 16) & 0x8000u, magnitude = wide & 0x7fffffffu;
  // From 2^16 on it is infinite or NaN; below 2^-14 the addition of 0.5 rounds to what float16 can hold.
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t small = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t rounded = magnitude >= 0x47800000u ? large : magnitude < 0x38800000u ? small : normal;
  return {static_cast<uint16_t>(sign | rounded)};
}

// `count` elements from one type to another.
template <class From, class To>
static ALWAYS_INLINE void convert(const From* source, int64_t count, To* target) {
  int64_t c = 0;
  if constexpr (!kIsHalf<From> && !kIsHalf<To>) {
    for (; c + kLanes <= count; c += kLanes) store(target + c, load(source + c));
  }
  for (; c < count; ++c) target[c] = from_float<To>(to_float(source[c]));
}

}  // namespace mmspatialmamba::ISA
