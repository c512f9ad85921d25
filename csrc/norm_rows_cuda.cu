// What layer_norm_modulate and gated_residual_layer_norm_modulate share on CUDA. A block takes whole rows, a thread 8
// neighbouring columns of them (ITEMS times), kept in registers between the passes, so every tensor is read once.
// Types are looked up at run time: the branch is the same for all threads and hides behind the loads.
//
// Gradients of the modulation: a block walks a slice of one sample's rows and keeps its columns' sums in registers;
// the slices' sums are then added in order by a second kernel. No atomics: every run gives the same bits.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "sra2_c_api.h"

namespace sra2 {

constexpr int COLUMNS = 8;  // 16 bytes of bf16, two loads of 16 bytes of float32
constexpr int MAX_THREADS = 256;
constexpr int MAX_WARPS = MAX_THREADS / 32;

// VECTOR: rows are 16-byte aligned and D is a multiple of 8; else element by element, zeros beyond the row.
template <bool VECTOR>
__device__ __forceinline__ void load_columns(const sra2_rows& rows, int64_t row, int64_t col, int64_t D,
                                             float (&v)[8]) {
  const int64_t at = row * rows.stride + col;
  if (rows.dtype == SRA2_BF16) {
    const __nv_bfloat16* p = static_cast<const __nv_bfloat16*>(rows.data) + at;
    if constexpr (VECTOR) {
      const uint4 raw = *reinterpret_cast<const uint4*>(p);
      const unsigned pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        v[2 * j] = __uint_as_float(pairs[j] << 16);
        v[2 * j + 1] = __uint_as_float(pairs[j] & 0xffff0000u);
      }
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = col + j < D ? __bfloat162float(p[j]) : 0.f;
    }
  } else {
    const float* p = static_cast<const float*>(rows.data) + at;
    if constexpr (VECTOR) {
      const float4 low = *reinterpret_cast<const float4*>(p), high = *reinterpret_cast<const float4*>(p + 4);
      v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
      v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = col + j < D ? p[j] : 0.f;
    }
  }
}

template <bool VECTOR>
__device__ __forceinline__ void store_columns(const sra2_rows& rows, int64_t row, int64_t col, int64_t D,
                                              const float (&v)[8]) {
  const int64_t at = row * rows.stride + col;
  if (rows.dtype == SRA2_BF16) {
    __nv_bfloat16* p = static_cast<__nv_bfloat16*>(rows.data) + at;
    if constexpr (VECTOR) {
      unsigned pairs[4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
        pairs[j] = __bfloat16_as_ushort(__float2bfloat16_rn(v[2 * j])) |
                   static_cast<unsigned>(__bfloat16_as_ushort(__float2bfloat16_rn(v[2 * j + 1]))) << 16;
      *reinterpret_cast<uint4*>(p) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (col + j < D) p[j] = __float2bfloat16_rn(v[j]);
    }
  } else {
    float* p = static_cast<float*>(rows.data) + at;
    if constexpr (VECTOR) {
      *reinterpret_cast<float4*>(p) = make_float4(v[0], v[1], v[2], v[3]);
      *reinterpret_cast<float4*>(p + 4) = make_float4(v[4], v[5], v[6], v[7]);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (col + j < D) p[j] = v[j];
    }
  }
}

// The sums of a and b over the block, the same bits in every thread. Calls alternate between two buffers, so that one
// barrier each is enough.
__device__ __forceinline__ float2 block_sum(float a, float b, float2 (&buffer)[2][MAX_WARPS], int call) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) {
    a += __shfl_xor_sync(0xffffffffu, a, offset);
    b += __shfl_xor_sync(0xffffffffu, b, offset);
  }
  float2* of_warps = buffer[call & 1];
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = make_float2(a, b);
  __syncthreads();
  a = b = 0.f;
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) {
    a += of_warps[warp].x;
    b += of_warps[warp].y;
  }
  return make_float2(a, b);
}

