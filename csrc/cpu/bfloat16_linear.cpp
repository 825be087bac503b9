#include "bfloat16.h"
#include "linear.h"
#include "normal.h"

namespace mmspatialmamba {
namespace ISA {

namespace {

using Args = LinearArgs<BFloat16>;

ALWAYS_INLINE int64_t whole(int64_t in) { return (in + kDepth - 1) / kDepth * kDepth; }

// A panel of weights: pairs of input channels of each of its output channels, then the next pairs.
ALWAYS_INLINE const BFloat16* panel_of(const BFloat16* packed, int64_t in, int64_t panel) {
  return packed + panel * kPanel * whole(in);
}

template <class Function>
ALWAYS_INLINE void finish_rows(const Args& args, int64_t row, int64_t rows, int64_t panel, const float* sums,
                               int64_t sums_row, const Function& function) {
  const int64_t column = panel * kPanel, width = smaller(kPanel, args.out - column);
  const Vec none{};
  const Vec low = args.bias ? load(args.bias + column) : none, high = args.bias ? load(args.bias + column + kLanes) : none;
  BFloat16* y = args.y + row * args.y_row + column;
  const BFloat16* residual = args.residual ? args.residual + row * args.residual_row + column : nullptr;
  for (int64_t i = 0; i < rows; ++i, sums += sums_row, y += args.y_row) {
    Vec left = load(sums) + low, right = load(sums + kLanes) + high;
    if (width == kPanel) {
      if (residual) {
        left += load(residual);
        right += load(residual + kLanes);
      }
      store(y, function(left));
      store(y + kLanes, function(right));
    } else {
      BFloat16 part[kPanel] = {};
      if (residual) {
        memcpy(part, residual, width * sizeof(BFloat16));
        left += load(part);
        right += load(part + kLanes);
      }
      store(part, function(left));
      store(part + kLanes, function(right));
      memcpy(y, part, width * sizeof(BFloat16));
    }
    if (residual) residual += args.residual_row;
  }
}

// What some rows of a panel become, given their products.
void finish(const Args& args, int64_t row, int64_t rows, int64_t panel, const float* sums, int64_t sums_row) {
  const auto run = [&](const auto& function) { finish_rows(args, row, rows, panel, sums, sums_row, function); };
  switch (args.activation) {
    case Activation::kNone: return run([](Vec x) { return x; });
    case Activation::kRelu: return run([](Vec x) { return maximum(Vec{}, x); });
    case Activation::kGelu: return run([](Vec x) { return gelu(x); });
  }
}

// Pairs of weights, and the sum with their products with a pair that all meet.
#if defined(__AVX512BF16__)
struct Pairs {
  __m512bh both;
  explicit ALWAYS_INLINE Pairs(IntVec pairs) : both((__m512bh)pairs) {}
};

ALWAYS_INLINE Vec add_products(Vec sum, int32_t pair, const Pairs& weights) {
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pair), weights.both);
}
#else
struct Pairs {
  Vec first, second;
  explicit ALWAYS_INLINE Pairs(IntVec pairs)
      : first(reinterpret_cast<Vec>(pairs << 16)), second(reinterpret_cast<Vec>(pairs & -65536)) {}
};

ALWAYS_INLINE Vec add_products(Vec sum, int32_t pair, const Pairs& weights) {
  const Pairs values(pair - IntVec{});
  return (sum + values.first * weights.first) + values.second * weights.second;
}
#endif

template <int kRows>
ALWAYS_INLINE void tile(const Args& args, int64_t row, int64_t panel) {
  Vec total[kRows][2];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) total[i][0] = total[i][1] = Vec{};
  for (int factor = 0; factor < args.count; ++factor) {
    const BFloat16* x = args.factors[factor].x + row * args.x_row;
    const BFloat16* weight = panel_of(args.factors[factor].packed, args.in, panel);
    const auto add = [&](int64_t k, int64_t size) {
      IntVec left, right;
      memcpy(&left, weight + k * kPanel, sizeof(left));
      memcpy(&right, weight + k * kPanel + kPanel, sizeof(right));
      const Pairs low(left), high(right);
#pragma GCC unroll 12
      for (int i = 0; i < kRows; ++i) {
        int32_t pair = 0;
        memcpy(&pair, x + i * args.x_row + k, size * sizeof(BFloat16));
        total[i][0] = add_products(total[i][0], pair, low);
        total[i][1] = add_products(total[i][1], pair, high);
      }
    };
    int64_t k = 0;
    for (; k + 2 <= args.in; k += 2) add(k, 2);
    if (k < args.in) add(k, 1);
  }
  alignas(64) float sums[kRows * kPanel];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    store(sums + i * kPanel, total[i][0]);
    store(sums + i * kPanel + kLanes, total[i][1]);
  }
  finish(args, row, kRows, panel, sums, kPanel);
}

