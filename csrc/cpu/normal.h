// The standard normal distribution, and GELU, the product of it and its argument.
#pragma once

#include "vec.h"

namespace mmspatialmamba {
namespace ISA {

struct Normal {
  Vec distribution, density;
};

// The standard normal distribution. Its tail, of relative error 5e-8 before rounding, is exp(-x^2 / 2) times a polynomial
// in 1 / (1 + 0.3 |x| / sqrt(2)) fitted to half of the scaled complementary error function.
static ALWAYS_INLINE Normal normal(Vec x) {
  const Vec bell = exp2(x * x * (-0.5f * kLog2E));
  const Vec t = 1.f / (absolute(x) * 0.212132034f + 1.f), t2 = t * t, t4 = t2 * t2;
  const Vec low = (1.07462958e-01f * t + 7.41695985e-02f) * t2 + (8.53576139e-02f * t + 8.45940039e-02f);
  const Vec high = (2.42781460e-01f * t + -2.56138742e-01f) * t2 + (2.73859710e-01f * t + -4.73251715e-02f);
  const Vec scaled = (-6.47614226e-02f * t4 + high) * t4 + low;
  const Vec tail = bell * t * scaled;
  return {x < 0.f ? tail : 1.f - tail, bell * 0.398942280f};
}

// x times its distribution, without an exponential: for x < 0 it is x / p(|x|)^8, p a polynomial fitted to the
// distribution's power of -1/8, and GELU(x) is GELU(-x) + x. Its largest error is 4.2e-8 before rounding.
static ALWAYS_INLINE Vec gelu(Vec x) {
  const Vec a = minimum(broadcast(40.f), absolute(x)), a2 = a * a, a4 = a2 * a2;
  const Vec low = (9.31665115e-03f * a + 4.88699563e-02f) * a2 + (1.08752117e-01f * a + 1.09050834f);
  const Vec high = (-2.03474901e-05f * a + 1.17906035e-04f) * a2 + (8.80276784e-05f * a + 1.12473103e-03f);
  const Vec p = (3.35196682e-06f * a4 + high) * a4 + low, p2 = p * p, p4 = p2 * p2;
  return maximum(Vec{}, x) - a / (p4 * p4);
}

}  // namespace ISA
}  // namespace mmspatialmamba