template <bool BRANCH, bool VECTOR, int ITEMS>
__global__ void __launch_bounds__(MAX_THREADS) norm_fwd_kernel(sra2_norm a) {
  __shared__ float2 buffer[2][MAX_WARPS];
  const int64_t row = blockIdx.x, b = row / a.shape.N, D = a.shape.D;
  float x[ITEMS][8], other[8], total = 0.f, squares = 0.f;

#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int64_t col = (static_cast<int64_t>(i) * blockDim.x + threadIdx.x) * COLUMNS;
#pragma unroll
    for (int j = 0; j < 8; ++j) x[i][j] = 0.f;
    if (col >= D) continue;
    load_columns<VECTOR>(a.x, row, col, D, x[i]);
    if constexpr (BRANCH) {
      float gate[8];
      load_columns<VECTOR>(a.branch, row, col, D, other);
      load_columns<VECTOR>(a.gate, b, col, D, gate);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        x[i][j] += gate[j] * other[j];  // the norm is of the x_new that is kept for backward
        if (a.x_new.dtype == SRA2_BF16) x[i][j] = __bfloat162float(__float2bfloat16_rn(x[i][j]));
      }
      store_columns<VECTOR>(a.x_new, row, col, D, x[i]);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) total += x[i][j];
  }
  const float mean = block_sum(total, 0.f, buffer, 0).x / static_cast<float>(D);
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int64_t col = (static_cast<int64_t>(i) * blockDim.x + threadIdx.x) * COLUMNS;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      x[i][j] = col + j < D ? x[i][j] - mean : 0.f;
      squares += x[i][j] * x[i][j];
    }
  }
  const float rstd = rsqrtf(block_sum(squares, 0.f, buffer, 1).x / static_cast<float>(D) + a.eps);
  if (threadIdx.x == 0) {
    a.mean[row] = mean;
    a.rstd[row] = rstd;
  }
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int64_t col = (static_cast<int64_t>(i) * blockDim.x + threadIdx.x) * COLUMNS;
    if (col >= D) continue;
    float shift[8];
    load_columns<VECTOR>(a.scale, b, col, D, other);
    load_columns<VECTOR>(a.shift, b, col, D, shift);
#pragma unroll
    for (int j = 0; j < 8; ++j) x[i][j] = x[i][j] * rstd * (1.f + other[j]) + shift[j];
    store_columns<VECTOR>(a.y, row, col, D, x[i]);
  }
}

template <bool BRANCH, bool VECTOR, int ITEMS>
__global__ void __launch_bounds__(MAX_THREADS) norm_bwd_kernel(sra2_norm a) {
  __shared__ float2 buffer[2][MAX_WARPS];
  const int64_t b = blockIdx.x, N = a.shape.N, D = a.shape.D;
  const int64_t first = N * blockIdx.y / gridDim.y, end = N * (blockIdx.y + 1) / gridDim.y;
  float dscale[ITEMS][8] = {}, dshift[ITEMS][8] = {}, dgate[ITEMS][8] = {};

  for (int64_t n = first; n < end; ++n) {
    const int64_t row = b * N + n;
    const float mean = a.mean[row], rstd = a.rstd[row];
    float h[ITEMS][8], g[ITEMS][8], other[8], g_sum = 0.f, gh_sum = 0.f;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const int64_t col = (static_cast<int64_t>(i) * blockDim.x + threadIdx.x) * COLUMNS;
      if (col >= D) continue;
      load_columns<VECTOR>(a.x, row, col, D, h[i]);
      load_columns<VECTOR>(a.dy, row, col, D, g[i]);
      load_columns<VECTOR>(a.scale, b, col, D, other);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        h[i][j] = (h[i][j] - mean) * rstd;  // beyond the row not zero, but there g is
        dscale[i][j] += g[i][j] * h[i][j];
        dshift[i][j] += g[i][j];
        g[i][j] *= 1.f + other[j];
        g_sum += g[i][j];
        gh_sum += g[i][j] * h[i][j];
      }
    }
    const float2 sums = block_sum(g_sum, gh_sum, buffer, static_cast<int>(n));
    const float g_mean = sums.x / static_cast<float>(D), gh_mean = sums.y / static_cast<float>(D);
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const int64_t col = (static_cast<int64_t>(i) * blockDim.x + threadIdx.x) * COLUMNS;
      if (col >= D) continue;
