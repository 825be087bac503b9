// Maps in memory, and rows of them in shared memory. A block of threads takes 8 channels, some columns and some rows of
// one map. A thread takes one channel and 5 neighbouring columns: thread i has channel i % 8 and the columns from 5 *
// (i / 8) on.
#pragma once

#include <cuda_pipeline.h>

#include "common/launch.cuh"
#include "common/numerics.cuh"
#include "common/plan.h"
#include "common/taps.h"

namespace mmspatialmamba::cuda {

constexpr int kHalo = 8;  // columns computed beyond a tile's own: kReach, rounded up to keep 16-byte alignment

// Columns of a row in shared memory.
__host__ __device__ __forceinline__ int stage_columns(const Plan& plan) {
  return plan.tiles == 1 ? plan.tile : plan.tile + 2 * kHalo;
}

// Elements of a row that lie together are its line: all columns of a channel, or 8 channels of a column.
template <class T>
struct Rows {
  T* data;
  int64_t batch, channel, row, line;  // strides
  int32_t shift;                      // of the pieces of a line, rounded up to a power of two
  bool channels_last;
  bool vector;  // pieces of 16 bytes, else of one element
};

template <class T>
Rows<T> make_rows(const Map& map, const Size& size, const Plan& plan) {
  constexpr int n = 16 / sizeof(T);
  const bool last = map.channel == 1 && size.dim > 1;
  const int64_t line = last ? map.column : map.channel;
  const bool aligned = reinterpret_cast<uintptr_t>(map.data) % 16 == 0 && map.batch % n == 0 && map.row % n == 0 &&
                       line % n == 0 && (last ? size.dim % kChannels : size.width % n) == 0;
  const bool vector = aligned && (last || sizeof(T) == 2);
  const int length = last ? kChannels : stage_columns(plan);
  int shift = 0;
  while ((vector ? n : 1) << shift < length) ++shift;
  return {static_cast<T*>(map.data), map.batch, map.channel, map.row, line, shift, last, vector};
}

// What a block and its thread work on.
struct Block {
  int groups, group, tile, chunk, batch;
  int channel0, channels;  // the block's first channel, and how many of its 8 there are
  int row0, row1;          // its own rows
  int column0, column1;    // its own columns
  int first, last;         // with the halo
  int channel, segment;    // the thread's channel within the block, and its columns
  __device__ __forceinline__ bool valid() const { return channel < channels; }
  __device__ __forceinline__ bool owns(int column) const { return column0 <= column && column < column1; }
};

__device__ __forceinline__ Block this_block(const Size& size, const Plan& plan) {
  Block b;
  b.groups = (size.dim + kChannels - 1) / kChannels;
  unsigned index = blockIdx.x;
  b.group = index % b.groups;
  index /= b.groups;
  b.tile = index % plan.tiles;
  index /= plan.tiles;
  b.chunk = index % plan.chunks;
  b.batch = index / plan.chunks;
  b.channel0 = b.group * kChannels;
  b.channels = min(kChannels, size.dim - b.channel0);
  b.row0 = b.chunk * plan.rows;
  b.row1 = min(size.height, b.row0 + plan.rows);
  b.column0 = b.tile * plan.tile;
  b.column1 = min(size.width, b.column0 + plan.tile);
  b.first = max(0, b.column0 - kHalo);
  b.last = plan.tiles == 1 ? size.width : min(size.width, b.column1 + kHalo);
  b.channel = threadIdx.x % kChannels;
  b.segment = threadIdx.x / kChannels;
  return b;
}

template <class T>
__host__ __device__ __forceinline__ int stage_bytes(const Plan& plan) {
  return kChannels * stage_columns(plan) * static_cast<int>(sizeof(T));
}

__host__ __device__ __forceinline__ int line_bytes(const Plan& plan) {
  return (stage_columns(plan) * 4 + 15) / 16 * 16;
}

inline int block_threads(const Plan& plan) {
  const int widest = plan.tiles == 1 ? plan.tile + 2 * kReach : plan.tile + 2 * kHalo;
  return ((widest + kColumns - 1) / kColumns * kChannels + 31) / 32 * 32;
}

// The hardware copies 4, 8 or 16 bytes without the thread's waiting for them.
__device__ __forceinline__ void copy_async(float* to, const float* from) { __pipeline_memcpy_async(to, from, 4); }
__device__ __forceinline__ void copy_async(__half* to, const __half* from) { *to = *from; }
__device__ __forceinline__ void copy_async(__nv_bfloat16* to, const __nv_bfloat16* from) { *to = *from; }

template <class T>
struct alignas(16) Piece {
  T values[16 / sizeof(T)];
};

// Starts copying a row of the map, halo included, to (column, channel); absent channels become 0.
template <class T>
__device__ __forceinline__ void stage_row(T* stage, const Rows<T>& map, const Block& b, int row) {
  constexpr int n = 16 / sizeof(T);
  const int columns = b.last - b.first, piece = map.vector ? n : 1;
  const int lines = map.channels_last ? columns : kChannels, length = map.channels_last ? kChannels : columns;
  const T* source = map.data + b.batch * map.batch + b.channel0 * map.channel + row * map.row +
                    (map.channels_last ? b.first * map.line : b.first);
#pragma unroll 1
  for (int i = threadIdx.x; i < lines << map.shift; i += blockDim.x) {
    const int line = i >> map.shift, place = (i & ((1 << map.shift) - 1)) * piece;
    if (place >= length) continue;
    const int column = map.channels_last ? line : place, channel = map.channels_last ? place : line;
    T* to = stage + column * kChannels + channel;
    const T* from = source + line * map.line + place;
    if (channel >= b.channels) {
      for (int j = 0; j < piece; ++j) to[j * kChannels] = from_float<T>(0.f);
    } else if (!map.vector) {
      copy_async(to, from);
    } else if (map.channels_last) {
      __pipeline_memcpy_async(to, from, 16);
    } else {
      const Piece<T> values = *reinterpret_cast<const Piece<T>*>(from);
#pragma unroll
      for (int j = 0; j < n; ++j) to[j * kChannels] = values.values[j];
    }
  }
}

// Writes the block's own columns of a staged row to the map.
template <class T>
__device__ __forceinline__ void unstage_row(const T* stage, const Rows<T>& map, const Block& b, int row) {
  constexpr int n = 16 / sizeof(T);
  const int columns = b.column1 - b.column0, piece = map.vector ? n : 1;
  const int lines = map.channels_last ? columns : b.channels, length = map.channels_last ? b.channels : columns;
  stage += (b.column0 - b.first) * kChannels;
  T* target = map.data + b.batch * map.batch + b.channel0 * map.channel + row * map.row +
              (map.channels_last ? b.column0 * map.line : b.column0);
#pragma unroll 1
  for (int i = threadIdx.x; i < lines << map.shift; i += blockDim.x) {
    const int line = i >> map.shift, place = (i & ((1 << map.shift) - 1)) * piece;
    if (place >= length) continue;
    T* to = target + line * map.line + place;
    const T* from = stage + (map.channels_last ? line * kChannels + place : place * kChannels + line);
    if (!map.vector) {
      *to = *from;
    } else if (map.channels_last) {
      *reinterpret_cast<Piece<T>*>(to) = *reinterpret_cast<const Piece<T>*>(from);
    } else {
      Piece<T> values;
#pragma unroll
      for (int j = 0; j < n; ++j) values.values[j] = from[j * kChannels];
      *reinterpret_cast<Piece<T>*>(to) = values;
    }
  }
}

// Starts copying the halo's columns of B or C.
__device__ __forceinline__ void stage_floats(float* line, const float* source, const Size& size, const Block& b,
                                             int row) {
  source += (static_cast<int64_t>(b.batch) * size.height + row) * size.width + b.first;
  for (int i = threadIdx.x; i < b.last - b.first; i += blockDim.x) copy_async(line + i, source + i);
}

}  // namespace mmspatialmamba::cuda
