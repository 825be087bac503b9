#include "structure_aware_scan/cpu.h"

#include "selective_scan/time_step.h"
#include "state_fusion/rows.h"

namespace mmspatialmamba::ISA {
namespace {

struct Parameters {
  alignas(64) float A[kBlock];
  alignas(64) float D[kBlock];
  alignas(64) float bias[kBlock];
  alignas(64) float taps[kTaps * kBlock];

  Parameters(const ScanArgs& args, int64_t block) {
    copy_block(args.A, args.dim, block, A);
    copy_block(args.D, args.dim, block, D);
    copy_block(args.bias, args.dim, block, bias);
    merge_kernels(args.kernels, args.dim, block, taps);
  }
};

constexpr int kAhead = 16;  // pixels by which the forward pass asks for memory before its use

// Asks for pixels of a row ahead of their use; what is written whole is fetched too. A core can wait for some 16 lines
// at once and stops at the next, so the forward pass asks for a few at a time. The backward pass gained nothing by
// that.
template <class T>
void prefetch(const RowOf<T>& row, int64_t first, int64_t count) {
  constexpr int kLine = 64 / sizeof(T);
  for (int64_t x = first; x < first + count; ++x) {
    for (int c = 0; c < kBlock; c += kLine) __builtin_prefetch(row.at(x).data + c, 0, 3);
  }
}

template <bool kSoftplus, class T>
void scan_row(RowOf<T> u, RowOf<T> delta, const float* B, const Parameters& parameters, int64_t width, Vec* state,
              float* target) {
  TimeSteps steps;
  Vec carry[kVecs];
  for (int v = 0; v < kVecs; ++v) carry[v] = state[v];
  for (int64_t first = 0; first < width; first += kChunk) {
    const int count = static_cast<int>(smaller(kChunk, width - first));
    prefetch(delta, first + kAhead, kChunk);
    time_steps<kSoftplus, false>(delta.at(first), count, parameters.bias, parameters.A, steps);
    prefetch(u, first + kAhead, kChunk);
    for (int x = 0; x < count; ++x) {
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) {
        const int c = v * kLanes, i = x * kBlock + c;
        const Vec drive = load(steps.value + i) * B[first + x] * load(u.data + (first + x) * u.stride + c);
        carry[v] = load(steps.decay + i) * carry[v] + drive;
        store(target + (first + x) * kBlock + c, carry[v]);
      }
    }
  }
  for (int v = 0; v < kVecs; ++v) state[v] = carry[v];
}

template <class T>
void scan_row(const ScanArgs& args, const RowOf<T>& u, const RowOf<T>& delta, const float* B,
              const Parameters& parameters, Vec* state, float* target) {
  (args.softplus ? scan_row<true, T> : scan_row<false, T>)(u, delta, B, parameters, args.width, state, target);
}

// u, delta and y are read and written as T.
template <class T>
void scan_as(const ScanArgs& args, const Map& y, int64_t batch, int64_t block, float* scratch) {
  const int64_t height = args.height, width = args.width;
  const Parameters parameters(args, block);
  const float* B = args.B + batch * height * width;
  const float* C = args.C + batch * height * width;
  float* ring = scratch;
  float* staging = ring + kWindow * padded(width);
  const RowsOf<T> u(args.u, batch, block, args.dim, width, staging);
  const RowsOf<T> delta(args.delta, batch, block, args.dim, width, staging + width * kBlock);
  const RowsOf<T> out(y, batch, block, args.dim, width, staging + 2 * width * kBlock);
  const auto row = [&](int64_t r) { return ring + r % kWindow * padded(width); };

  Vec state[kVecs] = {};
  for (int64_t r = 0; r < height + kReach; ++r) {
    if (r < height) {
      scan_row(args, u.read(r), delta.read(r), B + r * width, parameters, state, row(r) + kReach * kBlock);
      pad_with_edges(row(r), width);
    }
    const int64_t q = r - kReach;
    if (q < 0) continue;
    Meeting meetings[kNumLines];
    fusion_meetings(q, height, parameters.taps, row, meetings);
    const RowOf<T> input = u.read(q), output = out.open(q);
    convolve_row(meetings, kNumLines, width, [&](int64_t x, const float* fused) {
      prefetch(output, x + kAhead, 1);
#pragma GCC unroll 8
      for (int c = 0; c < kBlock; c += kLanes) {
        const Vec skip = load(parameters.D + c) * load(input.at(x).data + c);
        store(output.at(x).data + c, load(fused + c) * C[q * width + x] + skip);
      }
    });
    out.written(q);
  }
}

// What the reverse pass carries from pixel to pixel, and sums up.
struct Reverse {
  Vec carry[kVecs] = {};
  alignas(64) float A[kBlock] = {};
  alignas(64) float D[kBlock] = {};
  alignas(64) float bias[kBlock] = {};
};

template <bool kSoftplus>
void reverse_row(const Row& u, const Row& delta, const Row& grad_y, const Row& grad_u, const Row& grad_delta,
                 const float* B, const Parameters& parameters, int64_t width, const float* grad_state,
                 const float* state, const float* state_before, float* grad_B, Reverse& reverse) {
  Vec total_A[kVecs] = {}, total_D[kVecs] = {}, total_bias[kVecs] = {};
  TimeSteps steps;
  for (int64_t first = (width - 1) / kChunk * kChunk; first >= 0; first -= kChunk) {
    const int count = static_cast<int>(smaller(kChunk, width - first));
    const Row* rows[] = {&u, &delta, &grad_y, &grad_u, &grad_delta};
    for (const Row* row : rows) prefetch(*row, first - kChunk, kChunk);
    time_steps<kSoftplus, true>(delta.at(first), count, parameters.bias, parameters.A, steps);
    for (int i = count - 1; i >= 0; --i) {
      const int64_t x = first + i;
      const float* before = x > 0 ? state + (x - 1) * kBlock : state_before;
      Vec total_B{};
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) {
        const int c = v * kLanes;
        const Vec dt = load(steps.value + i * kBlock + c), input = load(u.data + x * u.stride + c);
        const Vec grad = load(grad_state + x * kBlock + c) + reverse.carry[v];
        reverse.carry[v] = load(steps.decay + i * kBlock + c) * grad;
        const Vec grad_exponent = reverse.carry[v] * load(before + c);
        const Vec grad_dt =
            (grad_exponent * load(parameters.A + c) + grad * B[x] * input) * load(steps.derivative + i * kBlock + c);
        const Vec out = load(grad_y.data + x * grad_y.stride + c);
        total_B += grad * dt * input;
        total_A[v] += grad_exponent * dt;
        total_D[v] += out * input;
        total_bias[v] += grad_dt;
        store(grad_u.data + x * grad_u.stride + c, grad * dt * B[x] + load(parameters.D + c) * out);
        store(grad_delta.data + x * grad_delta.stride + c, grad_dt);
      }
      grad_B[x] = sum(total_B);
    }
  }
  add(total_A, reverse.A);
  add(total_D, reverse.D);
  add(total_bias, reverse.bias);
}

