#include "norm_rows.cuh"

using namespace sra2;

extern "C" int32_t sra2_gated_residual_layer_norm_modulate_fwd_cuda(sra2_shape shape, sra2_rows x, sra2_rows branch,
                                                                    sra2_rows gate, sra2_rows shift, sra2_rows scale,
                                                                    float eps, sra2_rows x_new, sra2_rows y,
                                                                    float* mean, float* rstd, void* stream) {
  NormCuda a{};
  a.shape = shape;
  a.x = x;
  a.branch = branch;
  a.gate = gate;
  a.shift = shift;
  a.scale = scale;
  a.x_new = x_new;
  a.y = y;
  a.mean = mean;
  a.rstd = rstd;
  a.eps = eps;
  return launch_norm_fwd<true>(a, static_cast<cudaStream_t>(stream));
}

extern "C" int32_t sra2_gated_residual_layer_norm_modulate_bwd_cuda(
    sra2_shape shape, sra2_rows dx_new, sra2_rows dy, sra2_rows x_new, sra2_rows branch, sra2_rows gate,
    sra2_rows scale, const float* mean, const float* rstd, sra2_rows dx, sra2_rows dbranch, sra2_rows dgate,
    sra2_rows dshift, sra2_rows dscale, float* workspace, void* stream) {
  NormCuda a{};
  a.shape = shape;
  a.x_new = x_new;
  a.branch = branch;
  a.gate = gate;
  a.scale = scale;
  a.dx_new = dx_new;
  a.dy = dy;
  a.dx = dx;
  a.dbranch = dbranch;
  a.dgate = dgate;
  a.dshift = dshift;
  a.dscale = dscale;
  a.mean = const_cast<float*>(mean);
  a.rstd = const_cast<float*>(rstd);
  a.sums = workspace;
  return launch_norm_bwd<true>(a, static_cast<cudaStream_t>(stream));
}
