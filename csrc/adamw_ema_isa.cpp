// The arithmetic of adamw_ema.h, compiled once for each instruction set.
#include "adamw_ema.h"

#include "vec.h"

namespace sra2 {
namespace SRA2_ISA {

// Four accumulators of W lanes in float32, joined in double: n is a chunk, so each lane adds a few hundred squares.
template <class G>
static double squares(const G* grad, int64_t n) {
  constexpr int64_t UNROLL = 4 * W;
  V total[4] = {};
  int64_t i = 0;
  for (; i + UNROLL <= n; i += UNROLL)
    for (int u = 0; u < 4; u += 2) {
      V a, b;
      load<false>(grad + i + u * W, a, b);
      total[u] += a * a;
      total[u + 1] += b * b;
    }
  double sum = 0;
  for (int u = 0; u < 4; ++u)
    for (int lane = 0; lane < W; ++lane) sum += static_cast<double>(total[u][lane]);
  for (; i < n; ++i) {
    const auto g = static_cast<double>(widened(grad[i]));
    sum += g * g;
  }
  return sum;
}

static double sum_of_squares(const sra2_flat& grad, int64_t first, int64_t n) {
  double sum = 0;
  by_dtype(grad.dtype, [&](auto type) { sum = squares(static_cast<const decltype(type)*>(grad.data) + first, n); });
  return sum;
}

// Plain loops: the compiler makes vectors of them, square root and division included (-fno-math-errno).
template <bool EMA, bool SHADOW, class G>
static void update_elements(const AdamWEMANumbers& numbers, int64_t n, float* __restrict param,
                            const G* __restrict grad, float* __restrict exp_avg, float* __restrict exp_avg_sq,
                            float* __restrict ema, uint16_t* __restrict shadow) {
  const AdamWEMANumbers c = numbers;
  for (int64_t i = 0; i < n; ++i) {
    const float g = widened(grad[i]) * c.clip;
    const float m = exp_avg[i] + c.new_avg * (g - exp_avg[i]);
    const float s = c.beta2 * exp_avg_sq[i] + c.new_sq * g * g;
    const float p = param[i] * c.keep - c.step_size * (m / (__builtin_sqrtf(s) * c.inv_sqrt_bias2 + c.eps));
    exp_avg[i] = m;
    exp_avg_sq[i] = s;
    param[i] = p;
    if (EMA) ema[i] = c.keep_ema * ema[i] + c.new_ema * p;
    if (SHADOW) shadow[i] = rounded_bits(p);
  }
}

template <class G>
static void update_tensor(const AdamWEMANumbers& numbers, const sra2_adamw_ema_tensor& t, int64_t first, int64_t n) {
  const G* grad = static_cast<const G*>(t.grad) + first;
  float *param = t.param + first, *exp_avg = t.exp_avg + first, *exp_avg_sq = t.exp_avg_sq + first;
  float* ema = t.ema ? t.ema + first : nullptr;
  uint16_t* shadow = t.shadow ? t.shadow + first : nullptr;
  if (ema && shadow)
    update_elements<true, true>(numbers, n, param, grad, exp_avg, exp_avg_sq, ema, shadow);
  else if (ema)
    update_elements<true, false>(numbers, n, param, grad, exp_avg, exp_avg_sq, ema, shadow);
  else if (shadow)
    update_elements<false, true>(numbers, n, param, grad, exp_avg, exp_avg_sq, ema, shadow);
  else
    update_elements<false, false>(numbers, n, param, grad, exp_avg, exp_avg_sq, ema, shadow);
}

static void update(const AdamWEMANumbers& numbers, const sra2_adamw_ema_tensor& t, int64_t first, int64_t n) {
  by_dtype(t.grad_dtype, [&](auto type) { update_tensor<decltype(type)>(numbers, t, first, n); });
}

extern const AdamWEMAKernels adamw_ema_kernels;
const AdamWEMAKernels adamw_ema_kernels = {sum_of_squares, update};

}  // namespace SRA2_ISA
}  // namespace sra2
