// Rows of kBlock channels of a map, as floats.
#pragma once

#include "common/taps.h"
#include "common/types.h"
#include "common/vec.h"

namespace mmspatialmamba::ISA {

constexpr int kVecs = kBlock / kLanes;

// Rows are padded with kReach pixels on either side.
static ALWAYS_INLINE int64_t padded(int64_t width) { return (width + 2 * kReach) * kBlock; }
static ALWAYS_INLINE int64_t clamp(int64_t x, int64_t high) { return smaller(larger(x, 0), high); }

// Pixel x's channels start at data + x * stride.
template <class T>
struct RowOf {
  T* data;
  int64_t stride;

  // The row from pixel x on.
  ALWAYS_INLINE RowOf at(int64_t x) const { return {data + x * stride, stride}; }
};

using Row = RowOf<float>;

template <class T>
static void gather(const T* source, const Map& map, int channels, int64_t width, float* target) {
  if (map.channel == 1 && channels == kBlock) {
    for (int64_t x = 0; x < width; ++x) convert(source + x * map.column, kBlock, target + x * kBlock);
    return;
  }
  if (channels < kBlock) memset(target, 0, width * kBlock * sizeof(float));
  for (int c = 0; c < channels; ++c) {
    for (int64_t x = 0; x < width; ++x) target[x * kBlock + c] = to_float(source[c * map.channel + x * map.column]);
  }
}

template <class T>
static void scatter(const float* source, const Map& map, int channels, int64_t width, T* target) {
  if (map.channel == 1 && channels == kBlock) {
    for (int64_t x = 0; x < width; ++x) convert(source + x * kBlock, kBlock, target + x * map.column);
    return;
  }
  for (int c = 0; c < channels; ++c) {
    for (int64_t x = 0; x < width; ++x) put(target + c * map.channel + x * map.column, source[x * kBlock + c]);
  }
}

// Whether all channels of a block lie side by side in a map of this type.
static inline bool holds_block(const Map& map, DType dtype, int64_t dim, int64_t block) {
  return map.dtype == dtype && map.channel == 1 && dim - block * kBlock >= kBlock;
}

// One image and one block of channels of a map, read and written by rows of T. Where the map holds them in that form
// they are used in place, as it must where T is not float; else they pass through `staging`, kBlock floats a pixel.
// Channels that the map does not have are zeros.
template <class T>
class RowsOf {
 public:
  RowsOf(const Map& map, int64_t batch, int64_t block, int64_t dim, int64_t width, float* staging)
      : map_(map), origin_(batch * map.batch + block * kBlock * map.channel), width_(width),
        channels_(static_cast<int>(smaller(kBlock, dim - block * kBlock))), staging_(staging),
        direct_(!kIsFloat || holds_block(map, DType::kFloat32, dim, block)) {}

  // A row as kBlock floats a pixel.
  void copy(int64_t row, float* target) const {
    by_dtype(row, [&](const auto* source) { gather(source, map_, channels_, width_, target); });
  }

  RowOf<T> read(int64_t row) const {
    if constexpr (kIsFloat) {
      if (!direct_) {
        copy(row, staging_);
        return {staging_, kBlock};
      }
    }
    return place(row);
  }

  // Where to write a row; `written` must follow.
  RowOf<T> open(int64_t row) const {
    if constexpr (kIsFloat) {
      if (!direct_) return {staging_, kBlock};
    }
    return place(row);
  }

  void written(int64_t row) const {
    if (!direct_) by_dtype(row, [&](auto* target) { scatter(staging_, map_, channels_, width_, target); });
  }

 private:
  static constexpr bool kIsFloat = sizeof(T) == sizeof(float);

  // Calls run(pointer to the row, of the map's type).
  template <class Run>
  void by_dtype(int64_t row, const Run& run) const {
    const int64_t offset = origin_ + row * map_.row;
    switch (map_.dtype) {
      case DType::kFloat32: return run(at<float>(offset));
      case DType::kBFloat16: return run(at<BFloat16>(offset));
      case DType::kFloat16: return run(at<Half>(offset));
    }
  }

  template <class U>
  U* at(int64_t offset) const {
    return static_cast<U*>(map_.data) + offset;
  }
  RowOf<T> place(int64_t row) const { return {at<T>(origin_ + row * map_.row), map_.column}; }

  Map map_;
  int64_t origin_, width_;
  int channels_;
  float* staging_;
  bool direct_;
};

using Rows = RowsOf<float>;

// A block's part of a parameter, one float for each channel; zeros where there is none.
static inline void copy_block(const float* source, int64_t dim, int64_t block, float* target) {
  const int64_t first = block * kBlock;
  for (int c = 0; c < kBlock; ++c) target[c] = source && first + c < dim ? source[first + c] : 0.f;
}

template <class T>
static inline void copy_kernels(const T* source, int64_t dim, int64_t block, float* target) {
  const int64_t first = block * kBlock;
  for (int c = 0; c < kBlock; ++c) {
    for (int i = 0; i < 9; ++i) target[i * kBlock + c] = first + c < dim ? to_float(source[(first + c) * 9 + i]) : 0.f;
  }
}

// A block's part of 3x3 kernels, into (9, kBlock).
static inline void copy_kernels(const Kernels3x3& kernels, int64_t dim, int64_t block, float* target) {
  if (kernels.dtype == DType::kFloat32)
    return copy_kernels(static_cast<const float*>(kernels.data), dim, block, target);
  copy_kernels(static_cast<const BFloat16*>(kernels.data), dim, block, target);
}

static inline void write_block(const float* source, int64_t dim, int64_t block, float* target) {
  const int64_t first = block * kBlock;
  for (int c = 0; c < kBlock && first + c < dim; ++c) target[first + c] = source[c];
}

// Sums are kept for a row at a time and then added up, which rounds less than one long sum.
static ALWAYS_INLINE void add(const Vec* values, float* sums) {
  for (int v = 0; v < kVecs; ++v) store(sums + v * kLanes, load(sums + v * kLanes) + values[v]);
}

static inline void pad_with_edges(float* row, int64_t width) {
  for (int i = 0; i < kReach; ++i) {
    memcpy(row + i * kBlock, row + kReach * kBlock, kBlock * sizeof(float));
    memcpy(row + (kReach + width + i) * kBlock, row + (kReach + width - 1) * kBlock, kBlock * sizeof(float));
  }
}

static inline void pad_with_zeros(float* row, int64_t width) {
  memset(row, 0, kReach * kBlock * sizeof(float));
  memset(row + (kReach + width) * kBlock, 0, kReach * kBlock * sizeof(float));
}

}  // namespace mmspatialmamba::ISA
