// The CPU kernels' interface: plain data, and a table of functions for each instruction set. Knows nothing of torch.
#pragma once

#include <stdint.h>

namespace mmspatialmamba {

constexpr int kBlock = 32;  // channels that one task handles
constexpr int kTaps = 25;   // of a fusion: 9 of dilation 1, then 8 of dilation 3, then 8 of dilation 5

enum class Type { kFloat, kBFloat16, kHalf };

struct BFloat16 {
  uint16_t bits;
};

// A (batch, channel, height, width) tensor; strides count elements.
struct Map {
  void* data;
  Type type;
  int64_t batch, channel, row, column;
};

// 3x3 kernels, (dim, 9), of floats or bfloat16.
struct Kernels3x3 {
  const void* data;
  Type type;
};

// The fusion's kernels of dilation 1, 3 and 5, and the weight of each.
struct FusionKernels {
  Kernels3x3 of[3];
  float alpha[3];
};

struct ScanArgs {
  int64_t batch, dim, height, width;
  Map u, delta;
  const float* A;     // (dim)
  const float* B;     // (batch, height * width)
  const float* C;     // (batch, height * width)
  const float* D;     // (dim)
  FusionKernels kernels;
  const float* bias;  // (dim), or null
  bool softplus;
};

struct ScanGradients {
  Map y;        // the gradient that comes in
  Map u, delta; // those that go out
  float* B;     // (blocks, batch, height * width), to be summed over blocks
  float* C;     // like B
  float* sums;  // (kTaps + 3, batch, dim), to be summed over batch: of taps, A, D, bias
};

struct FusionArgs {
  int64_t batch, dim, height, width;
  Map h;
  FusionKernels kernels;
};

struct SelectiveScanArgs {
  int64_t batch, dim, length, state;
  Map u, delta;       // (batch, dim, 1, length)
  const float* A;     // (dim, state)
  const float* B;     // (batch, state, length)
  const float* bias;  // (dim), or null
  bool softplus;
};

// What a depthwise convolution ends with: nothing, SiLU, or the addition of its input.
enum class Finish { kNone, kSilu, kResidual };

struct ConvArgs {
  int64_t batch, dim, height, width;
  Map x;
  Kernels3x3 weights;
  const float* bias;  // (dim)
  Finish finish;
};

// The depthwise convolution of a downsampling layer, of stride 2, between two ReLUs.
struct DownsamplingArgs {
  int64_t width, dim;       // of the input; dim is a multiple of vectors(1)
  int64_t tap;              // floats from one tap of the weights to the next
  const float* weights;     // (9, dim)
  const float* bias;        // (dim)
  int64_t x_pixel, y_pixel; // elements from one pixel to the next
};

// A (rows, dim) tensor whose channels lie side by side.
struct Matrix {
  void* data;
  Type type;
  int64_t row;
};

struct NormArgs {
  int64_t rows, dim;
  Matrix x, gate;       // the gate's data may be null: then it is a plain LayerNorm
  const float* weight;  // (dim), with zeros up to vectors(dim)
  const float* bias;    // like weight
  float eps;
};

struct GeluArgs {
  int64_t rows, dim;
  Matrix x;
  const float* bias;  // (dim), with zeros up to vectors(dim)
};

// What a product ends with.
enum class Activation { kNone, kRelu, kGelu };

// A product's weight, (out, in), of floats or bfloat16; steps count elements. What is packed of it is multiplied by a scale
// for each output channel where there is one.
struct WeightArgs {
  const void* data;
  Type type;
  int64_t out_step, in_step, out, in;
  const float* scale;  // (out), or null
};

// Rows, and the weights that they meet, by pack_linear or pack_linear_bfloat16.
template <class T>
struct Factors {
  const T* x;
  const T* packed;
};

// y = x weight^T + bias + residual, and its activation; with several factors the sum of their products. The channels of
// x, residual and y lie side by side. y may be the residual in float32 alone.
template <class T>
struct LinearArgs {
  int64_t rows, in, out;
  Factors<T> factors[3];
  int count;              // of the factors
  int64_t x_row;
  const float* bias;      // (out), with zeros up to kWidestPanel; or null
  Activation activation;
  const T* residual;      // or null
  int64_t residual_row;
  T* y;
  int64_t y_row;
};

// y += left^T right, of floats: (rows, out) and (rows, in) to (out, in). y has memory for whole tiles: up to a multiple of
// tile_rows in `out` and of panel in `in`.
struct OuterArgs {
  int64_t rows, out, in;
  const float* left;
  int64_t left_row;
  const float* right;
  int64_t right_row;
  float* y;
  int64_t y_row;
};

// The weights are packed in panels of so many output channels, or fewer with narrower vectors; in bfloat16 with zeros
// up to a multiple of kDepth input channels.
constexpr int kWidestPanel = 32;
constexpr int kDepth = 32;

// `dim` floats in whole vectors of any instruction set.
inline int64_t vectors(int64_t dim) { return (dim + 15) / 16 * 16; }

// A task is one image of the batch and one block of channels. `scratch` is memory for its own use, see below, aligned
// to 64 bytes.
struct Kernels {
  const char* instruction_set;
  void (*scan)(const ScanArgs&, const Map& y, int64_t batch, int64_t block, float* scratch);
  void (*scan_backward)(const ScanArgs&, const ScanGradients&, int64_t batch, int64_t block, float* scratch);
  void (*fusion)(const FusionArgs&, const Map& g, int64_t batch, int64_t block, float* scratch);
  // sums: (kTaps, batch, dim)
  void (*fusion_backward)(const FusionArgs&, const Map& grad, const Map& grad_h, float* sums, int64_t batch,
                          int64_t block, float* scratch);
  // h: (batch, dim, state, length)
  void (*selective_scan)(const SelectiveScanArgs&, float* h, int64_t batch, int64_t block, float* scratch);
  // B: (blocks, batch, state, length); A: (batch, dim, state); bias: (batch, dim)
  void (*selective_scan_backward)(const SelectiveScanArgs&, const float* grad, const float* h, const Map& grad_u,
                                  const Map& grad_delta, float* grad_A, float* grad_B, float* grad_bias,
                                  int64_t batch, int64_t block, float* scratch);
  // Rows `first` to `last` - 1.
  void (*depthwise_conv)(const ConvArgs&, const Map& y, int64_t batch, int64_t block, int64_t first, int64_t last,
                         float* scratch);
  // sums: (10, batch, dim), of the 9 weights and of the bias
  void (*depthwise_conv_backward)(const ConvArgs&, const Map& grad, const Map& grad_x, float* sums, int64_t batch,
                                  int64_t block, float* scratch);
  // One row of the output from three of the input, null where it has none.
  void (*downsampling_conv)(const DownsamplingArgs&, const float* const* rows, float* y);
  void (*downsampling_conv_bfloat16)(const DownsamplingArgs&, const BFloat16* const* rows, BFloat16* y);
  // Of an image: grad and y are alike, `height` is the input's. A task has the output's rows `first` to `last` - 1, and
  // of the input's those at twice their place and one below. sums: (10, dim), of the 9 weights and of the bias
  void (*downsampling_conv_backward)(const DownsamplingArgs&, const float* x, int64_t x_row, const float* y,
                                     const float* grad, int64_t y_row, int64_t height, int64_t first, int64_t last,
                                     float* grad_x, float* sums, float* scratch);
  void (*gated_layer_norm)(const NormArgs&, const Matrix& out, int64_t first, int64_t last, float* scratch);
  // The same without a gate, each channel of the output being a row of `planes`.
  void (*layer_norm_planes)(const NormArgs&, const Matrix& planes, int64_t first, int64_t last, float* scratch);
  // sums: (2, dim), of weight and bias
  void (*gated_layer_norm_backward)(const NormArgs&, const Matrix& grad, const Matrix& grad_x, const Matrix& grad_gate,
                                    float* sums, int64_t first, int64_t last, float* scratch);
  void (*biased_gelu)(const GeluArgs&, const Matrix& out, int64_t first, int64_t last, float* scratch);
  // sums: (dim), of the bias; out, for biased_gelu's output, has null data where that is not wanted; grad_x may be grad
  void (*biased_gelu_backward)(const GeluArgs&, const Matrix& grad, const Matrix& grad_x, const Matrix& out,
                               float* sums, int64_t first, int64_t last, float* scratch);
  // Output channels that are packed, and computed, together. A multiple of `tile_rows` rows is best.
  int64_t panel, tile_rows;
  // Of floats. packed: `in` * kWidestPanel for each kWidestPanel output channels, of which a panel is a part
  void (*pack_linear)(const WeightArgs&, float* packed, int64_t panel);
  void (*linear)(const LinearArgs<float>&);
  // scratch: `rows` floats for each row and column of y, whole tiles of them
  void (*outer)(const OuterArgs&, float* scratch);
  // The same in bfloat16, from weights of floats or of bfloat16. Sums are floats.
  int64_t tile_rows_bfloat16;
  void (*pack_linear_bfloat16)(const WeightArgs&, BFloat16* packed, int64_t panel);
  void (*linear_bfloat16)(const LinearArgs<BFloat16>&);
};

inline int64_t blocks(int64_t dim) { return (dim + kBlock - 1) / kBlock; }

// Floats of scratch memory that a task needs.
namespace scratch {
inline int64_t rows(int64_t count, int64_t width) { return count * width * kBlock; }
inline int64_t scan(int64_t width) { return rows(11, width + 10) + rows(3, width); }
inline int64_t scan_backward(int64_t height, int64_t width) { return rows(height + 11, width + 10) + rows(6, width); }
inline int64_t fusion(int64_t width) { return rows(11, width + 10) + rows(1, width); }
inline int64_t fusion_backward(int64_t width) { return rows(22, width + 10) + rows(4, width); }
inline int64_t selective_scan() { return rows(3, 64); }
inline int64_t selective_scan_backward(int64_t state) { return rows(6, 64) + rows(2, state); }
inline int64_t depthwise_conv(int64_t width) { return rows(3, width + 10) + rows(1, width); }
inline int64_t depthwise_conv_backward(int64_t width) { return rows(8, width + 10) + rows(3, width); }
inline int64_t downsampling_conv_backward(int64_t width, int64_t dim) { return (2 * ((width + 1) / 2 + 1) + 10) * dim; }
inline int64_t gated_layer_norm(int64_t dim) { return 3 * vectors(dim); }
inline int64_t layer_norm_planes(int64_t dim) { return 2 * vectors(dim) + rows(1, vectors(dim) + 16); }
inline int64_t gated_layer_norm_backward(int64_t dim) { return 7 * vectors(dim); }
inline int64_t biased_gelu(int64_t dim) { return 2 * vectors(dim); }
inline int64_t biased_gelu_backward(int64_t dim) { return 5 * vectors(dim); }
}  // namespace scratch

}  // namespace mmspatialmamba
