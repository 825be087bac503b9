#include "state_fusion/cpu.h"

#include "state_fusion/rows.h"

namespace mmspatialmamba::ISA {
namespace {

void forward(const FusionArgs& args, const Map& g, int64_t batch, int64_t block, float* scratch) {
  const int64_t height = args.height, width = args.width;
  alignas(64) float weights[kTaps * kBlock];
  merge_kernels(args.kernels, args.dim, block, weights);
  float* ring = scratch;
  float* staging = ring + kWindow * padded(width);
  const Rows h(args.h, batch, block, args.dim, width, staging);
  const Rows out(g, batch, block, args.dim, width, staging);
  const auto row = [&](int64_t r) { return ring + r % kWindow * padded(width); };

  for (int64_t r = 0; r < height + kReach; ++r) {
    if (r < height) {
      h.copy(r, row(r) + kReach * kBlock);
      pad_with_edges(row(r), width);
    }
    const int64_t q = r - kReach;
    if (q < 0) continue;
    Meeting meetings[kNumLines];
    fusion_meetings(q, height, weights, row, meetings);
    const Row target = out.open(q);
    convolve_row(meetings, kNumLines, width,
                 [&](int64_t x, const float* totals) { memcpy(target.at(x).data, totals, kBlock * sizeof(float)); });
    out.written(q);
  }
}

void backward(const FusionArgs& args, const Map& grad, const Map& grad_h, float* sums, int64_t batch, int64_t block,
              float* scratch) {
  const int64_t height = args.height, width = args.width;
  alignas(64) float weights[kTaps * kBlock];
  merge_kernels(args.kernels, args.dim, block, weights);
  float* states = scratch;
  float* grads = states + kWindow * padded(width);
  float* sum = grads + kWindow * padded(width);
  float* staging = sum + width * kBlock;
  const Rows h(args.h, batch, block, args.dim, width, staging);
  const Rows g(grad, batch, block, args.dim, width, staging + width * kBlock);
  const Rows out(grad_h, batch, block, args.dim, width, staging + 2 * width * kBlock);
  const auto state_row = [&](int64_t r) { return states + r % kWindow * padded(width); };
  const auto grad_row = [&](int64_t r) { return grads + r % kWindow * padded(width); };

  alignas(64) float grad_taps[kTaps * kBlock] = {}, mirrored[kTaps * kBlock];
  mirror_lines(weights, mirrored);
  for (int64_t r = 0; r < height + kReach; ++r) {
    if (r < height) {
      h.copy(r, state_row(r) + kReach * kBlock);
      pad_with_edges(state_row(r), width);
      g.copy(r, grad_row(r) + kReach * kBlock);
      pad_with_zeros(grad_row(r), width);
    }
    const int64_t q = r - kReach;
    if (q < 0) continue;
    taps_gradient(q, height, width, grad_row(q), state_row, grad_taps);
    transposed_fusion(q, height, width, mirrored, grad_row, sum);
    const Row target = out.open(q);
    for (int64_t x = 0; x < width; ++x) {
      memcpy(target.data + x * target.stride, sum + x * kBlock, kBlock * sizeof(float));
    }
    out.written(q);
  }
  for (int i = 0; i < kTaps; ++i) {
    write_block(grad_taps + i * kBlock, args.dim, block, sums + (i * args.batch + batch) * args.dim);
  }
}

}  // namespace
}  // namespace mmspatialmamba::ISA

const mmspatialmamba::StateFusionCpu mmspatialmamba::MMSPATIALMAMBA_FOR_ISA(state_fusion){ISA::forward, ISA::backward};
