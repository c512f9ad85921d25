#include "norm_rows.cuh"

using namespace sra2;

extern "C" int32_t sra2_cuda_driver_needed(void) {
  int have = 0, built = 0;
  cudaDriverGetVersion(&have);  // 0 without a driver
  cudaRuntimeGetVersion(&built);
  return have / 1000 >= built / 1000 ? 0 : built;
}

extern "C" const char* sra2_cuda_error_string(int32_t error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

extern "C" int64_t sra2_norm_workspace(sra2_shape shape) { return shape.B * slices_per_sample(shape) * 3 * shape.D; }

extern "C" int32_t sra2_layer_norm_modulate_fwd_cuda(sra2_shape shape, sra2_rows x, sra2_rows shift, sra2_rows scale,
                                                     float eps, sra2_rows y, float* mean, float* rstd, void* stream) {
  NormCuda a{};
  a.shape = shape;
  a.x = x;
  a.shift = shift;
  a.scale = scale;
  a.y = y;
  a.mean = mean;
  a.rstd = rstd;
  a.eps = eps;
  return launch_norm_fwd<false>(a, static_cast<cudaStream_t>(stream));
}

extern "C" int32_t sra2_layer_norm_modulate_bwd_cuda(sra2_shape shape, sra2_rows dy, sra2_rows x, sra2_rows scale,
                                                     const float* mean, const float* rstd, sra2_rows dx,
                                                     sra2_rows dshift, sra2_rows dscale, float* workspace,
                                                     void* stream) {
  NormCuda a{};
  a.shape = shape;
  a.x = x;
  a.scale = scale;
  a.dy = dy;
  a.dx = dx;
  a.dshift = dshift;
  a.dscale = dscale;
  a.mean = const_cast<float*>(mean);
  a.rstd = const_cast<float*>(rstd);
  a.sums = workspace;
  return launch_norm_bwd<false>(a, static_cast<cudaStream_t>(stream));
}
