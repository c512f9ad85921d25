// AdamW with clipping and the exponential moving average, over flat float32 memory.
// Formulas: sra2_fast/reference/adamw_ema.py.
#pragma once
#include "dispatch.h"

namespace sra2 {

// One parameter's numbers for this step, computed in double and rounded once.
struct AdamWEMANumbers {
  float clip;     // min(1, max_grad_norm / (norm + 1e-6))
  float new_avg;  // 1 - beta1
  float beta2;
  float new_sq;          // 1 - beta2
  float inv_sqrt_bias2;  // 1 / sqrt(1 - beta2^step)
  float eps;
  float keep;       // 1 - lr weight_decay
  float step_size;  // lr / (1 - beta1^step)
  float keep_ema;   // ema_decay
  float new_ema;    // 1 - ema_decay
};

struct AdamWEMAKernels {
  double (*sum_of_squares)(const float* grad, int64_t n);
  // n elements of one parameter, in place; ema may be null.
  void (*update)(const AdamWEMANumbers& numbers, int64_t n, float* param, const float* grad, float* exp_avg,
                 float* exp_avg_sq, float* ema);
};

}  // namespace sra2
