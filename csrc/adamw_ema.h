// AdamW with clipping and the exponential moving average, over flat memory: float32, gradients also bf16.
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
  double (*sum_of_squares)(const sra2_flat& grad, int64_t first, int64_t n);
  // n elements of one parameter from `first` on, in place.
  void (*update)(const AdamWEMANumbers& numbers, const sra2_adamw_ema_tensor& tensor, int64_t first, int64_t n);
};

}  // namespace sra2
