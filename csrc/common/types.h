// What kernels and the files that bind them share: plain data. Knows nothing of torch.
#pragma once

#include <stdint.h>

namespace mmspatialmamba {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16 };

// A (batch, channel, height, width) tensor; strides count elements.
struct Map {
  void* data;
  DType dtype;
  int64_t batch, channel, row, column;
};

// What a scan over maps takes beside u and delta, float32 and contiguous: A and D (dim), B and C (batch, height *
// width), bias (dim) or null.
struct ScanParameters {
  const float *A, *B, *C, *D, *bias;
};

// An op's cpu.cpp is compiled once for each instruction set, in a namespace of its own; its functions are reached
// through a table for each. A task is one image of the batch and one block of channels, or some rows; it gets memory
// for its own use, aligned to 64 bytes, of as many floats as a table's *_scratch tell.
constexpr int kBlock = 32;  // channels that one task handles

// Of a map, in a form that 64-bit products can be made of.
struct Shape {
  int64_t batch, dim, height, width;
};

// 3x3 kernels, (dim, 9), of float32 or bfloat16.
struct Kernels3x3 {
  const void* data;
  DType dtype;
};

static inline int64_t blocks(int64_t dim) { return (dim + kBlock - 1) / kBlock; }

// Floats of `count` rows of a block of channels.
static inline int64_t row_floats(int64_t count, int64_t width) { return count * width * kBlock; }

}  // namespace mmspatialmamba

// The name of an op's table for the instruction set ISA.
#define MMSPATIALMAMBA_FOR_ISA(op) MMSPATIALMAMBA_PASTE(op, ISA)
#define MMSPATIALMAMBA_PASTE(op, isa) MMSPATIALMAMBA_PASTED(op, isa)
#define MMSPATIALMAMBA_PASTED(op, isa) op##_##isa
