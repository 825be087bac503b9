// The kernels over maps, shared by the fused op (kScan) and by the fusion alone: a block of threads walks down its
// rows, with the last 11 of them in shared memory.
#pragma once

#include "selective_scan/scan.cuh"
#include "state_fusion/cuda.h"
#include "state_fusion/window.cuh"

namespace mmspatialmamba::cuda {

template <class T>
struct Problem : ScanParameters {
  Size size;
  Plan plan;
  bool softplus;
  Rows<T> u, delta, grad, out, grad_u, grad_delta;
  Rows<float> grad_h;
  const float* taps;
  Affine* steps;         // of a tile's row, (batch, height, tiles, padded dim)
  const float* states;   // that enter a tile's row, of the same shape; null where a block carries the state itself
  const float* returns;  // what enters a tile's row from its end, backward
  float *grad_B, *grad_C, *parameters;
};

// Of maps of one size, with the taps for all channels.
template <class T>
Problem<T> make_problem(const Size& size, const Plan& plan, const float* taps) {
  Problem<T> p{};
  p.size = size;
  p.plan = plan;
  p.taps = taps;
  return p;
}

struct Channel {
  float A, D, bias;
};

template <class T>
__device__ __forceinline__ Channel load_channel(const Problem<T>& p, const Block& b) {
  if (!b.valid()) return {0.f, 0.f, 0.f};
  const int c = b.channel0 + b.channel;
  return {p.A[c], p.D[c], p.bias ? p.bias[c] : 0.f};
}

// (25, channel), in shared memory: registers are scarce.
template <class T>
__device__ __forceinline__ void load_taps(const Problem<T>& p, const Block& b, float* taps) {
  for (int i = threadIdx.x; i < kTaps * kChannels; i += blockDim.x) {
    const int channel = i % kChannels, tap = i / kChannels;
    taps[i] = channel < b.channels ? p.taps[static_cast<int64_t>(tap) * p.size.dim + b.channel0 + channel] : 0.f;
  }
}

template <class T>
__device__ __forceinline__ int64_t segment_index(const Problem<T>& p, const Block& b, int row) {
  const int64_t segment = (static_cast<int64_t>(b.batch) * p.size.height + row) * p.plan.tiles + b.tile;
  return segment * b.groups * kChannels + b.channel0 + b.channel;
}

__device__ __forceinline__ float sum_channels(float x) {
#pragma unroll
  for (int offset = 1; offset < kChannels; offset *= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

// Shared memory: what scan_block needs, the taps, two stages of rows that are copied ahead, and the rest.
struct Shared {
  Affine* warps;
  float* taps;
  unsigned char* stages;
  int size;  // of a stage, in bytes

  __device__ __forceinline__ Shared(unsigned char* memory, int stage_size)
      : warps(reinterpret_cast<Affine*>(memory)), taps(reinterpret_cast<float*>(warps + kChannels * kWarps)),
        stages(reinterpret_cast<unsigned char*>(taps + kTaps * kChannels)), size(stage_size) {}

  __device__ __forceinline__ unsigned char* stage(int row) const { return stages + (row & 1) * size; }
  __device__ __forceinline__ float* rest() const { return reinterpret_cast<float*>(stages + 2 * size); }
};

constexpr int kFixedBytes = kChannels * static_cast<int>(kWarps * sizeof(Affine) + kTaps * sizeof(float));

// Waits for what was copied ahead for a row, and starts copying for the next. A walk starts at the row before its
// first, for which there is nothing else to do: then the result is false.
template <class Prefetch>
__device__ __forceinline__ bool enter_row(int row, int begin, int end, const Prefetch& prefetch) {
  __pipeline_wait_prior(0);
  __syncthreads();
  if (row + 1 < end) prefetch(row + 1);
  __pipeline_commit();
  return row >= begin;
}

// The step that each row of a tile makes, from the column where the tile's halo begins to where the next tile's does.
template <class T>
struct StepsShared {
  static int bytes(const Plan& plan) { return kFixedBytes + 2 * (2 * stage_bytes<T>(plan) + line_bytes(plan)); }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 3) steps_kernel(const Problem<T> p) {
  MMSPATIALMAMBA_SHARED(memory);
  const Block b = this_block(p.size, p.plan);
  const int map_bytes = stage_bytes<T>(p.plan);
  const Shared shared(memory, 2 * map_bytes + line_bytes(p.plan));
  const Channel c = load_channel(p, b);
  const int end = b.tile + 1 < p.plan.tiles ? b.column1 - kHalo : p.size.width;

  auto prefetch = [&](int row) {
    unsigned char* stage = shared.stage(row);
    stage_row(reinterpret_cast<T*>(stage), p.u, b, row);
    stage_row(reinterpret_cast<T*>(stage + map_bytes), p.delta, b, row);
    stage_floats(reinterpret_cast<float*>(stage + 2 * map_bytes), p.B, p.size, b, row);
  };

  for (int row = b.row0 - 1; row < b.row1; ++row) {
    if (!enter_row(row, b.row0, b.row1, prefetch)) continue;
    unsigned char* stage = shared.stage(row);
    const T* u = reinterpret_cast<const T*>(stage);
    const T* delta = reinterpret_cast<const T*>(stage + map_bytes);
    const float* B = reinterpret_cast<const float*>(stage + 2 * map_bytes);
    Affine own{1.f, 0.f};
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int i = b.segment * kColumns + j;
      if (b.first + i < end) {
        const float x = to_float(delta[i * kChannels + b.channel]) + c.bias;
        const float dt = time_step(x, p.softplus);
        own = own.then({accurate_exp(dt * c.A), dt * B[i] * to_float(u[i * kChannels + b.channel])});
      }
    }
    const Affine total = scan_block<kChannels>(own, shared.warps).total;
    if (b.segment == 0) p.steps[segment_index(p, b, row)] = total;
  }
}

template <class T>
struct ForwardShared {
  static __host__ __device__ int stage(const Plan& plan) { return 3 * stage_bytes<T>(plan) + 2 * line_bytes(plan); }
  static int bytes(const Plan& plan) {
    return kFixedBytes + 2 * stage(plan) + ring_floats(plan, kReach) * static_cast<int>(sizeof(float));
  }
};

// y, or without kScan the fusion of u.
template <class T, bool kScan>
__global__ void __launch_bounds__(kThreads, 3) forward_kernel(const Problem<T> p) {
  MMSPATIALMAMBA_SHARED(memory);
  const Block b = this_block(p.size, p.plan);
  const int height = p.size.height;
  const int map_bytes = stage_bytes<T>(p.plan), line = line_bytes(p.plan);
  const int row_size = ring_row(p.plan, kReach);
  const Shared shared(memory, ForwardShared<T>::stage(p.plan));
  float* ring = shared.rest();
  const Channel c = kScan ? load_channel(p, b) : Channel{};
  load_taps(p, b, shared.taps);
  const float* taps = shared.taps + b.channel;

  // What step `row` needs: row `row` of the inputs of the scan, row `row - 5` of those of the output.
  auto prefetch = [&](int row) {
    unsigned char* stage = shared.stage(row);
    if (row < height) {
      stage_row(reinterpret_cast<T*>(stage), p.u, b, row);
      if (kScan) {
        stage_row(reinterpret_cast<T*>(stage + map_bytes), p.delta, b, row);
        stage_floats(reinterpret_cast<float*>(stage + 3 * map_bytes), p.B, p.size, b, row);
      }
    }
    if (kScan && row - kReach >= b.row0) {
      stage_row(reinterpret_cast<T*>(stage + 2 * map_bytes), p.u, b, row - kReach);
      stage_floats(reinterpret_cast<float*>(stage + 3 * map_bytes + line), p.C, p.size, b, row - kReach);
    }
  };

  const int begin = max(0, b.row0 - kReach), end = b.row1 + kReach;
  float state = 0.f;
  for (int row = begin - 1; row < end; ++row) {
    if (!enter_row(row, begin, end, prefetch)) continue;
    unsigned char* stage = shared.stage(row);
    const T* u = reinterpret_cast<const T*>(stage);
    if (row < height) {
      float h[kColumns];
      if (kScan) {
        if (p.states) state = p.states[segment_index(p, b, row)];
        const T* delta = reinterpret_cast<const T*>(stage + map_bytes);
        const float* B = reinterpret_cast<const float*>(stage + 3 * map_bytes);
        Affine steps[kColumns], own{1.f, 0.f};
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const int i = b.segment * kColumns + j;
          steps[j] = {1.f, 0.f};
          if (b.first + i < b.last) {
            const float x = to_float(delta[i * kChannels + b.channel]) + c.bias;
            const float dt = time_step(x, p.softplus);
            steps[j] = {accurate_exp(dt * c.A), dt * B[i] * to_float(u[i * kChannels + b.channel])};
          }
          own = own.then(steps[j]);
        }
        const Scanned scanned = scan_block<kChannels>(own, shared.warps);
        float value = scanned.before(state);
        state = scanned.total(state);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) h[j] = value = steps[j](value);
      } else {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const int i = b.segment * kColumns + j;
          h[j] = b.first + i < b.last ? to_float(u[i * kChannels + b.channel]) : 0.f;
        }
      }
      put_states(ring + row % kRing * row_size, h, b, p.size.width);
    }
    const int q = row - kReach;
    if (q < b.row0) continue;
    __syncthreads();
    const int column = b.column0 + b.segment * kColumns;
    T* out = reinterpret_cast<T*>(stage + 2 * map_bytes);
    if (column < b.column1) {
      float fused[kColumns] = {};
      visit_clamped(ring + (b.segment * kColumns + kReach) * kChannels + b.channel, row_size, q, height,
                    [&](int tap, int j, float value) { fused[j] = fmaf(taps[tap * kChannels], value, fused[j]); });
      const float* C = reinterpret_cast<const float*>(stage + 3 * map_bytes + line);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        if (column + j < b.column1) {
          const int i = column - b.first + j;
          T& place = out[i * kChannels + b.channel];
          place = from_float<T>(kScan ? fmaf(C[i], fused[j], c.D * to_float(place)) : fused[j]);
        }
      }
    }
    __syncthreads();
    unstage_row(out, p.out, b, q);
  }
}

