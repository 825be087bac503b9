// The time step of a scan and the decay of its state, for a few pixels of kBlock channels.
#pragma once

#include "common/rows.h"

namespace mmspatialmamba::ISA {

// The arithmetic of one pixel is a long chain of dependent instructions. So it is done in short loops over several
// pixels, of which a processor overlaps more than it would of one long loop's body.
constexpr int kChunk = 4;

struct TimeSteps {
  alignas(64) float value[kChunk * kBlock];       // dt
  alignas(64) float decay[kChunk * kBlock];       // exp(dt * A)
  alignas(64) float derivative[kChunk * kBlock];  // of dt by delta
};

// dt = softplus(delta + bias) = max(x, 0) + log(1 + z) with z = exp(-|x|), or delta + bias; `delta` holds count pixels.
template <bool kSoftplus, bool kDerivative, class T>
static ALWAYS_INLINE void time_steps(const RowOf<T>& delta, int count, const float* bias, const float* A,
                                     TimeSteps& steps) {
  if (kSoftplus) {
    for (int x = 0; x < count; ++x) {
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) {
        const int c = v * kLanes;
        const Vec input = load(delta.data + x * delta.stride + c) + load(bias + c);
        store(steps.decay + x * kBlock + c, input);
        store(steps.value + x * kBlock + c, exp2(absolute(input) * -kLog2E));
      }
    }
    for (int i = 0; i < count * kBlock; i += kLanes) {
      const Vec input = load(steps.decay + i), z = load(steps.value + i);
      Vec s;
      if (kDerivative) {
        const Vec inverse = 1.f / ((z + 1.f) * (z + 2.f));
        s = z * (z + 1.f) * inverse;
        store(steps.derivative + i, (input < 0.f ? z : broadcast(1.f)) * (z + 2.f) * inverse);
      } else {
        s = z / (z + 2.f);
      }
      store(steps.value + i, log1p_from(s) + maximum(Vec{}, input));
    }
  } else {
    for (int x = 0; x < count; ++x) {
      for (int v = 0; v < kVecs; ++v) {
        const int c = v * kLanes;
        store(steps.value + x * kBlock + c, load(delta.data + x * delta.stride + c) + load(bias + c));
        if (kDerivative) store(steps.derivative + x * kBlock + c, broadcast(1.f));
      }
    }
  }
  for (int x = 0; x < count; ++x) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      const int i = x * kBlock + v * kLanes;
      store(steps.decay + i, exp2(load(steps.value + i) * (load(A + v * kLanes) * kLog2E)));
    }
  }
}

}  // namespace mmspatialmamba::ISA
