// What layer_norm_modulate and gated_residual_layer_norm_modulate share on the CPU: the second is the first with a
// gated branch added to the rows on the way in. norm_rows_isa.cpp has the kernels.
#pragma once
#include "dispatch.h"

namespace sra2 {

// The arguments of a call, and how the CPU goes about it.
struct NormArgs : sra2_norm {
  int64_t padded;     // D rounded up to whole steps of any instruction set
  bool non_temporal;  // store rows past the caches

  NormArgs(const sra2_norm& args, const sra2_rows& out, const sra2_rows& second_out);  // the outputs of B * N rows

  // Floats of scratch a thread needs: scale, shift, gate and the x_new of four rows; and of partial sums a piece
  // writes: dscale, dshift, dgate.
  int64_t scratch() const { return 7 * padded; }
  int64_t sums() const { return 3 * padded; }
};

struct NormKernels {
  // Rows [first, end) of sample b. load_modulation once for each sample, then any number of fwd or bwd.
  void (*load_modulation)(const NormArgs&, int64_t b, float* scratch);
  void (*fwd)(const NormArgs&, int64_t b, int64_t first, int64_t end, float* scratch);
  void (*bwd)(const NormArgs&, int64_t b, int64_t first, int64_t end, const float* scratch, float* sums);
  // The modulation gradients of sample b: pieces partial sums added in order.
  void (*add_sums)(const NormArgs&, int64_t b, const float* sums, int64_t pieces);
};

}  // namespace sra2