template <class T>
struct TransposedShared {
  static __host__ __device__ int stage(const Plan& plan) { return 2 * stage_bytes<T>(plan) + line_bytes(plan); }
  static __host__ __device__ int line_floats(const Plan& plan) {
    return ((plan.tile + 2 * kReach + kColumns - 1) / kColumns + 1) * kColumns * kChannels;
  }
  static int bytes(const Plan& plan) {
    return kFixedBytes + 2 * stage(plan) + stage_bytes<float>(plan) +
           (line_floats(plan) + ring_floats(plan, 2 * kReach)) * static_cast<int>(sizeof(float));
  }
};

// The fusion transposed: from C * grad (without kScan: grad) to the gradient of h before the recurrence, and, with
// kScan, the step that each row of a tile makes backward.
template <class T, bool kScan>
__global__ void __launch_bounds__(kThreads, 3) transposed_kernel(const Problem<T> p) {
  MMSPATIALMAMBA_SHARED(memory);
  const Block b = this_block(p.size, p.plan);
  const int height = p.size.height, width = p.size.width;
  const int map_bytes = stage_bytes<T>(p.plan);
  const int row_size = ring_row(p.plan, 2 * kReach);
  const Shared shared(memory, TransposedShared<T>::stage(p.plan));
  float* out = shared.rest();
  float* extended = out + kChannels * stage_columns(p.plan);  // a row with kReach columns on either side
  float* ring = extended + TransposedShared<T>::line_floats(p.plan);
  const Channel c = kScan ? load_channel(p, b) : Channel{};
  load_taps(p, b, shared.taps);
  const float* taps = shared.taps + b.channel;

  auto prefetch = [&](int row) {
    unsigned char* stage = shared.stage(row);
    if (row < height) {
      stage_row(reinterpret_cast<T*>(stage), p.grad, b, row);
      if (kScan) stage_floats(reinterpret_cast<float*>(stage + 2 * map_bytes), p.C, p.size, b, row);
    }
    if (kScan && row - kReach >= b.row0) stage_row(reinterpret_cast<T*>(stage + map_bytes), p.delta, b, row - kReach);
  };

  const int begin = max(0, b.row0 - kReach), end = b.row1 + kReach;
  const int ring_begin = b.column0 - 2 * kReach, ring_end = b.column1 + 2 * kReach;
  const int segments = (b.column1 - b.column0 + 2 * kReach + kColumns - 1) / kColumns;
  clear(ring, ring_floats(p.plan, 2 * kReach));
  for (int row = begin - 1; row < end; ++row) {
    if (!enter_row(row, begin, end, prefetch)) continue;
    unsigned char* stage = shared.stage(row);
    if (row < height) {
      const T* grad = reinterpret_cast<const T*>(stage);
      const float* C = reinterpret_cast<const float*>(stage + 2 * map_bytes);
      float* target = ring + row % kRing * row_size + b.channel;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int i = b.segment * kColumns + j, column = b.first + i;
        if (column < b.last && ring_begin <= column && column < ring_end) {
          const float value = to_float(grad[i * kChannels + b.channel]);
          target[(column - ring_begin) * kChannels] = kScan ? C[i] * value : value;
        }
      }
    }
    const int q = row - kReach;
    if (q < b.row0) continue;
    __syncthreads();
    if (b.segment < segments) {
      float sums[kColumns] = {};
      visit_folded(ring + (b.segment * kColumns + kReach) * kChannels + b.channel, row_size, q, height,
                   [&](int tap, int j, float value) { sums[j] = fmaf(taps[tap * kChannels], value, sums[j]); });
#pragma unroll
      for (int j = 0; j < kColumns; ++j) extended[(b.segment * kColumns + j) * kChannels + b.channel] = sums[j];
    }
    __syncthreads();
    const T* delta = reinterpret_cast<const T*>(stage + map_bytes);
    Affine own{1.f, 0.f};
#pragma unroll
    for (int j = kColumns - 1; j >= 0; --j) {
      const int column = b.column0 + b.segment * kColumns + j;
      if (column < b.column1) {
        const float* at = extended + (column - b.column0 + kReach) * kChannels + b.channel;
        float value = at[0];
        if (column == 0) {
          for (int i = 1; i <= kReach; ++i) value += at[-i * kChannels];
        }
        if (column == width - 1) {
          for (int i = 1; i <= kReach; ++i) value += at[i * kChannels];
        }
        const int i = column - b.first;
        out[i * kChannels + b.channel] = value;
        if (kScan) {
          const float x = to_float(delta[i * kChannels + b.channel]) + c.bias;
          const float decay = accurate_exp(time_step(x, p.softplus) * c.A);
          own = own.then({decay, decay * value});
        }
      }
    }
    if (kScan) {
      const Affine total = scan_block<kChannels, true>(own, shared.warps).total;
      if (b.segment == 0) p.steps[segment_index(p, b, q)] = total;
    } else {
      __syncthreads();
    }
    unstage_row(out, p.grad_h, b, q);
  }
}

