// Threads over the tokens of alignment_velocity_loss, and over the columns of its weight gradient.
#include "alignment_velocity_loss.h"

namespace sra2 {

SRA2_DISPATCH(LossKernels, loss_kernels)

// Threads share the columns of dW in whole steps of every instruction set; a column's sum is the same in any share.
constexpr int64_t COLUMNS = 32;

// Columns that a thread takes at once: wide, so that rows of hidden are read in long stretches, while P of them still
// fit beside the rows in the first-level cache.
static int64_t panel(int64_t P) { return 8192 / P < COLUMNS ? COLUMNS : 8192 / P / COLUMNS * COLUMNS; }

// Pieces worth a thread of their own: below about 256 Ki products a second thread costs more than it saves.
static int64_t grain(int64_t products_a_piece) { return 1 + 262144 / (products_a_piece + 1); }

}  // namespace sra2

using namespace sra2;

int32_t sra2_alignment_velocity_loss_fwd_cpu(const sra2_loss* args, float* velocity_loss, float* align_loss,
                                             sra2_parallel parallel) {
  const sra2_loss& a = *args;
  const LossKernels& kernels = loss_kernels();
  const Pieces pieces(a.B, a.N);
  const Array<double> sums(pieces.count() * 2);
  if (!sums.data) return 1;
  const int64_t products = (a.N / pieces.per_sample + 1) * a.K * a.P;
  const int32_t error = parallel_for(parallel, pieces.count(), grain(products), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernels.fwd(a, pieces.sample(i), pieces.first_row(i), pieces.end_row(i), sums.data + 2 * i);
  });
  double velocity = 0, align = 0;
  for (int64_t i = 0; i < pieces.count(); ++i) {
    velocity += sums.data[2 * i];
    align += sums.data[2 * i + 1];
  }
  const double tokens = static_cast<double>(a.B * a.N), elements = tokens * static_cast<double>(a.P);
  *velocity_loss = static_cast<float>(velocity / elements);  // no token at all: 0 / 0, as the mean of nothing is
  *align_loss = static_cast<float>(align / (a.align == SRA2_COSINE ? tokens : elements));
  return error;
}

int32_t sra2_alignment_velocity_loss_bwd_cpu(const sra2_loss_bwd* args, sra2_parallel parallel) {
  const sra2_loss_bwd& a = *args;
  const LossKernels& kernels = loss_kernels();
  int32_t error = 0;
  if (a.dhidden) {
    const bool non_temporal = is_non_temporal(a.dhidden, a.rows, a.K, a.dtype);
    error = parallel_for(parallel, a.rows, grain(a.K * a.P),
                         [&](int64_t begin, int64_t end) { kernels.dhidden(a, begin, end, non_temporal); });
  }
  if (error) return error;
  if (a.dbias) kernels.dbias(a);  // 1 / K of the work; as one more piece it would upset the balance of the few below
  const int64_t pieces = a.dweight ? (a.K + COLUMNS - 1) / COLUMNS : 0, width = panel(a.P);
  return parallel_for(parallel, pieces, grain(COLUMNS * a.rows * a.P), a.P * width,
                      [&](int64_t begin, int64_t end, float* sums) {
                        const int64_t last = end * COLUMNS < a.K ? end * COLUMNS : a.K;
                        for (int64_t first = begin * COLUMNS; first < last; first += width)
                          kernels.dweight(a, first, first + width < last ? first + width : last, sums);
                      });
}