// A tile of at most kRows rows.
template <int kRows>
ALWAYS_INLINE void last_tile(const Args& args, int64_t row, int64_t rows, int64_t panel) {
  if (rows == kRows) return tile<kRows>(args, row, panel);
  if constexpr (kRows > 1) last_tile<kRows - 1>(args, row, rows, panel);
}

// 2 * kLanes input channels of kLanes output channels.
template <class T>
ALWAYS_INLINE void pack_square(const T* source, int64_t row, const float* scale, BFloat16* target) {
  Vec square[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i, source += row) {
    if (sizeof(T) == sizeof(BFloat16) && !scale) {
      memcpy(square + i, source, sizeof(Vec));
    } else {
      const float factor = scale ? scale[i] : 1.f;
      BFloat16 pairs[2 * kLanes];
      store(pairs, load(source) * factor);
      store(pairs + kLanes, load(source + kLanes) * factor);
      memcpy(square + i, pairs, sizeof(Vec));
    }
  }
  transpose(square, reinterpret_cast<float*>(target));
}

template <class T>
void pack(const WeightArgs& args, BFloat16* target, int64_t panel) {
  const int64_t in = args.in, out_step = args.out_step, in_step = args.in_step;
  const int64_t column = panel * kPanel, width = smaller(kPanel, args.out - column);
  const T* weight = static_cast<const T*>(args.data) + column * out_step;
  const float* scale = args.scale ? args.scale + column : nullptr;
  target += panel * kPanel * whole(in);
  int64_t k = 0;
  for (; k + 2 * kLanes <= in && width == kPanel && in_step == 1; k += 2 * kLanes) {
    prefetch_weights<2 * kLanes>(weight, out_step, in, k);
    pack_square(weight + k, out_step, scale, target + k * kPanel);
    pack_square(weight + kLanes * out_step + k, out_step, scale ? scale + kLanes : nullptr,
                target + k * kPanel + 2 * kLanes);
  }
  memset(target + k * kPanel, 0, (whole(in) - k) * kPanel * sizeof(BFloat16));
  for (; k < in; ++k) {
    for (int64_t c = 0; c < width; ++c) {
      BFloat16 rounded[kLanes];
      store(rounded, broadcast(to_float(weight[c * out_step + k * in_step]) * (scale ? scale[c] : 1.f)));
      target[k / 2 * 2 * kPanel + 2 * c + k % 2] = rounded[0];
    }
  }
}

}  // namespace

void pack_linear_bfloat16(const WeightArgs& weight, BFloat16* packed, int64_t panel) {
  (weight.type == Type::kFloat ? pack<float> : pack<BFloat16>)(weight, packed, panel);
}

void linear_bfloat16(const Args& args) {
  const int64_t panels = (args.out + kPanel - 1) / kPanel;
  for (int64_t panel = 0; panel < panels; ++panel) {
    int64_t row = 0;
    for (; row + kTileRowsBFloat16 <= args.rows; row += kTileRowsBFloat16) tile<kTileRowsBFloat16>(args, row, panel);
    last_tile<kTileRowsBFloat16 - 1>(args, row, args.rows - row, panel);
  }
}

