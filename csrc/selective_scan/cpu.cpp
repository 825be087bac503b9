#include "selective_scan/cpu.h"

#include "selective_scan/time_step.h"

namespace mmspatialmamba::ISA {
namespace {

// Tokens are staged in pieces of this many; a piece plays the part of a row.
constexpr int64_t kPiece = 64;

Map piece_of(Map map, int64_t token) {
  const int64_t bytes = map.dtype == DType::kFloat32 ? 4 : 2;
  map.data = static_cast<char*>(map.data) + token * map.column * bytes;
  return map;
}

// Of state n of a (batch, dim, state, length) tensor.
Map states(const SelectiveScanArgs& args, const float* h, int64_t n) {
  const int64_t channel = args.state * args.length;
  return {const_cast<float*>(h) + n * args.length, DType::kFloat32, args.dim * channel, channel, 0, 1};
}

void copy_A(const SelectiveScanArgs& args, int64_t block, int64_t n, float* A) {
  for (int c = 0; c < kBlock; ++c) {
    const int64_t channel = block * kBlock + c;
    A[c] = channel < args.dim ? args.A[channel * args.state + n] : 0.f;
  }
}

void forward(const SelectiveScanArgs& args, float* h, int64_t batch, int64_t block, float* scratch) {
  alignas(64) float bias[kBlock];
  copy_block(args.bias, args.dim, block, bias);
  constexpr int64_t kStaged = kPiece * kBlock;
  TimeSteps steps;
  for (int64_t n = 0; n < args.state; ++n) {
    alignas(64) float A[kBlock];
    copy_A(args, block, n, A);
    const float* B = args.B + (batch * args.state + n) * args.length;
    const Map target = states(args, h, n);
    Vec state[kVecs] = {};
    for (int64_t first = 0; first < args.length; first += kPiece) {
      const int64_t tokens = smaller(kPiece, args.length - first);
      const Row u = Rows(piece_of(args.u, first), batch, block, args.dim, tokens, scratch).read(0);
      const Row delta = Rows(piece_of(args.delta, first), batch, block, args.dim, tokens, scratch + kStaged).read(0);
      const Rows out(piece_of(target, first), batch, block, args.dim, tokens, scratch + 2 * kStaged);
      const Row row = out.open(0);
      for (int64_t start = 0; start < tokens; start += kChunk) {
        const int count = static_cast<int>(smaller(kChunk, tokens - start));
        args.softplus ? time_steps<true, false>(delta.at(start), count, bias, A, steps)
                      : time_steps<false, false>(delta.at(start), count, bias, A, steps);
        for (int i = 0; i < count; ++i) {
          const int64_t t = start + i;
          for (int v = 0; v < kVecs; ++v) {
            const int c = v * kLanes;
            const Vec drive = load(steps.value + i * kBlock + c) * B[first + t] * load(u.at(t).data + c);
            state[v] = load(steps.decay + i * kBlock + c) * state[v] + drive;
            store(row.at(t).data + c, state[v]);
          }
        }
      }
      out.written(0);
    }
  }
}

void backward(const SelectiveScanArgs& args, const float* grad, const float* h, const SelectiveScanGradients& gradients,
              int64_t batch, int64_t block, float* scratch) {
  alignas(64) float bias[kBlock], A[kBlock];
  copy_block(args.bias, args.dim, block, bias);
  constexpr int64_t kStaged = kPiece * kBlock;
  const auto staging = [&](int i) { return scratch + i * kStaged; };
  float* sums_A = staging(6);
  float* carries = sums_A + args.state * kBlock;
  memset(sums_A, 0, 2 * args.state * kBlock * sizeof(float));
  alignas(64) float sums_bias[kBlock] = {};
  TimeSteps steps;

  const int64_t pieces = (args.length + kPiece - 1) / kPiece;
  for (int64_t first = (pieces - 1) * kPiece; first >= 0; first -= kPiece) {
    const int64_t tokens = smaller(kPiece, args.length - first);
    const auto rows = [&](const Map& map, int i) {
      return Rows(piece_of(map, first), batch, block, args.dim, tokens, staging(i));
    };
    const Row u = rows(args.u, 0).read(0), delta = rows(args.delta, 1).read(0);
    const Rows out_u = rows(gradients.u, 2), out_delta = rows(gradients.delta, 3);
    const Row row_u = out_u.open(0), row_delta = out_delta.open(0);
    for (int64_t n = 0; n < args.state; ++n) {
      copy_A(args, block, n, A);
      const float* B = args.B + (batch * args.state + n) * args.length;
      float* row_B = gradients.B + ((block * args.batch + batch) * args.state + n) * args.length;
      const Row row_grad = rows(states(args, grad, n), 4).read(0), row_h = rows(states(args, h, n), 5).read(0);
      alignas(64) float before[kBlock] = {};
      for (int c = 0; first > 0 && c < kBlock && block * kBlock + c < args.dim; ++c) {
        before[c] = h[((batch * args.dim + block * kBlock + c) * args.state + n) * args.length + first - 1];
      }
      Vec total_A[kVecs] = {}, total_bias[kVecs] = {};
      for (int64_t start = (tokens - 1) / kChunk * kChunk; start >= 0; start -= kChunk) {
        const int count = static_cast<int>(smaller(kChunk, tokens - start));
        args.softplus ? time_steps<true, true>(delta.at(start), count, bias, A, steps)
                      : time_steps<false, true>(delta.at(start), count, bias, A, steps);
        for (int i = count - 1; i >= 0; --i) {
          const int64_t t = start + i;
          const float* state_before = t > 0 ? row_h.at(t - 1).data : before;
          const float B_t = B[first + t];
          Vec total_B{};
          for (int v = 0; v < kVecs; ++v) {
            const int c = v * kLanes;
            const Vec input = load(u.at(t).data + c), dt = load(steps.value + i * kBlock + c);
            float* carry = carries + n * kBlock + c;
            const Vec total = load(row_grad.at(t).data + c) + load(carry);
            const Vec decayed = load(steps.decay + i * kBlock + c) * total;
            store(carry, decayed);
            const Vec grad_exponent = decayed * load(state_before + c);
            const Vec grad_dt =
                (grad_exponent * load(A + c) + total * B_t * input) * load(steps.derivative + i * kBlock + c);
            total_A[v] += grad_exponent * dt;
            total_B += total * dt * input;
            total_bias[v] += grad_dt;
            float* target_u = row_u.at(t).data + c;
            float* target_delta = row_delta.at(t).data + c;
            store(target_u, total * dt * B_t + (n > 0 ? load(target_u) : Vec{}));
            store(target_delta, grad_dt + (n > 0 ? load(target_delta) : Vec{}));
          }
          row_B[first + t] = sum(total_B);
        }
      }
      add(total_A, sums_A + n * kBlock);
      add(total_bias, sums_bias);
    }
    out_u.written(0);
    out_delta.written(0);
  }
  write_block(sums_bias, args.dim, block, gradients.bias + batch * args.dim);
  for (int64_t n = 0; n < args.state; ++n) {
    for (int c = 0; c < kBlock && block * kBlock + c < args.dim; ++c) {
      gradients.A[(batch * args.dim + block * kBlock + c) * args.state + n] = sums_A[n * kBlock + c];
    }
  }
}

}  // namespace
}  // namespace mmspatialmamba::ISA

const mmspatialmamba::SelectiveScanCpu mmspatialmamba::MMSPATIALMAMBA_FOR_ISA(selective_scan){ISA::forward,
                                                                                              ISA::backward};
