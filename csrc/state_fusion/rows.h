// The fusion of states, over padded rows of them.
#pragma once

#include "common/convolve.h"
#include "state_fusion/cpu.h"

namespace mmspatialmamba::ISA {

constexpr int kWindow = 2 * kReach + 1;  // rows that one row of the fusion may read

// A block's part of the fusion's kernels as one, (kTaps, kBlock).
static inline void merge_kernels(const FusionKernels& kernels, int64_t dim, int64_t block, float* target) {
  alignas(64) float part[9 * kBlock];
  memset(target, 0, kTaps * kBlock * sizeof(float));
  for (int d = 0; d < 3; ++d) {
    copy_kernels(kernels.of[d], dim, block, part);
    for (int i = 0; i < 9; ++i) {
      float* sum = target + kElementTaps.of[d][i] * kBlock;
      for (int c = 0; c < kBlock; ++c) sum[c] += kernels.alpha[d] * part[i * kBlock + c];
    }
  }
}

// A line of the fusion's kernel: a dilation's taps at dy, from left to right, the first of them tap number `first`. The
// centre of dilation 3 and of 5 is part of that of dilation 1.
struct Line {
  int dilation, dy, first;
  bool centre;
};

constexpr int kNumLines = 9;
struct Lines {
  Line of[kNumLines];
};

constexpr Lines find_lines() {
  Lines lines{};
  int count = 0;
  for (int tap = 0; tap < kTaps; ++tap) {
    const Tap& now = kTapTable[tap];
    const bool starts = tap == 0 || now.dilation != kTapTable[tap - 1].dilation || now.row != kTapTable[tap - 1].row;
    if (starts) lines.of[count++] = {now.dilation, now.row, tap, false};
    if (now.column == 0) lines.of[count - 1].centre = true;
  }
  return lines;
}

constexpr Lines kLines = find_lines();

static inline void mirror_lines(const float* weights, float* mirrored) {
  for (const Line& line : kLines.of) {
    const int last = line.first + (line.centre ? 2 : 1);
    for (int i = line.first; i <= last; ++i) {
      memcpy(mirrored + (line.first + last - i) * kBlock, weights + i * kBlock, kBlock * sizeof(float));
    }
  }
}

// Where one output row of the fusion meets the kernel's lines; row(r) is the padded row r.
template <class GetRow>
static ALWAYS_INLINE void fusion_meetings(int64_t r, int64_t height, const float* weights, const GetRow& row,
                                          Meeting* meetings) {
  for (int i = 0; i < kNumLines; ++i) {
    const Line& line = kLines.of[i];
    const float* source = row(clamp(r + line.dy, height - 1));
    meetings[i] = {source + kReach * kBlock, weights + line.first * kBlock, line.dilation, line.centre};
  }
}

constexpr int kMostMeetings = 32;

// The transposed fusion: the gradient of row q of the states, from the rows of the gradient g of the fusion, padded
// with zeros. `mirrored` are the weights, each line from right to left; `target` has kBlock floats a pixel.
template <class GetRow>
static inline void transposed_fusion(int64_t q, int64_t height, int64_t width, const float* mirrored, const GetRow& g,
                                     float* target) {
  Meeting meetings[kMostMeetings];
  int count = 0;
  alignas(64) float first[kBlock] = {}, last[kBlock] = {};
  for (const Line& line : kLines.of) {
    const int64_t low = q == 0 ? 0 : q - line.dy;
    const int64_t high = q == height - 1 ? height - 1 : q - line.dy;
    for (int64_t r = larger(low, 0); r <= smaller(high, height - 1); ++r) {
      if (clamp(r + line.dy, height - 1) != q) continue;
      const float* row = g(r) + kReach * kBlock;
      const float* right = mirrored + line.first * kBlock;
      const float* left = right + (line.centre ? 2 : 1) * kBlock;
      meetings[count++] = {row, right, line.dilation, line.centre};
      for (int64_t x = 0; x < smaller(line.dilation, width); ++x) {
        for (int c = 0; c < kBlock; ++c) {
          first[c] += left[c] * row[x * kBlock + c];
          last[c] += right[c] * row[(width - 1 - x) * kBlock + c];
        }
      }
    }
  }
  convolve_row(meetings, count, width,
               [&](int64_t x, const float* totals) { memcpy(target + x * kBlock, totals, kBlock * sizeof(float)); });
  for (int c = 0; c < kBlock; ++c) {
    target[c] += first[c];
    target[(width - 1) * kBlock + c] += last[c];
  }
}

// Adds to `sums`, (kTaps, kBlock), what row r adds to the gradient of the taps: g is its gradient, padded.
template <class GetRow>
static inline void taps_gradient(int64_t r, int64_t height, int64_t width, const float* g, const GetRow& state,
                                 float* sums) {
  g += kReach * kBlock;
  for (const Line& line : kLines.of) {
    const float* source = state(clamp(r + line.dy, height - 1)) + kReach * kBlock;
    float* target = sums + line.first * kBlock;
    switch (line.dilation * 2 + line.centre) {
      case 3: line_gradient<1, true>(g, source, width, target); break;
      case 6: line_gradient<3, false>(g, source, width, target); break;
      case 7: line_gradient<3, true>(g, source, width, target); break;
      case 10: line_gradient<5, false>(g, source, width, target); break;
      case 11: line_gradient<5, true>(g, source, width, target); break;
    }
  }
}

}  // namespace mmspatialmamba::ISA