#if defined(__AMX_BF16__)

// With AMX a tile register has 16 rows of 32 input channels, or of 16 sums. Four registers have the sums of two tiles of
// rows and a panel; each step loads two tiles of rows and two of weights for four products.
void linear_amx(const Args& args) {
  constexpr int64_t kRows = 16;
  if (args.rows == 0) return;  // which no tile may have
  static_assert(kPanel == 2 * kRows && kDepth == 32, "");
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; ++i) {
    config.bytes[i] = 64;
    config.rows[i] = i == 6 || i == 7 ? kRows : static_cast<uint8_t>(smaller(kRows, args.rows));
  }
  // Intrinsics may not tell the compiler what memory they read.
  asm volatile("" ::: "memory");
  _tile_loadconfig(&config);

  const int64_t panels = (args.out + kPanel - 1) / kPanel, full = args.in / kDepth * kDepth, rest = args.in - full;
  const int64_t tiles = (args.rows + kRows - 1) / kRows, stride = args.x_row * sizeof(BFloat16);
  // The last tile may have rows of the one before too.
  const auto row_of = [&](int64_t tile) { return larger(smaller(tile * kRows, args.rows - kRows), 0); };
  alignas(64) BFloat16 ends[2][kRows][kDepth];
  alignas(64) float sums[2 * kRows][kPanel];
  for (int64_t panel = 0; panel < panels; ++panel) {
    for (int64_t t = 0; t < tiles; t += 2) {
      const bool both = t + 1 < tiles;
      const int64_t rows[2] = {row_of(t), row_of(t + 1)};
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      const auto multiply = [&](const BFloat16* x, const BFloat16* other, int64_t step, const BFloat16* weight) {
        _tile_loadd(6, weight, kPanel * 2 * sizeof(BFloat16));
        _tile_loadd(7, weight + kPanel, kPanel * 2 * sizeof(BFloat16));
        _tile_loadd(4, x, step);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (!both) return;
        _tile_loadd(5, other, step);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      };
      for (int factor = 0; factor < args.count; ++factor) {
        const BFloat16* weight = panel_of(args.factors[factor].packed, args.in, panel);
        const BFloat16* x = args.factors[factor].x + rows[0] * args.x_row;
        const BFloat16* other = args.factors[factor].x + rows[1] * args.x_row;
        for (int64_t k = 0; k < full; k += kDepth) multiply(x + k, other + k, stride, weight + k * kPanel);
        if (!rest) continue;
        const __mmask32 mask = (1u << rest) - 1;
        for (int i = 0; i < (both ? 2 : 1); ++i) {
          const BFloat16* source = (i ? other : x) + full;
          for (int64_t r = 0; r < smaller(kRows, args.rows); ++r, source += args.x_row) {
            _mm512_store_si512(ends[i][r], _mm512_maskz_loadu_epi16(mask, source));
          }
        }
        asm volatile("" ::: "memory");
        multiply(ends[0][0], ends[1][0], sizeof(ends[0][0]), weight + full * kPanel);
      }
      _tile_stored(0, sums[0], sizeof(sums[0]));
      _tile_stored(1, sums[0] + kRows, sizeof(sums[0]));
      if (both) {
        _tile_stored(2, sums[kRows], sizeof(sums[0]));
        _tile_stored(3, sums[kRows] + kRows, sizeof(sums[0]));
      }
      asm volatile("" ::: "memory");
      finish(args, rows[0], smaller(kRows, args.rows), panel, sums[0], kPanel);
      if (both) finish(args, rows[1], kRows, panel, sums[kRows], kPanel);
    }
  }
  _tile_release();
}

#endif

}  // namespace ISA
}  // namespace mmspatialmamba
