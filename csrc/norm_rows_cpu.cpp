// Threads over the rows of layer_norm_modulate and gated_residual_layer_norm_modulate.
#include "norm_rows.h"

#include <string.h>

namespace sra2 {

SRA2_DISPATCH(NormKernels, norm_kernels)

// Pieces a thread should take at least: below about 32 Ki elements a second thread costs more than it saves.
static int64_t grain(const NormArgs& a, const Pieces& pieces) {
  const int64_t elements = (a.shape.N / pieces.per_sample + 1) * a.shape.D;
  return 1 + 32768 / elements;
}

static bool is_past(const NormArgs& a, const sra2_rows& out) {
  return goes_past(out.data, a.shape.B * a.shape.N, a.shape.D, out.dtype);
}

int32_t norm_fwd(NormArgs a, sra2_parallel parallel) {
  a.past = is_past(a, a.y) && is_past(a, a.x_new);
  const NormKernels& kernels = norm_kernels();
  const Pieces pieces(a.shape.B, a.shape.N);
  bool out_of_memory = false;
  int32_t error = parallel_for(parallel, pieces.count(), grain(a, pieces), [&](int64_t begin, int64_t end) {
    Floats scratch(a.scratch());
    if (!scratch.data) {
      __atomic_store_n(&out_of_memory, true, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t p = begin, loaded = -1; p < end; ++p) {
      const int64_t b = pieces.sample(p);
      if (b != loaded) kernels.load_modulation(a, loaded = b, scratch.data);
      kernels.fwd(a, b, pieces.first_row(p), pieces.end_row(p), scratch.data);
    }
  });
  return out_of_memory ? 1 : error;
}

int32_t norm_bwd(NormArgs a, sra2_parallel parallel) {
  a.past = is_past(a, a.dx) && is_past(a, a.dbranch);
  const NormKernels& kernels = norm_kernels();
  const Pieces pieces(a.shape.B, a.shape.N);
  Floats sums(pieces.count() * a.sums());
  bool out_of_memory = !sums.data;
  if (out_of_memory) return 1;
  int32_t error = parallel_for(parallel, pieces.count(), grain(a, pieces), [&](int64_t begin, int64_t end) {
    Floats scratch(a.scratch());
    if (!scratch.data) {
      __atomic_store_n(&out_of_memory, true, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t p = begin, loaded = -1; p < end; ++p) {
      const int64_t b = pieces.sample(p);
      if (b != loaded) kernels.load_modulation(a, loaded = b, scratch.data);
      kernels.bwd(a, b, pieces.first_row(p), pieces.end_row(p), scratch.data, sums.data + p * a.sums());
    }
  });
  if (out_of_memory || error) return out_of_memory ? 1 : error;
  const int64_t grain_sums = 1 + 65536 / (pieces.per_sample * a.sums());
  return parallel_for(parallel, a.shape.B, grain_sums, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      kernels.add_sums(a, b, sums.data + b * pieces.per_sample * a.sums(), pieces.per_sample);
  });
}

}  // namespace sra2
