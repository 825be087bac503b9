#include "kernels.h"
#include "vec.h"

namespace mmspatialmamba {
namespace ISA {

namespace {

ALWAYS_INLINE Vec positive(Vec x) { return maximum(Vec{}, x); }

}  // namespace

void downsampling_conv(const DownsamplingArgs& args, const float* const* rows, float* y) {
  const int64_t width = args.width, pixel = args.x_pixel, out_width = (width + 1) / 2;
  for (int64_t c = 0; c < args.dim; c += kLanes) {
    Vec weights[9];
#pragma GCC unroll 9
    for (int i = 0; i < 9; ++i) weights[i] = load(args.weights + i * args.tap + c);
    const Vec bias = load(args.bias + c);
    const auto sum = [&](int64_t x, int first, int last) {
      Vec total = bias;
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        if (!rows[i]) continue;
        const float* source = rows[i] + (2 * x - 1) * pixel + c;
#pragma GCC unroll 3
        for (int j = first; j < last; ++j) total += weights[3 * i + j] * positive(load(source + j * pixel));
      }
      store(y + x * args.y_pixel + c, positive(total));
    };
    sum(0, 1, width > 1 ? 3 : 2);
    const int64_t inner = width / 2;
    for (int64_t x = 1; x < inner; ++x) sum(x, 0, 3);
    if (out_width > 1 && inner < out_width) sum(inner, 0, 2);
  }
}

}  // namespace ISA
}  // namespace mmspatialmamba
