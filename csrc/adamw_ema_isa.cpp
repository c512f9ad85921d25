// The arithmetic of adamw_ema.h, compiled once for each instruction set.
#include "adamw_ema.h"

#include "vec.h"

namespace sra2 {
namespace SRA2_ISA {

// Four accumulators of W lanes in float32, joined in double: n is a chunk, so each lane adds a few hundred squares.
static double sum_of_squares(const float* grad, int64_t n) {
  constexpr int64_t UNROLL = 4 * W;
  V total[4] = {};
  int64_t i = 0;
  for (; i + UNROLL <= n; i += UNROLL)
    for (int u = 0; u < 4; ++u) {
      const V g = get<V>(grad + i + u * W);
      total[u] += g * g;
    }
  double sum = 0;
  for (int u = 0; u < 4; ++u)
    for (int lane = 0; lane < W; ++lane) sum += static_cast<double>(total[u][lane]);
  for (; i < n; ++i) sum += static_cast<double>(grad[i]) * static_cast<double>(grad[i]);
  return sum;
}

// Plain loops: the compiler makes vectors of them, square root and division included (-fno-math-errno).
template <bool EMA>
static void update_elements(const AdamWEMANumbers& numbers, int64_t n, float* __restrict param,
                            const float* __restrict grad, float* __restrict exp_avg, float* __restrict exp_avg_sq,
                            float* __restrict ema) {
  const AdamWEMANumbers c = numbers;
  for (int64_t i = 0; i < n; ++i) {
    const float g = grad[i] * c.clip;
    const float m = exp_avg[i] + c.new_avg * (g - exp_avg[i]);
    const float s = c.beta2 * exp_avg_sq[i] + c.new_sq * g * g;
    const float p = param[i] * c.keep - c.step_size * (m / (__builtin_sqrtf(s) * c.inv_sqrt_bias2 + c.eps));
    exp_avg[i] = m;
    exp_avg_sq[i] = s;
    param[i] = p;
    if (EMA) ema[i] = c.keep_ema * ema[i] + c.new_ema * p;
  }
}

static void update(const AdamWEMANumbers& numbers, int64_t n, float* param, const float* grad, float* exp_avg,
                   float* exp_avg_sq, float* ema) {
  if (ema)
    update_elements<true>(numbers, n, param, grad, exp_avg, exp_avg_sq, ema);
  else
    update_elements<false>(numbers, n, param, grad, exp_avg, exp_avg_sq, ema);
}

extern const AdamWEMAKernels adamw_ema_kernels;
const AdamWEMAKernels adamw_ema_kernels = {sum_of_squares, update};

}  // namespace SRA2_ISA
}  // namespace sra2
