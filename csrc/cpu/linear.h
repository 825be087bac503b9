// The tile of a matrix product that lies in registers: some rows, two vectors wide.
#pragma once

#include "vec.h"

namespace mmspatialmamba {
namespace ISA {

#if defined(__AVX512F__)
constexpr int64_t kTileRows = 12;
#else
constexpr int64_t kTileRows = 6;
#endif
constexpr int64_t kPanel = 2 * kLanes;

}  // namespace ISA
}  // namespace mmspatialmamba
