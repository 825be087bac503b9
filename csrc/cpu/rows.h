// Rows of kBlock channels, and the fusion of states over them.
#pragma once

#include "bfloat16.h"

namespace mmspatialmamba {
namespace ISA {

constexpr int kVecs = kBlock / kLanes;
constexpr int kReach = 5;               // of the fusion, in pixels
constexpr int kWindow = 2 * kReach + 1; // rows that one row of the fusion may read

static ALWAYS_INLINE int64_t padded(int64_t width) { return (width + 2 * kReach) * kBlock; }
static ALWAYS_INLINE int64_t clamp(int64_t x, int64_t high) { return smaller(larger(x, 0), high); }

struct Half {
  uint16_t bits;
};

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
  for (int64_t c = 0; c < count; ++c) target[c] = from_float<To>(to_float(source[c]));
}

static ALWAYS_INLINE void convert(const BFloat16* source, int64_t count, float* target) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) store(target + c, load(source + c));
  for (; c < count; ++c) target[c] = to_float(source[c]);
}

static ALWAYS_INLINE void convert(const float* source, int64_t count, BFloat16* target) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) store(target + c, load(source + c));
  for (; c < count; ++c) target[c] = from_float<BFloat16>(source[c]);
}

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
    for (int64_t x = 0; x < width; ++x) {
      convert(source + x * map.column, kBlock, target + x * kBlock);
    }
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
    for (int64_t x = 0; x < width; ++x) {
      convert(source + x * kBlock, kBlock, target + x * map.column);
    }
    return;
  }
  for (int c = 0; c < channels; ++c) {
    for (int64_t x = 0; x < width; ++x) {
      target[c * map.channel + x * map.column] = from_float<T>(source[x * kBlock + c]);
    }
  }
}

// Whether all channels of a block lie side by side in a map of this type.
static inline bool holds_block(const Map& map, Type type, int64_t dim, int64_t block) {
  return map.type == type && map.channel == 1 && dim - block * kBlock >= kBlock;
}

// One image and one block of channels of a map, read and written by rows of T. Where the map holds them in that form they
// are used in place, as it must where T is not float; else they pass through `staging`, kBlock floats a pixel. Channels
// that the map does not have are zeros.
template <class T>
class RowsOf {
 public:
  RowsOf(const Map& map, int64_t batch, int64_t block, int64_t dim, int64_t width, float* staging)
      : map_(map),
        origin_(batch * map.batch + block * kBlock * map.channel),
        width_(width),
        channels_(static_cast<int>(smaller(kBlock, dim - block * kBlock))),
        staging_(staging),
        direct_(!kIsFloat || holds_block(map, Type::kFloat, dim, block)) {}

  // A row as kBlock floats a pixel.
  void copy(int64_t row, float* target) const {
    const int64_t offset = origin_ + row * map_.row;
    switch (map_.type) {
      case Type::kFloat: gather(at<float>(offset), map_, channels_, width_, target); break;
      case Type::kBFloat16: gather(at<BFloat16>(offset), map_, channels_, width_, target); break;
      case Type::kHalf: gather(at<Half>(offset), map_, channels_, width_, target); break;
    }
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
    if (direct_) return;
    const int64_t offset = origin_ + row * map_.row;
    switch (map_.type) {
      case Type::kFloat: scatter(staging_, map_, channels_, width_, at<float>(offset)); break;
      case Type::kBFloat16: scatter(staging_, map_, channels_, width_, at<BFloat16>(offset)); break;
      case Type::kHalf: scatter(staging_, map_, channels_, width_, at<Half>(offset)); break;
    }
  }

 private:
  static constexpr bool kIsFloat = sizeof(T) == sizeof(float);

  template <class U>
  U* at(int64_t offset) const { return static_cast<U*>(map_.data) + offset; }
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
  if (kernels.type == Type::kFloat) return copy_kernels(static_cast<const float*>(kernels.data), dim, block, target);
  copy_kernels(static_cast<const BFloat16*>(kernels.data), dim, block, target);
}

// A block's part of the fusion's kernels as one, (kTaps, kBlock).
static inline void merge_kernels(const FusionKernels& kernels, int64_t dim, int64_t block, float* target) {
  alignas(64) float part[9 * kBlock];
  memset(target, 0, kTaps * kBlock * sizeof(float));
  for (int d = 0; d < 3; ++d) {
    copy_kernels(kernels.of[d], dim, block, part);
    for (int i = 0; i < 9; ++i) {
      // The centres are one tap.
      const int tap = d == 0 || i == 4 ? i : 1 + 8 * d + i - (i > 4);
      for (int c = 0; c < kBlock; ++c) target[tap * kBlock + c] += kernels.alpha[d] * part[i * kBlock + c];
    }
  }
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

// A line of the fusion's kernel: a dilation's taps at dy, from left to right, the first of them tap number `first`. The
// centre of dilation 3 and of 5 is part of that of dilation 1.
struct Line {
  int dilation, dy, first;
  bool centre;
};

constexpr int kNumLines = 9;
constexpr Line kLines[kNumLines] = {
    {1, -1, 0, true}, {1, 0, 3, true},   {1, 1, 6, true},  {3, -3, 9, true},  {3, 0, 12, false},
    {3, 3, 14, true}, {5, -5, 17, true}, {5, 0, 20, false}, {5, 5, 22, true},
};

static inline void mirror_lines(const float* weights, float* mirrored) {
  for (const Line& line : kLines) {
    const int last = line.first + (line.centre ? 2 : 1);
    for (int i = line.first; i <= last; ++i) {
      memcpy(mirrored + (line.first + last - i) * kBlock, weights + i * kBlock, kBlock * sizeof(float));
    }
  }
}

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

// Where one output row of the fusion meets the kernel's lines; row(r) is the padded row r.
template <class GetRow>
static ALWAYS_INLINE void fusion_meetings(int64_t r, int64_t height, const float* weights, const GetRow& row,
                                          Meeting* meetings) {
  for (int i = 0; i < kNumLines; ++i) {
    const Line& line = kLines[i];
    const float* source = row(clamp(r + line.dy, height - 1));
    meetings[i] = {source + kReach * kBlock, weights + line.first * kBlock, line.dilation, line.centre};
  }
}

constexpr int kMostMeetings = 32;

// The transposed fusion: the gradient of row q of the states, from the rows of the gradient g of the fusion, padded with
// zeros. `mirrored` are the weights, each line from right to left; `target` has kBlock floats a pixel.
template <class GetRow>
static inline void transposed_fusion(int64_t q, int64_t height, int64_t width, const float* mirrored, const GetRow& g,
                                     float* target) {
  Meeting meetings[kMostMeetings];
  int count = 0;
  alignas(64) float first[kBlock] = {}, last[kBlock] = {};
  for (const Line& line : kLines) {
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
  convolve_row(meetings, count, width, [&](int64_t x, const float* totals) {
    memcpy(target + x * kBlock, totals, kBlock * sizeof(float));
  });
  for (int c = 0; c < kBlock; ++c) {
    target[c] += first[c];
    target[(width - 1) * kBlock + c] += last[c];
  }
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

// Adds to `sums`, (kTaps, kBlock), what row r adds to the gradient of the taps: g is its gradient, padded.
template <class GetRow>
static inline void taps_gradient(int64_t r, int64_t height, int64_t width, const float* g, const GetRow& state,
                                 float* sums) {
  g += kReach * kBlock;
  for (const Line& line : kLines) {
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

}  // namespace ISA
}  // namespace mmspatialmamba
