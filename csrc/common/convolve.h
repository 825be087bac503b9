// Depthwise convolutions of padded rows, by the lines of their kernels, and the gradients of the kernels.
#pragma once

#include "common/rows.h"

namespace mmspatialmamba::ISA {

// A padded row, at the pixel before which kReach pixels of padding stand, and the line of the kernel that meets it.
struct Meeting {
  const float* row;
  const float* weights;  // of the line's taps, kBlock floats each
  int dilation;
  bool centre;
};

template <int kPixels, int kDilation, bool kCentre, int kSource>
static ALWAYS_INLINE void meet_from(const float* pixel, Vec left, Vec middle, Vec right, Vec* total) {
  if constexpr (kSource < kPixels + kDilation) {
    constexpr bool kUsed = kSource >= 0 && kSource < kPixels;
    constexpr bool kLeft = kSource + kDilation < kPixels;
    constexpr bool kRight = kSource - kDilation >= 0;
    if constexpr (kLeft || kRight || (kCentre && kUsed)) {
      const Vec value = in_register(load(pixel + kSource * kBlock));
      if constexpr (kLeft) total[kSource + kDilation] += left * value;
      if constexpr (kCentre && kUsed) total[kSource] += middle * value;
      if constexpr (kRight) total[kSource - kDilation] += right * value;
    }
    meet_from<kPixels, kDilation, kCentre, kSource + 1>(pixel, left, middle, right, total);
  }
}

// Adds what a line of the kernel contributes to kPixels pixels; each of the row's pixels is loaded once.
template <int kPixels, int kDilation, bool kCentre>
static ALWAYS_INLINE void meet(const float* pixel, const float* weights, Vec* total) {
  const Vec left = load(weights), right = load(weights + (kCentre ? 2 : 1) * kBlock);
  const Vec middle = kCentre ? load(weights + kBlock) : Vec{};
  meet_from<kPixels, kDilation, kCentre, -kDilation>(pixel, left, middle, right, total);
}

// The sums go to `finish` when all channels of a few pixels are done, x being the first: a map's pixels may lie so far
// apart that a cache would drop them between one vector of channels and the next.
template <int kPixels, class Finish>
static ALWAYS_INLINE void convolve_pixels(const Meeting* meetings, int count, int64_t x, const Finish& finish) {
  alignas(64) float totals[kPixels * kBlock];
  for (int v = 0; v < kVecs; ++v) {
    Vec total[kPixels] = {};
    for (int i = 0; i < count; ++i) {
      const float* pixel = meetings[i].row + x * kBlock + v * kLanes;
      const float* weights = meetings[i].weights + v * kLanes;
      switch (meetings[i].dilation * 2 + meetings[i].centre) {
        case 3: meet<kPixels, 1, true>(pixel, weights, total); break;
        case 6: meet<kPixels, 3, false>(pixel, weights, total); break;
        case 7: meet<kPixels, 3, true>(pixel, weights, total); break;
        case 10: meet<kPixels, 5, false>(pixel, weights, total); break;
        case 11: meet<kPixels, 5, true>(pixel, weights, total); break;
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kPixels; ++i) store(totals + i * kBlock + v * kLanes, total[i]);
  }
  for (int i = 0; i < kPixels; ++i) finish(x + i, totals + i * kBlock);
}

// Calls finish(x, sums of the kBlock channels of pixel x) for each pixel.
template <class Finish>
static ALWAYS_INLINE void convolve_row(const Meeting* meetings, int count, int64_t width, const Finish& finish) {
  int64_t x = 0;
  for (; x + 8 <= width; x += 8) convolve_pixels<8>(meetings, count, x, finish);
  if (x + 4 <= width) {
    convolve_pixels<4>(meetings, count, x, finish);
    x += 4;
  }
  for (; x < width; ++x) convolve_pixels<1>(meetings, count, x, finish);
}

template <int kDilation, bool kCentre>
static void line_gradient(const float* g, const float* source, int64_t width, float* sums) {
  constexpr int kCount = kCentre ? 3 : 2;
  constexpr int kFirst = -kDilation * kBlock, kStep = (kCentre ? 1 : 2) * kDilation * kBlock;
  for (int v = 0; v < kVecs; v += 2) {
    Vec total[2][kCount] = {};
    for (int64_t x = 0; x < width; ++x) {
#pragma GCC unroll 2
      for (int w = 0; w < 2; ++w) {
        const int64_t offset = x * kBlock + (v + w) * kLanes;
        const Vec grad = load(g + offset);
#pragma GCC unroll 3
        for (int i = 0; i < kCount; ++i) total[w][i] += grad * load(source + offset + kFirst + i * kStep);
      }
    }
    for (int w = 0; w < 2; ++w) {
      for (int i = 0; i < kCount; ++i) {
        float* sum = sums + i * kBlock + (v + w) * kLanes;
        store(sum, load(sum) + total[w][i]);
      }
    }
  }
}

}  // namespace mmspatialmamba::ISA
