// As much of CUDA as the kernels in csrc use, on the CPU, for tests. A block's threads are fibers that take turns at
// barriers and shuffles, in an order that changes from turn to turn, so that a missing barrier shows; shared memory
// starts as NaN, is exactly as large as asked for and has its end watched; asynchronous copies happen as late as they may.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static
#define MMSPATIALMAMBA_SHARED(name) unsigned char* const name = emulator::shared_memory

using std::max;
using std::min;

using cudaStream_t = void*;

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim;

namespace emulator {

constexpr size_t kStack = 128 << 10;
constexpr size_t kGuard = 64;
constexpr size_t kSharedLimit = 99 << 10;  // of the smallest supported chip

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated kernel, block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
  std::abort();
}

enum class State { kReady, kAtBarrier, kAtShuffle, kDone };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  int group;
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf here;
  bool started;
  State state;
  int shuffles;
  int group;
  std::vector<Copy> copies;
};

inline unsigned char* shared_memory;
inline std::vector<Fiber> fibers;
inline Fiber* running;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline float shuffled[2][1024];

inline void enter() {
  body();
  running->state = State::kDone;
  _longjmp(scheduler, 1);
}

[[gnu::noinline]] inline void resume(Fiber& fiber) {
  running = &fiber;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

[[gnu::noinline]] inline void wait(State state) {
  running->state = state;
  if (!_setjmp(running->here)) _longjmp(scheduler, 1);
}

// Frees fibers [begin, end) if all that still run have come to `state`.
inline bool release(size_t begin, size_t end, State state) {
  bool any = false;
  for (size_t i = begin; i < end; ++i) {
    if (fibers[i].state != state && fibers[i].state != State::kDone) return false;
    any |= fibers[i].state == state;
  }
  for (size_t i = begin; i < end; ++i) {
    if (fibers[i].state == state) fibers[i].state = State::kReady;
  }
  return any;
}

inline void run_block(unsigned threads) {
  static uint32_t random = 1;
  fibers.resize(max<size_t>(fibers.size(), threads));
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    makecontext(&fiber.start, enter, 0);
    fiber.started = false;
    fiber.state = State::kReady;
    fiber.shuffles = fiber.group = 0;
    fiber.copies.clear();
  }
  while (true) {
    random = random * 1664525u + 1013904223u;
    const unsigned first = (random >> 8) % threads, step = random >> 31 ? 1 : threads - 1;
    bool ready = false, released = false, done = true;
    for (unsigned i = 0, at = first; i < threads; ++i, at = (at + step) % threads) {
      if (fibers[at].state != State::kReady) continue;
      // Not all warps each time: they drift apart, as on a GPU.
      if (ready && random >> (16 + at / 32 % 8) & 1) continue;
      ready = true;
      threadIdx.x = at;
      resume(fibers[at]);
    }
    for (unsigned i = 0; i < threads; i += 32) released |= release(i, min(i + 32, threads), State::kAtShuffle);
    if (ready || released) continue;
    for (unsigned i = 0; i < threads; ++i) done &= fibers[i].state == State::kDone;
    if (done) return;
    if (!release(0, threads, State::kAtBarrier)) fail("threads wait for each other");
  }
}

inline float exchange(float value, int from) {
  const int lane = threadIdx.x % 32, turn = running->shuffles++ & 1;
  const unsigned thread = threadIdx.x;
  shuffled[turn][thread] = value;
  wait(State::kAtShuffle);
  return shuffled[turn][from < 0 || from > 31 ? thread : thread - lane + from];
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::State::kAtBarrier); }
inline float __shfl_up_sync(unsigned, float x, int n) { return emulator::exchange(x, threadIdx.x % 32 - n); }
inline float __shfl_down_sync(unsigned, float x, int n) { return emulator::exchange(x, threadIdx.x % 32 + n); }
inline float __shfl_xor_sync(unsigned, float x, int n) { return emulator::exchange(x, threadIdx.x % 32 ^ n); }

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  if (bytes != 4 && bytes != 8 && bytes != 16) emulator::fail("no such asynchronous copy");
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes)
    emulator::fail("misaligned asynchronous copy");
  emulator::running->copies.push_back({to, from, bytes, emulator::running->group});
}
inline void __pipeline_commit() { ++emulator::running->group; }
inline void __pipeline_wait_prior(int n) {
  auto& copies = emulator::running->copies;
  size_t kept = 0;
  for (const auto& copy : copies) {
    if (copy.group < emulator::running->group - n)
      std::memcpy(copy.to, copy.from, copy.bytes);
    else
      copies[kept++] = copy;
  }
  copies.resize(kept);
}

inline float __fdividef(float x, float y) { return x / y; }
inline float __int_as_float(int x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}

using __half = _Float16;
inline float __half2float(__half x) { return x; }
inline __half __float2half(float x) { return static_cast<__half>(x); }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) { return __int_as_float(x.bits << 16); }
inline __nv_bfloat16 __float2bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

namespace mmspatialmamba::cuda {

template <class Kernel, class Argument>
void launch(Kernel kernel, int64_t blocks, int threads, size_t shared_bytes, cudaStream_t, const Argument& argument) {
  if (threads % 32 || threads > 1024 || shared_bytes > emulator::kSharedLimit) emulator::fail("no such launch");
  std::vector<unsigned char> memory(shared_bytes + emulator::kGuard + 16);
  emulator::shared_memory = memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16;
  const unsigned char* guard = emulator::shared_memory + shared_bytes;
  emulator::body = [&] { kernel(argument); };
  blockDim.x = threads;
  for (int64_t block = 0; block < blocks; ++block) {
    std::fill(memory.begin(), memory.end(), 0xff);
    blockIdx.x = static_cast<unsigned>(block);
    emulator::run_block(threads);
    for (size_t i = 0; i < emulator::kGuard; ++i) {
      if (guard[i] != 0xff) emulator::fail("a write beyond the end of shared memory");
    }
  }
}

}  // namespace mmspatialmamba::cuda