#pragma unroll
      for (int j = 0; j < 8; ++j) g[i][j] = rstd * (g[i][j] - g_mean - h[i][j] * gh_mean);
      if constexpr (BRANCH) {
        if (a.dx_new.data) {
          load_columns<VECTOR>(a.dx_new, row, col, D, other);
#pragma unroll
          for (int j = 0; j < 8; ++j) g[i][j] += other[j];
        }
        if (a.dgate.data) {
          load_columns<VECTOR>(a.branch, row, col, D, other);
#pragma unroll
          for (int j = 0; j < 8; ++j) dgate[i][j] += g[i][j] * other[j];
        }
        if (a.dbranch.data) {
          load_columns<VECTOR>(a.gate, b, col, D, other);
#pragma unroll
          for (int j = 0; j < 8; ++j) other[j] *= g[i][j];
          store_columns<VECTOR>(a.dbranch, row, col, D, other);
        }
      }
      if (a.dx.data) store_columns<VECTOR>(a.dx, row, col, D, g[i]);
    }
  }
  float* sums = a.workspace + (b * gridDim.y + blockIdx.y) * 3 * D;
  const sra2_rows into{sums, D, SRA2_F32};
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int64_t col = (static_cast<int64_t>(i) * blockDim.x + threadIdx.x) * COLUMNS;
    if (col >= D) continue;
    if (a.dscale.data) store_columns<VECTOR>(into, 0, col, D, dscale[i]);
    if (a.dshift.data) store_columns<VECTOR>(into, 1, col, D, dshift[i]);
    if (BRANCH && a.dgate.data) store_columns<VECTOR>(into, 2, col, D, dgate[i]);
  }
}

// The slices' sums of one column, added in order; blockIdx.z: dscale, dshift, dgate.
__global__ void __launch_bounds__(MAX_THREADS) add_slices_kernel(sra2_norm a, int64_t slices) {
  const int64_t b = blockIdx.x, col = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x, D = a.shape.D;
  const sra2_rows& out = blockIdx.z == 0 ? a.dscale : blockIdx.z == 1 ? a.dshift : a.dgate;
  if (!out.data || col >= D) return;
  float total = 0.f;
  for (int64_t s = 0; s < slices; ++s) total += a.workspace[((b * slices + s) * 3 + blockIdx.z) * D + col];
  if (out.dtype == SRA2_BF16)
    static_cast<__nv_bfloat16*>(out.data)[b * out.stride + col] = __float2bfloat16_rn(total);
  else
    static_cast<float*>(out.data)[b * out.stride + col] = total;
}

// Slices of a sample's rows: from the shape alone, so that the sums do not depend on the device. Enough blocks for
// every H100's 132 processors to hold eight, at least four rows each.
static int64_t slices_per_sample(sra2_shape s) {
  const int64_t wanted = (1056 + s.B - 1) / (s.B > 0 ? s.B : 1), most = (s.N + 3) / 4;
  return wanted < 1 ? 1 : wanted > most ? most : wanted;
}

static bool is_aligned(const sra2_rows& rows) {
  const int64_t row_bytes = rows.stride * (rows.dtype == SRA2_BF16 ? 2 : 4);
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && row_bytes % 16 == 0;  // a null output is aligned
}