void forward(const ScanArgs& args, const Map& y, int64_t batch, int64_t block, float* scratch) {
  const auto in_place = [&](const Map& map) { return holds_block(map, DType::kBFloat16, args.dim, block); };
  const bool all = in_place(args.u) && in_place(args.delta) && in_place(y);
  (all ? scan_as<BFloat16> : scan_as<float>)(args, y, batch, block, scratch);
}

void backward(const ScanArgs& args, const ScanGradients& gradients, int64_t batch, int64_t block, float* scratch) {
  const int64_t height = args.height, width = args.width, length = height * width;
  const Parameters parameters(args, block);
  const float* B = args.B + batch * length;
  const float* C = args.C + batch * length;
  float* grad_B = gradients.B + (block * args.batch + batch) * length;
  float* grad_C = gradients.C + (block * args.batch + batch) * length;
  float* states = scratch;
  float* ring = states + height * padded(width);
  float* grad_state = ring + kWindow * padded(width);
  float* staging = grad_state + width * kBlock;
  const auto rows = [&](const Map& map, int i) {
    return Rows(map, batch, block, args.dim, width, staging + i * width * kBlock);
  };
  const Rows u = rows(args.u, 0), delta = rows(args.delta, 1), y = rows(gradients.y, 2);
  const Rows grad_u = rows(gradients.u, 3), grad_delta = rows(gradients.delta, 4);
  const auto state_row = [&](int64_t r) { return states + r * padded(width); };
  const auto ring_row = [&](int64_t r) { return ring + r % kWindow * padded(width); };

  Vec state[kVecs] = {};
  for (int64_t r = 0; r < height; ++r) {
    scan_row(args, u.read(r), delta.read(r), B + r * width, parameters, state, state_row(r) + kReach * kBlock);
    pad_with_edges(state_row(r), width);
  }

  alignas(64) float grad_taps[kTaps * kBlock] = {}, mirrored[kTaps * kBlock];
  mirror_lines(parameters.taps, mirrored);
  const auto enter = [&](int64_t r) {
    const Row grad = y.read(r);
    float* g = ring_row(r);
    pad_with_zeros(g, width);
    Meeting meetings[kNumLines];
    fusion_meetings(r, height, parameters.taps, state_row, meetings);
    convolve_row(meetings, kNumLines, width, [&](int64_t x, const float* fused) {
      Vec product{};
#pragma GCC unroll 8
      for (int c = 0; c < kBlock; c += kLanes) {
        const Vec out = load(grad.at(x).data + c);
        store(g + (kReach + x) * kBlock + c, out * C[r * width + x]);
        product += out * load(fused + c);
      }
      grad_C[r * width + x] = sum(product);
    });
    taps_gradient(r, height, width, g, state_row, grad_taps);
  };

  Reverse reverse;
  alignas(64) const float zeros[kBlock] = {};
  int64_t entered = height;
  for (int64_t q = height - 1; q >= 0; --q) {
    while (entered > larger(q - kReach, 0)) enter(--entered);
    transposed_fusion(q, height, width, mirrored, ring_row, grad_state);
    const float* before = q > 0 ? state_row(q - 1) + (kReach + width - 1) * kBlock : zeros;
    (args.softplus ? reverse_row<true> : reverse_row<false>)(u.read(q), delta.read(q), y.read(q), grad_u.open(q),
                                                             grad_delta.open(q), B + q * width, parameters, width,
                                                             grad_state, state_row(q) + kReach * kBlock, before,
                                                             grad_B + q * width, reverse);
    grad_u.written(q);
    grad_delta.written(q);
  }

  const auto write = [&](int i, const float* values) {
    write_block(values, args.dim, block, gradients.sums + (i * args.batch + batch) * args.dim);
  };
  for (int i = 0; i < kTaps; ++i) write(i, grad_taps + i * kBlock);
  write(kTaps, reverse.A);
  write(kTaps + 1, reverse.D);
  write(kTaps + 2, reverse.bias);
}

}  // namespace
}  // namespace mmspatialmamba::ISA

const mmspatialmamba::StructureAwareScanCpu mmspatialmamba::MMSPATIALMAMBA_FOR_ISA(structure_aware_scan){ISA::forward,
                                                                                                         ISA::backward};
