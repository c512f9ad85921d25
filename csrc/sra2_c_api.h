/* The kernels' own C ABI: no torch, no C++ types. Every function returns 0, or an error number (CPU: 1 = out of memory;
   CUDA: a cudaError_t). An op adds its functions below; files named _cpu.cpp and _cuda.cu define them. */
#pragma once
#include <stdint.h>
#define SRA2_API __attribute__((visibility("default")))
#ifdef __cplusplus
extern "C" {
#endif

enum { SRA2_F32 = 0, SRA2_BF16 = 1 };

/* Rows of D elements, unit stride within a row. data may be null where an output is not wanted. */
typedef struct {
  void* data;
  int64_t stride; /* elements from one row to the next */
  int32_t dtype;  /* SRA2_F32 or SRA2_BF16 */
} sra2_rows;

/* x and its like have B * N rows, shift/scale/gate and their gradients B. */
typedef struct {
  int64_t B, N, D;
} sra2_shape;

/* Runs f over [begin, end) in pieces of at least grain; torch's pool (torch_parallel_for), or null for one thread. */
typedef int32_t (*sra2_parallel)(int64_t begin, int64_t end, int64_t grain, void (*f)(int64_t, int64_t, void*),
                                 void* context);

/* Raised with every change of an operator's schema (sra2_fast/ops/): the Python beside a library that was built before
   it would hand the kernels other arguments. sra2_fast/backends.py compares; each library has the function. */
#define SRA2_OPERATORS 2
SRA2_API int32_t sra2_operators(void);
/* "avx512", "avx2" or "base": the instruction set the CPU kernels use. SRA2_CPU_ISA=avx2|base asks for a lesser one. */
SRA2_API const char* sra2_cpu_isa(void);
/* 0 where the driver can run this build, else the version it needs (13000 is CUDA 13.0). */
SRA2_API int32_t sra2_cuda_driver_needed(void);
SRA2_API const char* sra2_cuda_error_string(int32_t error);

/* layer_norm_modulate, y = LN(x) (1 + scale) + shift, and gated_residual_layer_norm_modulate, which is that of x_new =
   x + gate branch: one struct for both, forward and backward. branch.data is null for the plain one. mean, rstd: (B *
   N), written forward and read backward. Backward x is what was normalised (x_new of the gated one), dx_new.data may be
   null (no gradient arrives there), and so may each output's. dgate, dshift, dscale are summed over N in float32. */
typedef struct {
  sra2_shape shape;
  sra2_rows x, branch, gate, shift, scale, x_new, y;
  sra2_rows dx_new, dy, dx, dbranch, dgate, dshift, dscale;
  float *mean, *rstd;
  float* workspace; /* backward on CUDA: sra2_norm_workspace(shape) floats on the device */
  float eps;
} sra2_norm;
SRA2_API int32_t sra2_norm_fwd_cpu(const sra2_norm* args, sra2_parallel parallel);
SRA2_API int32_t sra2_norm_bwd_cpu(const sra2_norm* args, sra2_parallel parallel);
SRA2_API int32_t sra2_norm_fwd_cuda(const sra2_norm* args, void* stream);
SRA2_API int32_t sra2_norm_bwd_cuda(const sra2_norm* args, void* stream);
SRA2_API int64_t sra2_norm_workspace(sra2_shape shape);

/* Flat memory of a dtype. */
typedef struct {
  const void* data;
  int64_t numel;
  int32_t dtype;
} sra2_flat;
/* One parameter; ema may be null, and so may shadow: the parameter in bf16. step counts this update. */
typedef struct {
  float* param;
  const void* grad;
  float* exp_avg;
  float* exp_avg_sq;
  float* ema;
  uint16_t* shadow;
  int64_t numel;
  double step;
  int32_t grad_dtype;
} sra2_adamw_ema_tensor;
/* max_grad_norm: infinity for no clipping. */
typedef struct {
  double lr, beta1, beta2, eps, weight_decay, ema_decay, max_grad_norm;
} sra2_adamw_ema_settings;
/* norm = the square root of the sum of all squares. */
SRA2_API int32_t sra2_adamw_ema_norm_cpu(int64_t tensors, const sra2_flat* grads, float* norm, sra2_parallel parallel);
/* Clip, AdamW, EMA in place; nothing where norm is not finite. */
SRA2_API int32_t sra2_adamw_ema_step_cpu(int64_t tensors, const sra2_adamw_ema_tensor* table,
                                         sra2_adamw_ema_settings settings, float norm, sra2_parallel parallel);

enum { SRA2_LINEAR = 0, SRA2_COSINE_PATH = 1 };
enum { SRA2_COSINE = 0, SRA2_SMOOTH_L1 = 1, SRA2_MSE = 2, SRA2_L1 = 3 };
/* B samples of N tokens; hidden: (B N, K) and weight: (P, K), bias: (P), all of one dtype; velocity and dvelocity: (B
   N, P) of one dtype; dp: (B N, P) of hidden's. latents, noise: (B, C, H, width); t: (B). Everything contiguous, P <=
   256. */
typedef struct {
  int64_t B, N, K, P, C, H, width, patch_size;
  const void *hidden, *weight, *bias, *velocity;
  const float *latents, *noise, *t;
  void *dvelocity, *dp;
  int32_t hidden_dtype, velocity_dtype, path, align;
  float beta, eps;
} sra2_loss;
SRA2_API int32_t sra2_alignment_velocity_loss_fwd_cpu(const sra2_loss* args, float* velocity_loss, float* align_loss,
                                                      sra2_parallel parallel);
/* hidden, weight, dp: rows = B N, one dtype, contiguous; dweight, dbias float32. Each of the three outputs may be null.
 */
typedef struct {
  int64_t rows, K, P;
  const void *hidden, *weight, *dp;
  float scale;
  void* dhidden;
  float *dweight, *dbias;
  int32_t dtype;
} sra2_loss_bwd;
SRA2_API int32_t sra2_alignment_velocity_loss_bwd_cpu(const sra2_loss_bwd* args, sra2_parallel parallel);

#ifdef __cplusplus
}
#endif
