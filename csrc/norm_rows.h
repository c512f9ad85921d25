// What layer_norm_modulate and gated_residual_layer_norm_modulate share on the CPU: the second is the first with a
// gated branch added to the rows on the way in. norm_rows_isa.cpp has the kernels.
#pragma once
#include "dispatch.h"

namespace sra2 {

// The arguments of both ops, forward and backward; branch.data is null for layer_norm_modulate.
struct NormArgs {
  sra2_shape shape;
  sra2_rows x, branch, gate, shift, scale, x_new, y;
  sra2_rows dx_new, dy, dx, dbranch, dgate, dshift, dscale;
  float* mean;
  float* rstd;
  float eps;
  int64_t padded;  // D rounded up to whole steps of any instruction set
  bool past;       // store rows past the caches

  // Floats of scratch a thread needs: scale, shift, gate and the x_new of four rows; and of partial sums a piece
  // writes: dscale, dshift, dgate.
  int64_t scratch() const { return 7 * padded; }
  int64_t sums() const { return 3 * padded; }
};

inline int64_t padded_size(int64_t D) { return (D + 31) / 32 * 32; }

struct NormKernels {
  // Rows [first, end) of sample b. load_modulation once for each sample, then any number of fwd or bwd.
  void (*load_modulation)(const NormArgs&, int64_t b, float* scratch);
  void (*fwd)(const NormArgs&, int64_t b, int64_t first, int64_t end, float* scratch);
  void (*bwd)(const NormArgs&, int64_t b, int64_t first, int64_t end, const float* scratch, float* sums);
  // The modulation gradients of sample b: pieces partial sums added in order.
  void (*add_sums)(const NormArgs&, int64_t b, const float* sums, int64_t pieces);
};

int32_t norm_fwd(NormArgs args, sra2_parallel parallel);
int32_t norm_bwd(NormArgs args, sra2_parallel parallel);

}  // namespace sra2
