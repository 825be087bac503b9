// How the CUDA kernels cut a map.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/types.h"

namespace mmspatialmamba::cuda {

struct Size {
  int32_t batch, dim, height, width;
};

// A block takes 8 channels, `tile` columns and `rows` rows.
struct Plan {
  int32_t tile, tiles, rows, chunks;
};

// Channels are padded to a multiple of 8 in the buffers that the kernels share.
constexpr int kChannels = 8;
inline int64_t padded_dim(int64_t dim) { return (dim + kChannels - 1) / kChannels * kChannels; }

// Blocks for each group of 8 channels, and in all.
inline int64_t plan_blocks(const Size& size, const Plan& plan) {
  return static_cast<int64_t>(size.batch) * plan.chunks * plan.tiles;
}
inline int64_t all_blocks(const Size& size, const Plan& plan) {
  return plan_blocks(size, plan) * (padded_dim(size.dim) / kChannels);
}

// `max_tile` is a multiple of 8 and at most kMaxTile.
constexpr int kMaxTile = 128;
inline Plan make_plan(const Size& size, int multiprocessors, int max_tile = kMaxTile) {
  const int width = std::max(size.width, 1), height = std::max(size.height, 1);
  Plan plan{width, 1, height, 1};
  if (width > max_tile) {
    const int tiles = (width + max_tile - 1) / max_tile;
    plan.tile = ((width + tiles - 1) / tiles + 7) / 8 * 8;
    plan.tiles = (width + plan.tile - 1) / plan.tile;
  }
  const int64_t blocks = padded_dim(size.dim) / kChannels * size.batch * plan.tiles;
  // A chunk reads and scans 10 rows that its neighbours do too: as few chunks as fill the multiprocessors.
  if (blocks > 0 && blocks < 2 * multiprocessors) {
    const int64_t wanted = (4 * multiprocessors + blocks - 1) / blocks;
    const int chunks = static_cast<int>(std::min<int64_t>(wanted, (height + 7) / 8));
    plan.rows = (height + chunks - 1) / chunks;
    plan.chunks = (height + plan.rows - 1) / plan.rows;
  }
  return plan;
}

}  // namespace mmspatialmamba::cuda
