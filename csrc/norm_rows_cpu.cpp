// Threads over the rows of layer_norm_modulate and gated_residual_layer_norm_modulate.
#include "norm_rows.h"

namespace sra2 {

SRA2_DISPATCH(NormKernels, norm_kernels)

NormArgs::NormArgs(const sra2_norm& args, const sra2_rows& out, const sra2_rows& second_out)
    : sra2_norm(args), padded((shape.D + 31) / 32 * 32) {
  const auto is_large = [&](const sra2_rows& rows) {
    return is_non_temporal(rows.data, shape.B * shape.N, shape.D, rows.dtype);
  };
  non_temporal = is_large(out) && is_large(second_out);
}

// Calls f(piece, b, first, end, scratch) for every piece, rows [first, end) of sample b, whose modulation is loaded.
template <class F>
static int32_t for_each_piece(const NormArgs& a, const Pieces& pieces, sra2_parallel parallel, const F& f) {
  const int64_t elements = (a.shape.N / pieces.per_sample + 1) * a.shape.D;
  const int64_t grain = 1 + 32768 / elements;  // below about 32 Ki elements a second thread costs more than it saves
  return parallel_for(parallel, pieces.count(), grain, a.scratch(), [&](int64_t begin, int64_t end, float* scratch) {
    for (int64_t p = begin, loaded = -1; p < end; ++p) {
      const int64_t b = pieces.sample(p);
      if (b != loaded) norm_kernels().load_modulation(a, loaded = b, scratch);
      f(p, b, pieces.first_row(p), pieces.end_row(p), scratch);
    }
  });
}

}  // namespace sra2

using namespace sra2;

int32_t sra2_norm_fwd_cpu(const sra2_norm* args, sra2_parallel parallel) {
  const NormArgs a(*args, args->y, args->x_new);
  const auto fwd = norm_kernels().fwd;
  return for_each_piece(
      a, Pieces(a.shape.B, a.shape.N), parallel,
      [&](int64_t, int64_t b, int64_t first, int64_t end, float* scratch) { fwd(a, b, first, end, scratch); });
}

int32_t sra2_norm_bwd_cpu(const sra2_norm* args, sra2_parallel parallel) {
  const NormArgs a(*args, args->dx, args->dbranch);
  const NormKernels& kernels = norm_kernels();
  const Pieces pieces(a.shape.B, a.shape.N);
  const Array<float> sums(pieces.count() * a.sums());
  if (!sums.data) return 1;
  const int32_t error =
      for_each_piece(a, pieces, parallel, [&](int64_t p, int64_t b, int64_t first, int64_t end, float* scratch) {
        kernels.bwd(a, b, first, end, scratch, sums.data + p * a.sums());
      });
  if (error) return error;
  const int64_t sample = pieces.per_sample * a.sums();
  return parallel_for(parallel, a.shape.B, 1 + 65536 / sample, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) kernels.add_sums(a, b, sums.data + b * sample, pieces.per_sample);
  });
}
