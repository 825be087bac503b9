// Vectors of floats, the functions of them that the kernels need, and floats from and to memory. Compiled once for each
// instruction set, in a namespace of its own; no header of torch and none of the standard library's templates may come
// in here, since the linker would be free to keep the copy that was compiled for the newest instruction set.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace mmspatialmamba::ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#define INTRINSIC(name) _mm512_##name##_ps
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#define INTRINSIC(name) _mm256_##name##_ps
#else
constexpr int kLanes = 4;
#if defined(__SSE2__)
#define INTRINSIC(name) _mm_##name##_ps
#endif
#endif

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t IntVec __attribute__((vector_size(kLanes * sizeof(int32_t))));

#define ALWAYS_INLINE inline __attribute__((always_inline))

static ALWAYS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static ALWAYS_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static ALWAYS_INLINE Vec load(const float* p) {
  Vec v;
  memcpy(&v, p, sizeof(v));
  return v;
}

static ALWAYS_INLINE void store(float* p, Vec v) { memcpy(p, &v, sizeof(v)); }

// Keeps a compiler from reading a value anew from memory for each use.
static ALWAYS_INLINE Vec in_register(Vec v) {
#if defined(__SSE2__)
  asm("" : "+v"(v));
#endif
  return v;
}

static ALWAYS_INLINE Vec broadcast(float x) { return x - Vec{}; }

static ALWAYS_INLINE IntVec bits(Vec v) { return reinterpret_cast<IntVec>(v); }

static ALWAYS_INLINE Vec absolute(Vec v) { return reinterpret_cast<Vec>(bits(v) & 0x7fffffff); }

// The larger and the smaller of two; b where one of them is NaN.
#if defined(INTRINSIC)
static ALWAYS_INLINE Vec maximum(Vec a, Vec b) { return INTRINSIC(max)(a, b); }
static ALWAYS_INLINE Vec minimum(Vec a, Vec b) { return INTRINSIC(min)(a, b); }
#else
static ALWAYS_INLINE Vec maximum(Vec a, Vec b) { return a > b ? a : b; }
static ALWAYS_INLINE Vec minimum(Vec a, Vec b) { return a < b ? a : b; }
#endif

// A NaN stays what it is.
static ALWAYS_INLINE Vec clamp(Vec v, float low, float high) {
  return minimum(broadcast(high), maximum(broadcast(low), v));
}

template <class T>
static ALWAYS_INLINE T half_of(const void* v, int which) {
  T half;
  memcpy(&half, static_cast<const char*>(v) + which * sizeof(T), sizeof(T));
  return half;
}

static ALWAYS_INLINE float sum(Vec v) {
  typedef float Vec8 __attribute__((vector_size(32), unused));
  typedef float Vec4 __attribute__((vector_size(16)));
#if defined(__AVX512F__)
  const Vec8 eight = half_of<Vec8>(&v, 0) + half_of<Vec8>(&v, 1);
  const Vec4 four = half_of<Vec4>(&eight, 0) + half_of<Vec4>(&eight, 1);
#elif defined(__AVX2__)
  const Vec4 four = half_of<Vec4>(&v, 0) + half_of<Vec4>(&v, 1);
#else
  const Vec4 four = v;
#endif
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// 2^x. Largest relative error 1.1e-8 before rounding; below 2^-126 the result is 0.
static ALWAYS_INLINE Vec exp2(Vec x) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: what is added to it is rounded to an integer
  x = clamp(x, -127.f, 128.4f);
  const Vec shifted = x + kRound;
  const Vec f = x - (shifted - kRound), f2 = f * f;
  const Vec low = 2.40226498e-1f * f + 6.93147181e-1f;
  const Vec middle = 9.61823749e-3f * f + 5.55035743e-2f;
  const Vec high = 1.54035126e-4f * f + 1.33907355e-3f;
  const Vec q = (high * f2 + middle) * f2 + low;
  const Vec scale = reinterpret_cast<Vec>((bits(shifted) + 127) << 23);
  return (q * f + 1.f) * scale;
}

constexpr float kLog2E = 1.44269504f;

// log(1 + z) for z in [0, 1], given z / (2 + z): 2 atanh of it, which keeps its relative accuracy for small z.
static ALWAYS_INLINE Vec log1p_from(Vec s) {
  const Vec t = s * s, t2 = t * t;
  const Vec low = 6.66663147e-1f * t + 2.f;
  const Vec high = 2.79606028e-1f * t + 4.00249103e-1f;
  return ((2.81783349e-1f * t2 + high) * t2 + low) * s;
}

// 1 / (1 + exp(-x)).
static ALWAYS_INLINE Vec logistic(Vec x) { return 1.f / (exp2(x * -kLog2E) + 1.f); }

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
static ALWAYS_INLINE void put(float* p, float x) { *p = x; }

static ALWAYS_INLINE void put(BFloat16* p, float x) {
  const uint32_t wide = bit_cast<uint32_t>(x);
  const uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
  p->bits = static_cast<uint16_t>((wide & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

static ALWAYS_INLINE void put(Half* p, float x) {
  const uint32_t wide = bit_cast<uint32_t>(x), sign = (wide >> 16) & 0x8000u, magnitude = wide & 0x7fffffffu;
  // From 2^16 on it is infinite or NaN; below 2^-14 the addition of 0.5 rounds to what float16 can hold.
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t small = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t rounded = magnitude >= 0x47800000u ? large : magnitude < 0x38800000u ? small : normal;
  p->bits = static_cast<uint16_t>(sign | rounded);
}

// `count` elements from one type to another.
template <class From, class To>
static ALWAYS_INLINE void convert(const From* source, int64_t count, To* target) {
  int64_t c = 0;
  if constexpr (!kIsHalf<From> && !kIsHalf<To>) {
    for (; c + kLanes <= count; c += kLanes) store(target + c, load(source + c));
  }
  for (; c < count; ++c) put(target + c, to_float(source[c]));
}

}  // namespace mmspatialmamba::ISA
