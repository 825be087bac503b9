#include "bfloat16.h"

namespace mmspatialmamba {
namespace ISA {

namespace {

constexpr int kTapCount = 9;

ALWAYS_INLINE Vec positive(Vec x) { return maximum(Vec{}, x); }

// x where `sign` is positive or NaN, as PyTorch's ReLU passes gradients on, else 0.
ALWAYS_INLINE Vec where_positive(Vec sign, Vec x) { return sign <= 0.f ? Vec{} : x; }

// What a square of four pixels of the input, or what of it is there, gets and gives. The output's gradient is `grad` at
// the square's own output pixel, `below` at the one below it; after either comes that to its right.
template <bool kRight, bool kLower>
ALWAYS_INLINE void square_backward(const DownsamplingArgs& args, const float* x, int64_t x_row, const float* grad,
                                   const float* below, int64_t grad_pixel, float* grad_x, float* sums) {
  for (int64_t c = 0; c < args.dim; c += kLanes) {
    const Vec here = load(grad + c), right = load(grad + grad_pixel + c);
    const Vec under = load(below + c), across = load(below + grad_pixel + c);
    const auto weight = [&](int tap) { return load(args.weights + tap * args.tap + c); };
    const auto give = [&](int tap, Vec value) {
      float* sum = sums + tap * args.dim + c;
      store(sum, load(sum) + value);
    };
    const auto pass = [&](int64_t offset, Vec value, Vec total) {
      store(grad_x + offset + c, where_positive(value, total));
    };
    give(kTapCount, here);
    {
      const Vec value = load(x + c), active = positive(value);
      give(4, here * active);
      pass(0, value, here * weight(4));
    }
    if constexpr (kRight) {
      const Vec value = load(x + args.x_pixel + c), active = positive(value);
      give(5, here * active);
      give(3, right * active);
      pass(args.x_pixel, value, here * weight(5) + right * weight(3));
    }
    if constexpr (kLower) {
      const Vec value = load(x + x_row + c), active = positive(value);
      give(7, here * active);
      give(1, under * active);
      pass(x_row, value, here * weight(7) + under * weight(1));
    }
    if constexpr (kRight && kLower) {
      const Vec value = load(x + x_row + args.x_pixel + c), active = positive(value);
      give(8, here * active);
      give(6, right * active);
      give(2, under * active);
      give(0, across * active);
      pass(x_row + args.x_pixel, value,
           here * weight(8) + right * weight(6) + under * weight(2) + across * weight(0));
    }
  }
}

template <class T>
ALWAYS_INLINE void convolve(const DownsamplingArgs& args, const T* const* rows, T* y) {
  const int64_t width = args.width, pixel = args.x_pixel;
  for (int64_t x = 0; 2 * x < width; ++x, y += args.y_pixel) {
    const int first = x == 0 ? 1 : 0, last = 2 * x + 1 < width ? 3 : 2;
    const auto sum = [&](int64_t c, int from, int to) {
      Vec total = load(args.bias + c);
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        if (!rows[i]) continue;
        const T* source = rows[i] + (2 * x - 1) * pixel + c;
#pragma GCC unroll 3
        for (int j = from; j < to; ++j) {
          total += load(args.weights + (3 * i + j) * args.tap + c) * positive(load(source + j * pixel));
        }
      }
      store(y + c, positive(total));
    };
    if (first == 0 && last == 3) {
      for (int64_t c = 0; c < args.dim; c += kLanes) sum(c, 0, 3);
    } else {
      for (int64_t c = 0; c < args.dim; c += kLanes) sum(c, first, last);
    }
  }
}

}  // namespace

void downsampling_conv(const DownsamplingArgs& args, const float* const* rows, float* y) { convolve(args, rows, y); }

void downsampling_conv_bfloat16(const DownsamplingArgs& args, const BFloat16* const* rows, BFloat16* y) {
  convolve(args, rows, y);
}

void downsampling_conv_backward(const DownsamplingArgs& args, const float* x, int64_t x_row, const float* y,
                                const float* grad, int64_t y_row, int64_t height, int64_t first, int64_t last,
                                float* grad_x, float* sums, float* scratch) {
  const int64_t dim = args.dim, width = args.width, out_width = (width + 1) / 2, out_height = (height + 1) / 2;
  const int64_t line = (out_width + 1) * dim;
  float *here = scratch, *below = scratch + line, *row_sums = scratch + 2 * line;
  // The gradient before the last ReLU of an output row, and of a pixel more, where it is 0.
  const auto enter = [&](int64_t r, float* target) {
    memset(target + out_width * dim, 0, dim * sizeof(float));
    if (r >= out_height) memset(target, 0, out_width * dim * sizeof(float));
    for (int64_t p = 0; p < out_width && r < out_height; ++p) {
      const int64_t offset = r * y_row + p * args.y_pixel;
      for (int64_t c = 0; c < dim; c += kLanes) {
        store(target + p * dim + c, where_positive(load(y + offset + c), load(grad + offset + c)));
      }
    }
  };
  memset(sums, 0, (kTapCount + 1) * dim * sizeof(float));
  enter(first, here);
  for (int64_t r = first; r < last; ++r) {
    enter(r + 1, below);
    memset(row_sums, 0, (kTapCount + 1) * dim * sizeof(float));
    const bool lower = 2 * r + 1 < height;
    for (int64_t p = 0; p < out_width; ++p) {
      const int64_t offset = 2 * (r * x_row + p * args.x_pixel);
      const auto run = [&](auto square) {
        square(args, x + offset, x_row, here + p * dim, below + p * dim, dim, grad_x + offset, row_sums);
      };
      if (2 * p + 1 < width) {
        lower ? run(square_backward<true, true>) : run(square_backward<true, false>);
      } else {
        lower ? run(square_backward<false, true>) : run(square_backward<false, false>);
      }
    }
    for (int64_t c = 0; c < (kTapCount + 1) * dim; c += kLanes) store(sums + c, load(sums + c) + load(row_sums + c));
    float* spare = here;
    here = below;
    below = spare;
  }
}

}  // namespace ISA
}  // namespace mmspatialmamba
