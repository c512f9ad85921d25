// Enough of CUDA to run a .cu file as ordinary C++ on the CPU, for tests: the threads of a block are fibers that take
// turns until all stand at the same barrier; blocks run one after another, from the last to the first. Found before
// the real header by the include path. What it cannot show: races inside a warp, alignment faults, speed.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(n)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float __uint_as_float(unsigned u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidConfiguration = 9;
inline const char* cudaGetErrorString(cudaError_t error) { return error ? "invalid configuration" : "no error"; }
inline void cudaDriverGetVersion(int* version) { *version = 13000; }
inline void cudaRuntimeGetVersion(int* version) { *version = 13000; }

namespace cuda_on_cpu {
inline cudaError_t last_error = cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = cuda_on_cpu::last_error;
  cuda_on_cpu::last_error = cudaSuccess;
  return error;
}
// Of a grid's x only this many are run, the last ones, where a test has no time for all.
extern "C" inline __attribute__((used)) int64_t cuda_on_cpu_x = INT64_MAX;

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

struct Barrier {
  int arrived = 0, generation = 0;
};
struct Block {
  ucontext_t scheduler;
  std::vector<ucontext_t> fibers;
  std::vector<char> is_done;
  int current = 0;
  Barrier all;
  std::vector<Barrier> warps;
  std::vector<float> lanes;  // what each thread offers to a shuffle
  std::function<void()> body;
};
inline Block* block;

inline void wait(Barrier& barrier, int members) {
  const int generation = barrier.generation;
  if (++barrier.arrived == members) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) swapcontext(&block->fibers[block->current], &block->scheduler);
}

inline void run_fiber() {
  block->body();
  block->is_done[block->current] = 1;
}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, int threads, cudaStream_t, A... arguments) {
  constexpr size_t STACK = 64 << 10;
  const int64_t blocks = int64_t(grid.x) * grid.y * grid.z;
  if (blocks == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535 || threads < 1 || threads > 1024) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  std::vector<std::unique_ptr<char[]>> stacks;
  for (int t = 0; t < threads; ++t) stacks.emplace_back(new char[STACK]);
  gridDim = grid;
  blockDim = dim3(threads);
  for (int64_t linear = blocks - 1; linear >= 0; --linear) {
    blockIdx = dim3(linear % grid.x, linear / grid.x % grid.y, linear / grid.x / grid.y);
    if (blockIdx.x < grid.x - cuda_on_cpu_x) continue;
    Block now;
    block = &now;
    now.fibers.resize(threads);
    now.is_done.assign(threads, 0);
    now.warps.resize((threads + 31) / 32);
    now.lanes.assign(threads, NAN);
    now.body = [&] { kernel(arguments...); };
    for (int t = 0; t < threads; ++t) {
      getcontext(&now.fibers[t]);
      now.fibers[t].uc_stack.ss_sp = stacks[t].get();
      now.fibers[t].uc_stack.ss_size = STACK;
      now.fibers[t].uc_link = &now.scheduler;
      makecontext(&now.fibers[t], run_fiber, 0);
    }
    for (int left = threads; left;) {
      left = 0;
      for (int t = 0; t < threads; ++t) {
        if (now.is_done[t]) continue;
        ++left;
        now.current = t;
        threadIdx = dim3(t, 0, 0);
        swapcontext(&now.scheduler, &now.fibers[t]);
      }
    }
  }
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::block->all, blockDim.x); }

inline float __shfl_xor_sync(unsigned, float value, int offset) {
  cuda_on_cpu::Block& block = *cuda_on_cpu::block;
  cuda_on_cpu::Barrier& warp = block.warps[threadIdx.x / 32];
  const int self = static_cast<int>(threadIdx.x);
  block.lanes[self] = value;
  cuda_on_cpu::wait(warp, 32);
  const float got = block.lanes[self ^ offset];
  cuda_on_cpu::wait(warp, 32);
  return got;
}