static bool is_vector(const sra2_norm& a) {
  const sra2_rows* all[] = {&a.x, &a.branch, &a.gate,   &a.shift, &a.scale,  &a.x_new,
                            &a.y, &a.dy,     &a.dx_new, &a.dx,    &a.dbranch};
  for (const sra2_rows* rows : all)
    if (rows->data && !is_aligned(*rows)) return false;
  return a.shape.D % COLUMNS == 0;
}

static int threads_for(int64_t D, int items) {
  const int64_t needed = (D + COLUMNS * items - 1) / (COLUMNS * items);
  return static_cast<int>((needed + 31) / 32 * 32);
}

// Rows or samples are counted in the grid's x, which holds 2^31 - 1 of them: y and z hold 65,535.
struct Grid {
  int64_t x, y = 1, z = 1;
};

template <class... A>
static void launch(void (*kernel)(A...), Grid blocks, int threads, void* stream, A... arguments) {
  if (blocks.x * blocks.y == 0) return;  // which CUDA refuses
  const dim3 grid(blocks.x > INT32_MAX ? 0 : static_cast<unsigned>(blocks.x), static_cast<unsigned>(blocks.y),
                  static_cast<unsigned>(blocks.z));  // too many are refused, not cut to their lower 32 bits
#ifdef __CUDACC__
  kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
#else
  cuda_on_cpu::launch(kernel, grid, threads, stream, arguments...);  // tests/cuda_on_cpu
#endif
}

using Kernel = void (*)(sra2_norm);

// The variant that fits: element by element, or in vectors, one item a thread or four.
static void launch_rows(Kernel element_wise, Kernel one, Kernel four, const sra2_norm& a, Grid grid, void* stream) {
  const bool fits_one = is_vector(a) && a.shape.D <= MAX_THREADS * COLUMNS;
  const Kernel kernel = fits_one ? one : is_vector(a) ? four : element_wise;
  launch(kernel, grid, threads_for(a.shape.D, fits_one ? 1 : 4), stream, a);
}

template <bool BRANCH>
static void launch_fwd(const sra2_norm& a, void* stream) {
  launch_rows(norm_fwd_kernel<BRANCH, false, 4>, norm_fwd_kernel<BRANCH, true, 1>, norm_fwd_kernel<BRANCH, true, 4>, a,
              {a.shape.B * a.shape.N}, stream);
}

template <bool BRANCH>
static void launch_bwd(const sra2_norm& a, void* stream) {
  launch_rows(norm_bwd_kernel<BRANCH, false, 4>, norm_bwd_kernel<BRANCH, true, 1>, norm_bwd_kernel<BRANCH, true, 4>, a,
              {a.shape.B, slices_per_sample(a.shape)}, stream);
}

}  // namespace sra2

using namespace sra2;

int32_t sra2_norm_fwd_cuda(const sra2_norm* args, void* stream) {
  args->branch.data ? launch_fwd<true>(*args, stream) : launch_fwd<false>(*args, stream);
  return cudaGetLastError();
}

int32_t sra2_norm_bwd_cuda(const sra2_norm* args, void* stream) {
  const sra2_norm& a = *args;
  a.branch.data ? launch_bwd<true>(a, stream) : launch_bwd<false>(a, stream);
  if (a.dscale.data || a.dshift.data || a.dgate.data)
    launch(add_slices_kernel, {a.shape.B, (a.shape.D + 127) / 128, a.dgate.data ? 3 : 2}, 128, stream, a,
           slices_per_sample(a.shape));
  return cudaGetLastError();
}

int64_t sra2_norm_workspace(sra2_shape shape) { return shape.B * slices_per_sample(shape) * 3 * shape.D; }

int32_t sra2_operators(void) { return SRA2_OPERATORS; }

int32_t sra2_cuda_driver_needed(void) {
  int have = 0, built = 0;
  cudaDriverGetVersion(&have);  // 0 without a driver
  cudaRuntimeGetVersion(&built);
  return have / 1000 >= built / 1000 ? 0 : built;
}

const char* sra2_cuda_error_string(int32_t error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
