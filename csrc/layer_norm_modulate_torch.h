// layer_norm_modulate as torch sees it, for one device; csrc/layer_norm_modulate_torch{,_cuda}.cpp fill in the calls.
// Schemas: sra2_fast/ops/layer_norm_modulate.py.
#pragma once
#include "torch_abi.h"

namespace sra2 {

// x (B, N, D), shift and scale (B, D).
inline sra2_shape check_layer_norm_modulate(const char* op, const Tensor& x, const char* x_name) {
  if (x.dim() != 3) must_be(op, x_name, "(B, N, D)", sizes_of(x));
  const sra2_shape shape{x.size(0), x.size(1), x.size(2)};
  check_array(op, x_name, x, {shape.B, shape.N, shape.D});
  check_contiguous(op, x_name, x);
  if (shape.D < 1 || shape.D > 8192) must_be(op, "D", "from 1 to 8192", std::to_string(shape.D));
  return shape;
}

inline void check_statistics(const char* op, const Tensor& mean, const Tensor& rstd, sra2_shape shape) {
  const Tensor* both[2] = {&mean, &rstd};
  for (int i = 0; i < 2; ++i) {
    check_array(op, i ? "rstd" : "mean", *both[i], {shape.B, shape.N});
    check_contiguous(op, i ? "rstd" : "mean", *both[i]);
    if (both[i]->is_bf16()) must_be(op, i ? "rstd" : "mean", "float32", "torch.bfloat16");
  }
}

inline int32_t float_dtype(bool is_bf16) { return is_bf16 ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float32(); }

// A new (B, N, D) or (B, D) gradient, or one of no elements where it is not wanted.
inline Tensor make_if(bool wanted, const Tensor& like, int32_t dtype, std::initializer_list<int64_t> sizes) {
  return wanted ? like.make(dtype, sizes) : like.make(dtype, {0});
}
inline sra2_rows rows_if(bool wanted, const Tensor& t) { return wanted ? t.rows() : sra2_rows{nullptr, 0, 0}; }

// layer_norm_modulate_fwd(x, shift, scale, eps, bf16_out) -> (y, mean, rstd)
template <class Launch>
void layer_norm_modulate_fwd(StableIValue* stack, const Launch& launch) {
  const char* op = "layer_norm_modulate";
  Tensor x(stack[0]), shift(stack[1]), scale(stack[2]);
  const float eps = static_cast<float>(as_double(stack[3]));
  const sra2_shape s = check_layer_norm_modulate(op, x, "x");
  check_array(op, "shift", shift, {s.B, s.D});
  check_array(op, "scale", scale, {s.B, s.D});
  const int32_t f32 = aoti_torch_dtype_float32();
  Tensor y = x.make(float_dtype(as_bool(stack[4])), {s.B, s.N, s.D});
  Tensor mean = x.make(f32, {s.B, s.N}), rstd = x.make(f32, {s.B, s.N});
  launch(x, s, x.rows(), shift.rows(), scale.rows(), eps, y.rows(), mean.data<float>(), rstd.data<float>());
  stack[0] = y.release();
  stack[1] = mean.release();
  stack[2] = rstd.release();
}

// layer_norm_modulate_bwd(dy, x, scale, mean, rstd, need_dx, need_modulation) -> (dx, dshift, dscale)
template <class Launch>
void layer_norm_modulate_bwd(StableIValue* stack, const Launch& launch) {
  const char* op = "layer_norm_modulate";
  Tensor dy(stack[0]), x(stack[1]), scale(stack[2]), mean(stack[3]), rstd(stack[4]);
  const bool need_dx = as_bool(stack[5]), need_modulation = as_bool(stack[6]);
  const sra2_shape s = check_layer_norm_modulate(op, x, "x");
  check_array(op, "dy", dy, {s.B, s.N, s.D});
  check_contiguous(op, "dy", dy);
  check_array(op, "scale", scale, {s.B, s.D});
  check_statistics(op, mean, rstd, s);
  Tensor dx = make_if(need_dx, x, x.dtype(), {s.B, s.N, s.D});
  Tensor dshift = make_if(need_modulation, x, scale.dtype(), {s.B, s.D});
  Tensor dscale = make_if(need_modulation, x, scale.dtype(), {s.B, s.D});
  launch(x, s, dy.rows(), x.rows(), scale.rows(), mean.data<float>(), rstd.data<float>(), rows_if(need_dx, dx),
         rows_if(need_modulation, dshift), rows_if(need_modulation, dscale));
  stack[0] = dx.release();
  stack[1] = dshift.release();
  stack[2] = dscale.release();
}

}  // namespace sra2
