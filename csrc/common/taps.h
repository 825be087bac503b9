// The taps of the fusion's three 3x3 kernels, which share their centre: one table for the CPU, CUDA and the tests.
#pragma once

namespace mmspatialmamba {

constexpr int kTaps = 25;
constexpr int kReach = 5;  // of the fusion, in pixels
constexpr int kDilations[] = {1, 3, 5};

// Offsets in pixels from the pixel that a tap contributes to.
struct Tap {
  int dilation, row, column;
};

// clang-format off
constexpr Tap kTapTable[kTaps] = {
    {1, -1, -1}, {1, -1, 0}, {1, -1, 1}, {1, 0, -1}, {1, 0, 0}, {1, 0, 1}, {1, 1, -1}, {1, 1, 0}, {1, 1, 1},
    {3, -3, -3}, {3, -3, 0}, {3, -3, 3}, {3, 0, -3}, {3, 0, 3}, {3, 3, -3}, {3, 3, 0}, {3, 3, 3},
    {5, -5, -5}, {5, -5, 0}, {5, -5, 5}, {5, 0, -5}, {5, 0, 5}, {5, 5, -5}, {5, 5, 0}, {5, 5, 5},
};
// clang-format on

// The tap at an offset, or -1.
constexpr int find_tap(int row, int column) {
  for (int tap = 0; tap < kTaps; ++tap) {
    if (kTapTable[tap].row == row && kTapTable[tap].column == column) return tap;
  }
  return -1;
}

constexpr int kCentre = find_tap(0, 0);

// The taps of the kernels' elements, by kernel and element.
struct ElementTaps {
  int of[3][9];
};

constexpr ElementTaps find_element_taps() {
  ElementTaps taps{};
  for (int k = 0; k < 3; ++k) {
    for (int i = 0; i < 9; ++i) taps.of[k][i] = find_tap(kDilations[k] * (i / 3 - 1), kDilations[k] * (i % 3 - 1));
  }
  return taps;
}

constexpr ElementTaps kElementTaps = find_element_taps();

}  // namespace mmspatialmamba
