// What matrix products share: the tile that lies in registers, some rows, two vectors wide, and how weights are packed.
#pragma once

#include "vec.h"

namespace mmspatialmamba {
namespace ISA {

// Of floats, and of bfloat16, whose weights take more registers where there are no instructions for them.
#if defined(__AVX512F__)
constexpr int64_t kTileRows = 12, kTileRowsBFloat16 = 12;
#else
constexpr int64_t kTileRows = 6, kTileRowsBFloat16 = 4;
#endif
constexpr int64_t kPanel = 2 * kLanes;

// Asks for kCount channels that lie 256 bytes behind channel k in a panel's rows of weights, or for the next panel's
// first: rows are too short for the processor to see them as streams.
template <int kCount, class T>
static ALWAYS_INLINE void prefetch_weights(const T* weight, int64_t row, int64_t in, int64_t k) {
  k += 256 / sizeof(T);
  const T* ahead = k < in ? weight + k : weight + kPanel * row + k - in;
  for (int64_t i = 0; i < kPanel; ++i) {
    for (int c = 0; c < kCount; c += 64 / sizeof(T)) __builtin_prefetch(ahead + i * row + c);
  }
}

// A square of kLanes rows to one of rows kPanel elements of 32 bits apart.
static ALWAYS_INLINE void transpose(Vec* square, float* target) {
#if defined(__clang__)
  for (int i = 0; i < kLanes; ++i) {
    for (int c = 0; c < kLanes; ++c) target[i * kPanel + c] = square[c][i];
  }
#else
  // Each step swaps blocks of `half` elements between the rows of a pair that are `half` apart.
#pragma GCC unroll 4
  for (int half = 1; half < kLanes; half *= 2) {
    IntVec low, high;
#pragma GCC unroll 16
    for (int c = 0; c < kLanes; ++c) {
      low[c] = c & half ? kLanes + c - half : c;
      high[c] = c & half ? kLanes + c : c + half;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & half) continue;
      const Vec a = square[i], b = square[i + half];
      square[i] = __builtin_shuffle(a, b, low);
      square[i + half] = __builtin_shuffle(a, b, high);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) store(target + i * kPanel, square[i]);
#endif
}

}  // namespace ISA
}  // namespace mmspatialmamba
