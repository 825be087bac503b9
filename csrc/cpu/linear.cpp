#include "linear.h"

#include "kernels.h"
#include "normal.h"

namespace mmspatialmamba {
namespace ISA {

namespace {

using Args = LinearArgs<float>;

// Input channels at a time: that many of a panel of weights stay in the first cache beside those of a tile's rows.
#if defined(__AVX512F__)
constexpr int64_t kChunk = 256;
#else
constexpr int64_t kChunk = 128;
#endif

// Where a panel of weights is packed, as (channels of the chunk, kPanel).
ALWAYS_INLINE int64_t packed_at(int64_t out, int64_t first, int64_t size, int64_t panel) {
  return first * ((out + kPanel - 1) / kPanel * kPanel) + panel * size * kPanel;
}

template <class Function>
ALWAYS_INLINE void apply(const Args& args, int64_t row, int64_t rows, int64_t column, int64_t width,
                         const Function& function) {
  for (float* y = args.y + row * args.y_row + column; rows > 0; --rows, y += args.y_row) {
    int64_t c = 0;
    for (; c + kLanes <= width; c += kLanes) store(y + c, function(load(y + c)));
    if (c == width) continue;
    Vec value{};
    memcpy(&value, y + c, (width - c) * sizeof(float));
    value = function(value);
    memcpy(y + c, &value, (width - c) * sizeof(float));
  }
}

// The activation of a panel of some rows of y.
__attribute__((noinline)) void activate(const Args& args, int64_t row, int64_t rows, int64_t column,
                                        int64_t width) {
  if (args.activation == Activation::kGelu) {
    apply(args, row, rows, column, width, [](Vec x) { return gelu(x); });
  } else {
    apply(args, row, rows, column, width, [](Vec x) { return maximum(Vec{}, x); });
  }
}

// Some channels of some factors.
struct Chunk {
  int factor;
  int64_t first, size;
};

// Adds the products of a chunk to a tile of y.
template <int kRows>
ALWAYS_INLINE void tile(const Args& args, int64_t row, int64_t panel, const Chunk& chunk) {
  const Factors<float>& factors = args.factors[chunk.factor];
  const bool starts = chunk.factor == 0 && chunk.first == 0;
  const bool ends = chunk.factor + 1 == args.count && chunk.first + chunk.size == args.in;
  const int64_t column = panel * kPanel, width = smaller(kPanel, args.out - column), x_row = args.x_row;
  Vec total[kRows][2];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) total[i][0] = total[i][1] = Vec{};
  const float* x = factors.x + row * x_row + chunk.first;
  const float* weight = factors.packed + packed_at(args.out, chunk.first, chunk.size, panel);
#pragma GCC unroll 4
  for (int64_t k = 0; k < chunk.size; ++k, weight += kPanel) {
    const Vec left = load(weight), right = load(weight + kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const Vec value = broadcast(x[i * x_row + k]);
      total[i][0] += value * left;
      total[i][1] += value * right;
    }
  }

  // What the products are added to: the residual, then what the channels before have left in y.
  const float* base = starts ? args.residual : args.y;
  const int64_t base_row = starts ? args.residual_row : args.y_row;
  alignas(64) float spare[kRows * kPanel];
  float* y = args.y + row * args.y_row + column;
  if (base) base += row * base_row + column;
  if (starts && args.bias) {
    const Vec low = load(args.bias + column), high = load(args.bias + column + kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      total[i][0] += low;
      total[i][1] += high;
    }
  }
  if (width == kPanel) {
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      if (base) {
        total[i][0] += load(base + i * base_row);
        total[i][1] += load(base + i * base_row + kLanes);
      }
      store(y + i * args.y_row, total[i][0]);
      store(y + i * args.y_row + kLanes, total[i][1]);
    }
  } else {
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      store(spare + i * kPanel, total[i][0]);
      store(spare + i * kPanel + kLanes, total[i][1]);
    }
    for (int i = 0; i < kRows; ++i) {
      for (int64_t c = 0; c < width; ++c) {
        y[i * args.y_row + c] = spare[i * kPanel + c] + (base ? base[i * base_row + c] : 0.f);
      }
    }
  }
  if (ends && args.activation != Activation::kNone) activate(args, row, kRows, column, width);
}

// A tile of at most kRows rows.
template <int kRows>
ALWAYS_INLINE void last_tile(const Args& args, int64_t row, int64_t rows, int64_t panel, const Chunk& chunk) {
  if (rows == kRows) return tile<kRows>(args, row, panel, chunk);
  if constexpr (kRows > 1) last_tile<kRows - 1>(args, row, rows, panel, chunk);
}