template <class T>
struct BackwardShared {
  static __host__ __device__ int stage(const Plan& plan) {
    return 4 * stage_bytes<T>(plan) + stage_bytes<float>(plan) + 2 * line_bytes(plan);
  }
  static int bytes(const Plan& plan) {
    const int ring = ring_floats(plan, kReach), sums = kWarps * kParameters * kChannels;
    return kFixedBytes + 2 * stage(plan) + (ring > sums ? ring : sums) * static_cast<int>(sizeof(float));
  }
};

// Everything else: the gradients of the inputs and of the parameters; without kScan, of the taps alone.
template <class T, bool kScan>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(const Problem<T> p) {
  MMSPATIALMAMBA_SHARED(memory);
  const Block b = this_block(p.size, p.plan);
  const int height = p.size.height, width = p.size.width;
  const int map_bytes = stage_bytes<T>(p.plan), line = line_bytes(p.plan);
  const int row_size = ring_row(p.plan, kReach);
  const Shared shared(memory, BackwardShared<T>::stage(p.plan));
  float* ring = shared.rest();
  const Channel c = kScan ? load_channel(p, b) : Channel{};
  if (kScan) load_taps(p, b, shared.taps);
  const float* taps = shared.taps + b.channel;

  // A stage: rows of u, delta, grad and, five rows above, grad; grad_h; lines of B and, five rows above, C.
  const int above = 3 * map_bytes, returned = 4 * map_bytes;
  const int lines = returned + stage_bytes<float>(p.plan);
  auto prefetch = [&](int row) {
    unsigned char* stage = shared.stage(row);
    if (row < height) {
      stage_row(reinterpret_cast<T*>(stage), p.u, b, row);
      if (kScan) {
        stage_row(reinterpret_cast<T*>(stage + map_bytes), p.delta, b, row);
        stage_floats(reinterpret_cast<float*>(stage + lines), p.B, p.size, b, row);
        if (b.row0 <= row && row < b.row1) {
          stage_row(reinterpret_cast<T*>(stage + 2 * map_bytes), p.grad, b, row);
          stage_row(reinterpret_cast<float*>(stage + returned), p.grad_h, b, row);
        }
      }
    }
    if (row - kReach >= b.row0) {
      stage_row(reinterpret_cast<T*>(stage + above), p.grad, b, row - kReach);
      if (kScan) stage_floats(reinterpret_cast<float*>(stage + lines + line), p.C, p.size, b, row - kReach);
    }
  };

  const int begin = max(0, b.row0 - kReach), end = b.row1 + kReach;
  const int64_t pixels = static_cast<int64_t>(height) * width;
  const int64_t partial = (static_cast<int64_t>(b.group) * p.size.batch + b.batch) * pixels;
  float sums[kParameters] = {};
  clear(ring, ring_floats(p.plan, kReach));
  for (int row = begin - 1; row < end; ++row) {
    if (!enter_row(row, begin, end, prefetch)) continue;
    unsigned char* stage = shared.stage(row);
    T* u = reinterpret_cast<T*>(stage);
    const bool own_row = b.row0 <= row && row < b.row1;
    if (row < height) {
      float h[kColumns];
      float* target = ring + row % kRing * row_size;
      if (kScan) {
        T* delta = reinterpret_cast<T*>(stage + map_bytes);
        const float* B = reinterpret_cast<const float*>(stage + lines);
        const float state = p.states[segment_index(p, b, row)];
        float dt[kColumns], slope[kColumns], decay[kColumns];
        Affine forward{1.f, 0.f}, back{1.f, 0.f};
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const int i = b.segment * kColumns + j;
          dt[j] = slope[j] = h[j] = 0.f;
          decay[j] = 1.f;
          if (b.first + i < b.last) {
            const float x = to_float(delta[i * kChannels + b.channel]) + c.bias;
            dt[j] = time_step(x, p.softplus, &slope[j]);
            decay[j] = accurate_exp(dt[j] * c.A);
            h[j] = dt[j] * B[i] * to_float(u[i * kChannels + b.channel]);
          }
          forward = forward.then({decay[j], h[j]});
        }
        const float entering = scan_block<kChannels>(forward, shared.warps).before(state);
        float running = entering;
#pragma unroll
        for (int j = 0; j < kColumns; ++j) h[j] = running = fmaf(decay[j], running, h[j]);
        put_states(target, h, b, width);
        if (own_row) {
          const float* states = target + (b.first - b.column0 + kReach) * kChannels + b.channel;
          const float* grad_h = reinterpret_cast<const float*>(stage + returned);
          const T* grad = reinterpret_cast<const T*>(stage + 2 * map_bytes);
          const float returning = p.returns[segment_index(p, b, row)];
          float G[kColumns];
#pragma unroll
          for (int j = kColumns - 1; j >= 0; --j) {
            const int i = b.segment * kColumns + j;
            G[j] = 0.f;
            if (b.owns(b.first + i)) {
              G[j] = grad_h[i * kChannels + b.channel];
              back = back.then({decay[j], decay[j] * G[j]});
            }
          }
          __syncthreads();
          float value = scan_block<kChannels, true>(back, shared.warps).before(returning);
#pragma unroll
          for (int j = kColumns - 1; j >= 0; --j) {
            const int i = b.segment * kColumns + j;
            const bool owned = b.owns(b.first + i);
            float to_B = 0.f;
            if (owned) {
              G[j] += value;
              value = decay[j] * G[j];
              const int at = i * kChannels + b.channel;
              const float input = to_float(u[at]);
              const float gy = to_float(grad[at]);
              const float to_exponent = value * (j == 0 ? entering : states[(i - 1) * kChannels]);
              const float to_step = fmaf(to_exponent, c.A, G[j] * B[i] * input) * slope[j];
              to_B = G[j] * dt[j] * input;
              sums[25] = fmaf(to_exponent, dt[j], sums[25]);
              sums[26] = fmaf(gy, input, sums[26]);
              sums[27] += to_step;
              u[at] = from_float<T>(fmaf(G[j] * dt[j], B[i], c.D * gy));
              delta[at] = from_float<T>(to_step);
            }
            to_B = sum_channels(to_B);
            if (owned && b.channel == 0) p.grad_B[partial + static_cast<int64_t>(row) * width + b.first + i] = to_B;
          }
        }
      } else {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const int i = b.segment * kColumns + j;
          h[j] = b.first + i < b.last ? to_float(u[i * kChannels + b.channel]) : 0.f;
        }
        put_states(target, h, b, width);
      }
    }
    __syncthreads();
    if (kScan && own_row) {
      unstage_row(u, p.grad_u, b, row);
      unstage_row(reinterpret_cast<const T*>(stage + map_bytes), p.grad_delta, b, row);
    }
    const int q = row - kReach;
    if (q < b.row0) continue;
    const T* grad = reinterpret_cast<const T*>(stage + above);
    const float* C = reinterpret_cast<const float*>(stage + lines + line);
    const int column = b.column0 + b.segment * kColumns;
    const int segment = column < b.column1 ? b.segment : 0;  // threads with nothing to do follow the others
    float gy[kColumns], weighted[kColumns], fused[kColumns] = {};
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int i = column - b.first + j;
      const bool inside = column + j < b.column1;
      gy[j] = inside ? to_float(grad[i * kChannels + b.channel]) : 0.f;
      weighted[j] = kScan && inside ? C[i] * gy[j] : gy[j];
    }
    visit_clamped(ring + (segment * kColumns + kReach) * kChannels + b.channel, row_size, q, height,
                  [&](int tap, int j, float value) {
                    if (kScan) fused[j] = fmaf(taps[tap * kChannels], value, fused[j]);
                    sums[tap] = fmaf(weighted[j], value, sums[tap]);
                  });
    if (kScan) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const float to_C = sum_channels(gy[j] * fused[j]);
        if (column + j < b.column1 && b.channel == 0)
          p.grad_C[partial + static_cast<int64_t>(q) * width + column + j] = to_C;
      }
    }
  }

  __syncthreads();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < kParameters; ++i) {
    float sum = sums[i];
    sum += __shfl_xor_sync(kFullWarp, sum, 8);
    sum += __shfl_xor_sync(kFullWarp, sum, 16);
    if (lane < kChannels) ring[(warp * kParameters + i) * kChannels + lane] = sum;
  }
  __syncthreads();
  const int64_t index = (static_cast<int64_t>(b.batch) * p.plan.chunks + b.chunk) * p.plan.tiles + b.tile;
  for (int i = threadIdx.x; i < kParameters * kChannels; i += blockDim.x) {
    float sum = 0.f;
    for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) sum += ring[w * kParameters * kChannels + i];
    const int64_t row = index * kParameters + i / kChannels;
    p.parameters[row * b.groups * kChannels + b.channel0 + i % kChannels] = sum;
  }
}

}  // namespace mmspatialmamba::cuda
