#include "depthwise_conv/cpu.h"

#include "common/convolve.h"

namespace mmspatialmamba::ISA {
namespace {

constexpr int kConvTaps = 9;
constexpr int kConvLines = 3;

static ALWAYS_INLINE void conv_meetings(int64_t r, int64_t height, const float* weights, const float* const* row,
                                        Meeting* meetings, int& count) {
  count = 0;
  for (int i = 0; i < kConvLines; ++i) {
    const int64_t source = r + i - 1;
    if (source < 0 || source >= height) continue;
    meetings[count++] = {row[i] + kReach * kBlock, weights + 3 * i * kBlock, 1, true};
  }
}

// The output is written as T.
template <class T>
void convolve(const ConvArgs& args, const Map& y, int64_t batch, int64_t block, int64_t first, int64_t last,
              float* scratch) {
  const int64_t height = args.height, width = args.width;
  constexpr int kRing = 3;
  alignas(64) float weights[kConvTaps * kBlock], bias[kBlock];
  copy_kernels(args.weights, args.dim, block, weights);
  copy_block(args.bias, args.dim, block, bias);
  float* ring = scratch;
  float* staging = ring + kRing * padded(width);
  const Rows x(args.x, batch, block, args.dim, width, staging);
  const RowsOf<T> out(y, batch, block, args.dim, width, staging);
  const auto row = [&](int64_t r) { return ring + (r + kRing) % kRing * padded(width); };
  for (int i = 0; i < kRing; ++i) pad_with_zeros(row(i), width);

  for (int64_t r = larger(first - 1, 0); r <= last; ++r) {
    if (r < height) x.copy(r, row(r) + kReach * kBlock);
    const int64_t q = r - 1;
    if (q < first) continue;
    const float* sources[kConvLines] = {row(q - 1), row(q), row(q + 1)};
    Meeting meetings[kConvLines];
    int count;
    conv_meetings(q, height, weights, sources, meetings, count);
    const RowOf<T> target = out.open(q);
    const float* centre = row(q) + kReach * kBlock;
    const auto run = [&](auto finish) {
      convolve_row(meetings, count, width, [&](int64_t i, const float* totals) {
#pragma GCC unroll 8
        for (int c = 0; c < kBlock; c += kLanes) {
          store(target.at(i).data + c, finish(load(totals + c) + load(bias + c), load(centre + i * kBlock + c)));
        }
      });
    };
    switch (args.finish) {
      case Finish::kNone: run([](Vec value, Vec) { return value; }); break;
      case Finish::kSilu: run([](Vec value, Vec) { return value * logistic(value); }); break;
      case Finish::kResidual: run([](Vec value, Vec input) { return value + input; }); break;
    }
    out.written(q);
  }
}

void forward(const ConvArgs& args, const Map& y, int64_t batch, int64_t block, int64_t first, int64_t last,
             float* scratch) {
  const bool in_place = holds_block(y, DType::kBFloat16, args.dim, block);
  (in_place ? convolve<BFloat16> : convolve<float>)(args, y, batch, block, first, last, scratch);
}

void backward(const ConvArgs& args, const Map& grad, const Map& grad_x, float* sums, int64_t batch, int64_t block,
              float* scratch) {
  const int64_t height = args.height, width = args.width;
  constexpr int kRing = 4;  // rows q - 1 to q + 2
  alignas(64) float weights[kConvTaps * kBlock], mirrored[kConvTaps * kBlock], bias[kBlock];
  alignas(64) float grad_weights[kConvTaps * kBlock] = {}, grad_bias[kBlock] = {};
  copy_kernels(args.weights, args.dim, block, weights);
  copy_block(args.bias, args.dim, block, bias);
  for (int i = 0; i < kConvTaps; ++i) {
    memcpy(mirrored + i * kBlock, weights + (kConvTaps - 1 - i) * kBlock, kBlock * sizeof(float));
  }
  float* inputs = scratch;
  float* grads = inputs + kRing * padded(width);
  float* staging = grads + kRing * padded(width);
  const Rows x(args.x, batch, block, args.dim, width, staging);
  const Rows g(grad, batch, block, args.dim, width, staging + width * kBlock);
  const Rows out(grad_x, batch, block, args.dim, width, staging + 2 * width * kBlock);
  const auto input_row = [&](int64_t r) { return inputs + (r + kRing) % kRing * padded(width); };
  const auto grad_row = [&](int64_t r) { return grads + (r + kRing) % kRing * padded(width); };
  for (int i = 0; i < kRing; ++i) {
    pad_with_zeros(input_row(i), width);
    pad_with_zeros(grad_row(i), width);
  }

  for (int64_t entering = 0; entering < height + 2; ++entering) {
    if (entering < height) x.copy(entering, input_row(entering) + kReach * kBlock);
    const int64_t r = entering - 1;
    Meeting meetings[kConvLines];
    int count;
    if (r >= 0 && r < height) {
      float* target = grad_row(r) + kReach * kBlock;
      if (args.finish == Finish::kSilu) {
        const Row incoming = g.read(r);
        const float* sources[kConvLines] = {input_row(r - 1), input_row(r), input_row(r + 1)};
        conv_meetings(r, height, weights, sources, meetings, count);
        convolve_row(meetings, count, width, [&](int64_t i, const float* totals) {
#pragma GCC unroll 8
          for (int c = 0; c < kBlock; c += kLanes) {
            const Vec value = load(totals + c) + load(bias + c), slope = logistic(value);
            const Vec derivative = slope * (1.f + value * (1.f - slope));
            store(target + i * kBlock + c, load(incoming.at(i).data + c) * derivative);
          }
        });
      } else {
        g.copy(r, target);
      }
      Vec total[kVecs] = {};
      for (int64_t i = 0; i < width; ++i) {
        for (int v = 0; v < kVecs; ++v) total[v] += load(target + i * kBlock + v * kLanes);
      }
      add(total, grad_bias);
      for (int i = 0; i < kConvLines; ++i) {
        const int64_t source = r + i - 1;
        if (source < 0 || source >= height) continue;
        line_gradient<1, true>(target, input_row(source) + kReach * kBlock, width, grad_weights + 3 * i * kBlock);
      }
    }
    const int64_t q = entering - 2;
    if (q < 0) continue;
    const float* sources[kConvLines] = {grad_row(q - 1), grad_row(q), grad_row(q + 1)};
    conv_meetings(q, height, mirrored, sources, meetings, count);
    const Row target = out.open(q);
    const float* centre = grad_row(q) + kReach * kBlock;
    const bool residual = args.finish == Finish::kResidual;
    convolve_row(meetings, count, width, [&](int64_t i, const float* totals) {
#pragma GCC unroll 8
      for (int c = 0; c < kBlock; c += kLanes) {
        const Vec total = load(totals + c);
        store(target.at(i).data + c, residual ? total + load(centre + i * kBlock + c) : total);
      }
    });
    out.written(q);
  }
  for (int i = 0; i < kConvTaps; ++i) {
    write_block(grad_weights + i * kBlock, args.dim, block, sums + (i * args.batch + batch) * args.dim);
  }
  write_block(grad_bias, args.dim, block, sums + (kConvTaps * args.batch + batch) * args.dim);
}

}  // namespace
}  // namespace mmspatialmamba::ISA

const mmspatialmamba::DepthwiseConvCpu mmspatialmamba::MMSPATIALMAMBA_FOR_ISA(depthwise_conv){ISA::forward,
                                                                                              ISA::backward};
