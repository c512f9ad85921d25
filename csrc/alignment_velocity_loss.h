// The last projection, the alignment with the clean latent and the flow-matching MSE, on the CPU.
// Formulas: sra2_fast/reference/alignment_velocity_loss.py.
#pragma once
#include "dispatch.h"

namespace sra2 {

constexpr int64_t MAX_PATCH = 256;  // P, the elements of a token

struct LossKernels {
  // Tokens [first, end) of sample b: dvelocity and dp of those, and their sums of velocity and alignment loss.
  void (*fwd)(const sra2_loss& args, int64_t b, int64_t first, int64_t end, double sums[2]);
  // Rows [first, end) of dhidden = scale dp W; non_temporal: store them past the caches.
  void (*dhidden)(const sra2_loss_bwd& args, int64_t first, int64_t end, bool non_temporal);
  // Columns [first, end) of dW = scale dp^T hidden; sums: P * (end - first) floats of scratch.
  void (*dweight)(const sra2_loss_bwd& args, int64_t first, int64_t end, float* sums);
  void (*dbias)(const sra2_loss_bwd& args);
};

}  // namespace sra2
