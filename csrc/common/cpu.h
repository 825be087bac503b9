// What the interfaces of the CPU kernels share. An op's cpu.cpp is compiled once for each instruction set, in a
// namespace of its own; its functions are reached through a table for each. A task is one image of the batch and one
// block of channels, or some rows; it gets memory for its own use, aligned to 64 bytes, of as many floats as a table's
// *_scratch tell.
#pragma once

#include "common/types.h"

// The name of an op's table for the instruction set ISA.
#define MMSPATIALMAMBA_FOR_ISA(op) MMSPATIALMAMBA_PASTE(op, ISA)
#define MMSPATIALMAMBA_PASTE(op, isa) MMSPATIALMAMBA_PASTED(op, isa)
#define MMSPATIALMAMBA_PASTED(op, isa) op##_##isa

namespace mmspatialmamba {

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