// kLanes rows of a matrix, of kLanes floats each, as columns of a panel.
ALWAYS_INLINE void pack_square(const float* source, int64_t row, const float* scale, float* target) {
  Vec square[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    square[i] = load(source + i * row);
    if (scale) square[i] *= scale[i];
  }
  transpose(square, target);
}

// Groups of `Size` columns of a matrix one after the other, with zeros in the last.
template <int64_t Size>
ALWAYS_INLINE void gather(const float* source, int64_t row, int64_t rows, int64_t columns, float* target) {
  for (int64_t k = 0; k < rows; ++k, source += row, target += Size) {
    int64_t c = 0;
    for (; c + Size <= columns; c += Size) memcpy(target + c * rows, source + c, Size * sizeof(float));
    if (c == columns) continue;
    memset(target + c * rows, 0, Size * sizeof(float));
    memcpy(target + c * rows, source + c, (columns - c) * sizeof(float));
  }
}

}  // namespace

void pack_linear(const WeightArgs& weight, float* packed, int64_t panel) {
  const int64_t out_step = weight.out_step, in_step = weight.in_step;
  const int64_t column = panel * kPanel, width = smaller(kPanel, weight.out - column);
  const float* scale = weight.scale ? weight.scale + column : nullptr;
  for (int64_t first = 0; first < weight.in; first += kChunk) {
    const int64_t size = smaller(kChunk, weight.in - first);
    const float* source = static_cast<const float*>(weight.data) + column * out_step + first * in_step;
    float* target = packed + packed_at(weight.out, first, size, panel);
    if (width < kPanel) memset(target, 0, size * kPanel * sizeof(float));
    int64_t k = 0;
    for (; k + kLanes <= size && width == kPanel && in_step == 1; k += kLanes) {
      prefetch_weights<kLanes>(source - first, out_step, weight.in, first + k);
      pack_square(source + k, out_step, scale, target + k * kPanel);
      pack_square(source + kLanes * out_step + k, out_step, scale ? scale + kLanes : nullptr,
                  target + k * kPanel + kLanes);
    }
    for (; k < size && width == kPanel && out_step == 1 && !scale; ++k) {
      store(target + k * kPanel, load(source + k * in_step));
      store(target + k * kPanel + kLanes, load(source + k * in_step + kLanes));
    }
    for (; k < size; ++k) {
      for (int64_t c = 0; c < width; ++c) {
        target[k * kPanel + c] = source[c * out_step + k * in_step] * (scale ? scale[c] : 1.f);
      }
    }
  }
}

void linear(const Args& args) {
  const int64_t panels = (args.out + kPanel - 1) / kPanel;
  for (int factor = 0; factor < args.count; ++factor) {
    for (int64_t first = 0; first < args.in; first += kChunk) {
      const Chunk chunk{factor, first, smaller(kChunk, args.in - first)};
      for (int64_t panel = 0; panel < panels; ++panel) {
        int64_t row = 0;
        for (; row + kTileRows <= args.rows; row += kTileRows) tile<kTileRows>(args, row, panel, chunk);
        last_tile<kTileRows - 1>(args, row, args.rows - row, panel, chunk);
      }
    }
  }
}

void outer(const OuterArgs& args, float* scratch) {
  const int64_t tiles = (args.out + kTileRows - 1) / kTileRows, panels = (args.in + kPanel - 1) / kPanel;
  float *lefts = scratch, *rights = scratch + tiles * kTileRows * args.rows;
  gather<kTileRows>(args.left, args.left_row, args.rows, args.out, lefts);
  gather<kPanel>(args.right, args.right_row, args.rows, args.in, rights);
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t t = 0; t < tiles; ++t) {
      const float *left = lefts + t * kTileRows * args.rows, *right = rights + p * kPanel * args.rows;
      Vec total[kTileRows][2];
#pragma GCC unroll 12
      for (int i = 0; i < kTileRows; ++i) total[i][0] = total[i][1] = Vec{};
#pragma GCC unroll 4
      for (int64_t k = 0; k < args.rows; ++k, left += kTileRows, right += kPanel) {
        const Vec low = load(right), high = load(right + kLanes);
#pragma GCC unroll 12
        for (int i = 0; i < kTileRows; ++i) {
          const Vec value = broadcast(left[i]);
          total[i][0] += value * low;
          total[i][1] += value * high;
        }
      }
      float* y = args.y + t * kTileRows * args.y_row + p * kPanel;
#pragma GCC unroll 12
      for (int i = 0; i < kTileRows; ++i, y += args.y_row) {
        store(y, load(y) + total[i][0]);
        store(y + kLanes, load(y + kLanes) + total[i][1]);
      }
    }
  }
}

}  // namespace ISA
}  // namespace mmspatialmamba
