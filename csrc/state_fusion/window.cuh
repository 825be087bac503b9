// The taps of the fusion over a window of 11 rows in shared memory, in float32: (row % 11, column, channel).
#pragma once

#include <utility>

#include "common/map.cuh"

namespace mmspatialmamba::cuda {

constexpr int kRing = 2 * kReach + 1;

// A row has `margin` columns on either side of the tile's own.
__host__ __device__ __forceinline__ int ring_row(const Plan& plan, int margin) {
  return (plan.tile + 2 * margin) * kChannels;
}

// A thread whose columns go beyond the tile's reads a little too far, for sums that nobody uses.
__host__ __device__ __forceinline__ int ring_floats(const Plan& plan, int margin) {
  return kRing * ring_row(plan, margin) + kColumns * kChannels;
}

__device__ __forceinline__ void clear(float* ring, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) ring[i] = 0.f;
}

// A thread's columns of a row of states, with the replicated ones beyond the map's borders.
__device__ __forceinline__ void put_states(float* row, const float (&h)[kColumns], const Block& b, int width) {
  const int begin = b.column0 - kReach, end = b.column1 + kReach;
  row += b.channel;
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    const int column = b.first + b.segment * kColumns + j;
    if (column < b.last && begin <= column && column < end) row[(column - begin) * kChannels] = h[j];
  }
  if (b.segment == 0 && b.column0 == 0) {
#pragma unroll
    for (int i = 0; i < kReach; ++i) row[i * kChannels] = h[0];
  }
  const int border = width - 1 - b.first - b.segment * kColumns;
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    if (j == border) {
#pragma unroll 1
      for (int i = width; i < end; ++i) row[(i - begin) * kChannels] = h[j];
    }
  }
}

// The taps of a row of the window, from left to right.
struct TapRow {
  int offset;  // of the row, from the centre
  int count;
  int tap[7], column[7];
};

// Row k of those that have taps, from above.
constexpr int kTapRows = 7;
constexpr TapRow find_tap_row(int k) {
  TapRow found{-kReach, 0, {}, {}};
  for (;; ++found.offset, found.count = 0) {
    for (int column = -kReach; column <= kReach; ++column) {
      const int tap = find_tap(found.offset, column);
      if (tap < 0) continue;
      found.tap[found.count] = tap;
      found.column[found.count++] = column;
    }
    if (found.count > 0 && k-- == 0) return found;
  }
}

// Tap I of row K; kMirrored: the tap seen from the other side. Device code can read no table of the host's, but numbers
// from it.
template <int K, bool kMirrored = false, int I = 0>
struct RowTap {
  static constexpr TapRow kRow = find_tap_row(K);
  static constexpr int kOffset = kRow.offset, kCount = kRow.count, kWidest = -kRow.column[0];
  static constexpr int kColumn = kRow.column[I], kTap = kMirrored ? find_tap(-kOffset, -kColumn) : kRow.tap[I];
};

template <int K>
using TapsOfRow = std::make_integer_sequence<int, RowTap<K>::kCount>;

// Calls visit(tap, j, value) for the taps of row K and the thread's columns j. `row` points at the first of these
// columns.
template <int K, bool kMirrored, class Visit, int... I>
__device__ __forceinline__ void visit_row(const float* row, Visit visit, std::integer_sequence<int, I...>) {
  constexpr int reach = RowTap<K>::kWidest;
  float values[kColumns + 2 * reach];
#pragma unroll
  for (int i = 0; i < kColumns + 2 * reach; ++i) values[i] = row[(i - reach) * kChannels];
  const auto visit_tap = [&](int tap, int column) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) visit(tap, j, values[j + column + reach]);
  };
  (visit_tap(RowTap<K, kMirrored, I>::kTap, RowTap<K, kMirrored, I>::kColumn), ...);
}

// Visits the rows that row `q` of the fusion reads, from row K on, replicated beyond the borders. The loop, of one
// turn, keeps the compiler from loading the values of all seven rows ahead, for which there are not enough registers.
template <int K = 0, class Visit>
__device__ __forceinline__ void visit_clamped(const float* ring, int row_size, int q, int height, Visit visit) {
  const int row = min(max(q + RowTap<K>::kOffset, 0), height - 1);
  for (int turn = 0; turn < min(height, 1); ++turn)
    visit_row<K, false>(ring + row % kRing * row_size, visit, TapsOfRow<K>());
  if constexpr (K + 1 < kTapRows) visit_clamped<K + 1>(ring, row_size, q, height, visit);
}

// The rows that reach row `q` when the fusion is transposed; what would land beyond a border lands on it, so there are
// several of a kind at the borders, and nowhere else.
template <int K = 0, class Visit>
__device__ __forceinline__ void visit_folded(const float* ring, int row_size, int q, int height, Visit visit) {
  const int row = q + RowTap<K>::kOffset;
  const int begin = q == 0 ? 0 : max(row, 0);
  const int end = q == height - 1 ? height - 1 : min(row, height - 1);
#pragma unroll 1
  for (int i = begin; i <= end; ++i) visit_row<K, true>(ring + i % kRing * row_size, visit, TapsOfRow<K>());
  if constexpr (K + 1 < kTapRows) visit_folded<K + 1>(ring, row_size, q, height, visit);
}

}  // namespace mmspatialmamba::cuda
