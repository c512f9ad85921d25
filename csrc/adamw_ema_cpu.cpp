// Threads over the chunks of all parameters: one read of the gradients for the norm, one pass for the update.
#include "adamw_ema.h"

#include <math.h>

namespace sra2 {

SRA2_DISPATCH(AdamWEMAKernels, adamw_ema_kernels)

// Elements a piece of work holds. Fixed, so that the norm does not depend on the number of threads.
constexpr int64_t CHUNK = 16384;
constexpr int64_t GRAIN = 4;  // chunks: 64 Ki elements, below which a second thread costs more than it saves

// Calls f(tensor, first, n) for each chunk of [begin, end), counted over tensors of sizes numel(tensor).
struct Chunks {
  int64_t tensors;
  Array<int64_t> first;  // first chunk of each tensor, and the total

  template <class Numel>
  Chunks(int64_t tensors, const Numel& numel) : tensors(tensors), first(tensors + 1) {
    if (!first.data) return;
    first.data[0] = 0;
    for (int64_t i = 0; i < tensors; ++i) first.data[i + 1] = first.data[i] + (numel(i) + CHUNK - 1) / CHUNK;
  }

  int64_t count() const { return first.data[tensors]; }

  template <class Numel, class F>
  void each(int64_t begin, int64_t end, const Numel& numel, const F& f) const {
    int64_t low = 0, high = tensors;  // the last tensor that starts at or before begin
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first.data[middle] <= begin ? low : high) = middle;
    }
    for (int64_t chunk = begin, tensor = low; chunk < end; ++chunk) {
      while (first.data[tensor + 1] <= chunk) ++tensor;
      const int64_t at = (chunk - first.data[tensor]) * CHUNK, left = numel(tensor) - at;
      f(chunk, tensor, at, left < CHUNK ? left : CHUNK);
    }
  }
};

}  // namespace sra2

using namespace sra2;

int32_t sra2_adamw_ema_norm_cpu(int64_t tensors, const sra2_flat* grads, float* norm, sra2_parallel parallel) {
  const AdamWEMAKernels& kernels = adamw_ema_kernels();
  auto numel = [&](int64_t i) { return grads[i].numel; };
  const Chunks chunks(tensors, numel);
  if (!chunks.first.data) return 1;
  const Array<double> sums(chunks.count());
  if (!sums.data) return 1;
  const int32_t error = parallel_for(parallel, chunks.count(), GRAIN, [&](int64_t begin, int64_t end) {
    chunks.each(begin, end, numel, [&](int64_t chunk, int64_t tensor, int64_t at, int64_t n) {
      sums.data[chunk] = kernels.sum_of_squares(grads[tensor], at, n);
    });
  });
  double total = 0;
  for (int64_t i = 0; i < chunks.count(); ++i) total += sums.data[i];
  *norm = static_cast<float>(sqrt(total));
  return error;
}

int32_t sra2_adamw_ema_step_cpu(int64_t tensors, const sra2_adamw_ema_tensor* table, sra2_adamw_ema_settings s,
                                float norm, sra2_parallel parallel) {
  if (!isfinite(norm)) return 0;
  const AdamWEMAKernels& kernels = adamw_ema_kernels();
  auto numel = [&](int64_t i) { return table[i].numel; };
  const Chunks chunks(tensors, numel);
  if (!chunks.first.data) return 1;
  const double clip = s.max_grad_norm / (static_cast<double>(norm) + 1e-6);
  return parallel_for(parallel, chunks.count(), GRAIN, [&](int64_t begin, int64_t end) {
    AdamWEMANumbers numbers{};
    int64_t current = -1;
    chunks.each(begin, end, numel, [&](int64_t, int64_t tensor, int64_t at, int64_t n) {
      const sra2_adamw_ema_tensor& t = table[tensor];
      if (tensor != current) {
        current = tensor;
        const double bias1 = 1 - pow(s.beta1, t.step), bias2 = 1 - pow(s.beta2, t.step);
        numbers = {static_cast<float>(clip < 1 ? clip : 1),
                   static_cast<float>(1 - s.beta1),
                   static_cast<float>(s.beta2),
                   static_cast<float>(1 - s.beta2),
                   static_cast<float>(1 / sqrt(bias2)),
                   static_cast<float>(s.eps),
                   static_cast<float>(1 - s.lr * s.weight_decay),
                   static_cast<float>(s.lr / bias1),
                   static_cast<float>(s.ema_decay),
                   static_cast<float>(1 - s.ema_decay)};
      }
      kernels.update(numbers, t, at, n);
    });
  });
}
