#include "norm_rows.h"

using namespace sra2;

extern "C" int32_t sra2_layer_norm_modulate_fwd_cpu(sra2_shape shape, sra2_rows x, sra2_rows shift, sra2_rows scale,
                                                    float eps, sra2_rows y, float* mean, float* rstd,
                                                    sra2_parallel parallel) {
  NormArgs a{};
  a.shape = shape;
  a.x = x;
  a.shift = shift;
  a.scale = scale;
  a.y = y;
  a.mean = mean;
  a.rstd = rstd;
  a.eps = eps;
  a.padded = padded_size(shape.D);
  return norm_fwd(a, parallel);
}

extern "C" int32_t sra2_layer_norm_modulate_bwd_cpu(sra2_shape shape, sra2_rows dy, sra2_rows x, sra2_rows scale,
                                                    const float* mean, const float* rstd, sra2_rows dx,
                                                    sra2_rows dshift, sra2_rows dscale, sra2_parallel parallel) {
  NormArgs a{};
  a.shape = shape;
  a.x = x;
  a.scale = scale;
  a.dy = dy;
  a.dx = dx;
  a.dshift = dshift;
  a.dscale = dscale;
  a.mean = const_cast<float*>(mean);
  a.rstd = const_cast<float*>(rstd);
  a.padded = padded_size(shape.D);
  return norm_bwd(a, parallel);
}
