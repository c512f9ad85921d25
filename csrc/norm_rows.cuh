// What layer_norm_modulate and gated_residual_layer_norm_modulate share on CUDA. A block takes whole rows, a thread 8
// neighbouring columns of them (ITEMS times), kept in registers between the passes, so every tensor is read once.
// Types are looked up at run time: the branch is the same for all threads and hides behind the loads.
//
// Gradients of the modulation: a block walks a slice of one sample's rows and keeps its columns' sums in registers;
// the slices' sums are then added in order by a second kernel. No atomics: every run gives the same bits.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "sra2_c_api.h"

namespace sra2 {

constexpr int COLUMNS = 8;  // 16 bytes of bf16, two loads of 16 bytes of float32
constexpr int MAX_THREADS = 256;
constexpr int MAX_WARPS = MAX_THREADS / 32;

struct NormCuda {
  sra2_shape shape;
  sra2_rows x, branch, gate, shift, scale, x_new, y;
  sra2_rows dx_new, dy, dx, dbranch, dgate, dshift, dscale;
  float* mean;
  float* rstd;
  float* sums;  // (B, slices, 3, D): dscale, dshift, dgate
  float eps;
};

// VECTOR: rows are 16-byte aligned and D is a multiple of 8; else element by element, zeros beyond the row.
template <bool VECTOR>
__device__ __forceinline__ void load_columns(const sra2_rows& rows, int64_t row, int64_t col, int64_t D, float (&v)[8]) {
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
__global__ void __launch_bounds__(MAX_THREADS) norm_fwd_kernel(NormCuda a) {
  __shared__ float2 buffer[2][MAX_WARPS];
  const int64_t row = blockIdx.x, b = row / a.shape.N, D = a.shape.D;
  const sra2_rows& kept = BRANCH ? a.x_new : a.x;
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
        if (kept.dtype == SRA2_BF16) x[i][j] = __bfloat162float(__float2bfloat16_rn(x[i][j]));
      }
      store_columns<VECTOR>(kept, row, col, D, x[i]);
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
__global__ void __launch_bounds__(MAX_THREADS) norm_bwd_kernel(NormCuda a) {
  __shared__ float2 buffer[2][MAX_WARPS];
  const int64_t b = blockIdx.y, N = a.shape.N, D = a.shape.D;
  const int64_t first = N * blockIdx.x / gridDim.x, end = N * (blockIdx.x + 1) / gridDim.x;
  const sra2_rows& kept = BRANCH ? a.x_new : a.x;
  float dscale[ITEMS][8] = {}, dshift[ITEMS][8] = {}, dgate[ITEMS][8] = {};

  for (int64_t n = first; n < end; ++n) {
    const int64_t row = b * N + n;
    const float mean = a.mean[row], rstd = a.rstd[row];
    float h[ITEMS][8], g[ITEMS][8], other[8], g_sum = 0.f, gh_sum = 0.f;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const int64_t col = (static_cast<int64_t>(i) * blockDim.x + threadIdx.x) * COLUMNS;
      if (col >= D) continue;
      load_columns<VECTOR>(kept, row, col, D, h[i]);
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
  float* sums = a.sums + (b * gridDim.x + blockIdx.x) * 3 * D;
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
static __global__ void __launch_bounds__(MAX_THREADS) add_slices_kernel(NormCuda a, int64_t slices) {
  const int64_t col = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, b = blockIdx.y, D = a.shape.D;
  const sra2_rows& out = blockIdx.z == 0 ? a.dscale : blockIdx.z == 1 ? a.dshift : a.dgate;
  if (!out.data || col >= D) return;
  float total = 0.f;
  for (int64_t s = 0; s < slices; ++s) total += a.sums[((b * slices + s) * 3 + blockIdx.z) * D + col];
  if (out.dtype == SRA2_BF16)
    static_cast<__nv_bfloat16*>(out.data)[b * out.stride + col] = __float2bfloat16_rn(total);
  else
    static_cast<float*>(out.data)[b * out.stride + col] = total;
}

// Slices of a sample's rows: from the shape alone, so that the sums do not depend on the device. Enough blocks for
// every H100's 132 processors to hold eight, at least four rows each.
inline int64_t slices_per_sample(sra2_shape s) {
  const int64_t wanted = (1056 + s.B - 1) / (s.B > 0 ? s.B : 1), most = (s.N + 3) / 4;
  return wanted < 1 ? 1 : wanted > most ? most : wanted;
}

inline bool is_aligned(const sra2_rows& rows) {
  const int64_t row_bytes = rows.stride * (rows.dtype == SRA2_BF16 ? 2 : 4);
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && row_bytes % 16 == 0;  // a null output is aligned
}

inline bool is_vector(const NormCuda& a) {
  const sra2_rows* all[] = {&a.x,  &a.branch, &a.gate, &a.shift,   &a.scale, &a.x_new, &a.y,
                            &a.dy, &a.dx_new, &a.dx,   &a.dbranch};
  for (const sra2_rows* rows : all)
    if (rows->data && !is_aligned(*rows)) return false;
  return a.shape.D % COLUMNS == 0;
}

inline int threads_for(int64_t D, int items) {
  const int64_t needed = (D + COLUMNS * items - 1) / (COLUMNS * items);
  return static_cast<int>((needed + 31) / 32 * 32);
}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, int threads, cudaStream_t stream, A... arguments) {
#ifdef __CUDACC__
  kernel<<<grid, threads, 0, stream>>>(arguments...);
#else
  cuda_on_cpu::launch(kernel, grid, threads, stream, arguments...);  // tests/cuda_on_cpu
#endif
}

template <bool BRANCH>
cudaError_t launch_norm_fwd(const NormCuda& a, cudaStream_t stream) {
  const int64_t D = a.shape.D;
  const unsigned rows = static_cast<unsigned>(a.shape.B * a.shape.N);
  if (rows == 0) return cudaSuccess;
  if (!is_vector(a))
    launch(norm_fwd_kernel<BRANCH, false, 4>, rows, threads_for(D, 4), stream, a);
  else if (D <= MAX_THREADS * COLUMNS)
    launch(norm_fwd_kernel<BRANCH, true, 1>, rows, threads_for(D, 1), stream, a);
  else
    launch(norm_fwd_kernel<BRANCH, true, 4>, rows, threads_for(D, 4), stream, a);
  return cudaGetLastError();
}

template <bool BRANCH>
cudaError_t launch_norm_bwd(const NormCuda& a, cudaStream_t stream) {
  const int64_t D = a.shape.D, slices = slices_per_sample(a.shape);
  if (a.shape.B == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(slices), static_cast<unsigned>(a.shape.B));
  if (!is_vector(a))
    launch(norm_bwd_kernel<BRANCH, false, 4>, grid, threads_for(D, 4), stream, a);
  else if (D <= MAX_THREADS * COLUMNS)
    launch(norm_bwd_kernel<BRANCH, true, 1>, grid, threads_for(D, 1), stream, a);
  else
    launch(norm_bwd_kernel<BRANCH, true, 4>, grid, threads_for(D, 4), stream, a);
  if (a.dscale.data || a.dshift.data || a.dgate.data) {
    const dim3 sums(static_cast<unsigned>((D + 127) / 128), static_cast<unsigned>(a.shape.B), BRANCH ? 3 : 2);
    launch(add_slices_kernel, sums, 128, stream, a, slices);
  }
  return cudaGetLastError();
}

}  // namespace sra2
