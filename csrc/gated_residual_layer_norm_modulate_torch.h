// gated_residual_layer_norm_modulate as torch sees it, for one device. Schemas:
// sra2_fast/ops/gated_residual_layer_norm_modulate.py.
#pragma once
#include "layer_norm_modulate_torch.h"

namespace sra2 {

// ..._fwd(x, branch, gate, shift, scale, eps, bf16_out) -> (x_new, y, mean, rstd)
template <class Launch>
void gated_residual_layer_norm_modulate_fwd(StableIValue* stack, const Launch& launch) {
  const char* op = "gated_residual_layer_norm_modulate";
  Tensor x(stack[0]), branch(stack[1]), gate(stack[2]), shift(stack[3]), scale(stack[4]);
  const float eps = static_cast<float>(as_double(stack[5]));
  const sra2_shape s = check_layer_norm_modulate(op, x, "x");
  check_array(op, "branch", branch, {s.B, s.N, s.D});
  check_contiguous(op, "branch", branch);
  check_array(op, "gate", gate, {s.B, s.D});
  check_array(op, "shift", shift, {s.B, s.D});
  check_array(op, "scale", scale, {s.B, s.D});
  const int32_t f32 = aoti_torch_dtype_float32();
  Tensor x_new = x.make(x.dtype(), {s.B, s.N, s.D});
  Tensor y = x.make(float_dtype(as_bool(stack[6])), {s.B, s.N, s.D});
  Tensor mean = x.make(f32, {s.B, s.N}), rstd = x.make(f32, {s.B, s.N});
  launch(x, s, x.rows(), branch.rows(), gate.rows(), shift.rows(), scale.rows(), eps, x_new.rows(), y.rows(),
         mean.data<float>(), rstd.data<float>());
  stack[0] = x_new.release();
  stack[1] = y.release();
  stack[2] = mean.release();
  stack[3] = rstd.release();
}

// ..._bwd(dx_new, dy, x_new, branch, gate, scale, mean, rstd, need_dx, need_dbranch, need_dgate, need_modulation)
//   -> (dx, dbranch, dgate, dshift, dscale); dx_new may have no elements: no gradient arrives there.
template <class Launch>
void gated_residual_layer_norm_modulate_bwd(StableIValue* stack, const Launch& launch) {
  const char* op = "gated_residual_layer_norm_modulate";
  Tensor dx_new(stack[0]), dy(stack[1]), x_new(stack[2]), branch(stack[3]), gate(stack[4]), scale(stack[5]);
  Tensor mean(stack[6]), rstd(stack[7]);
  const bool need_dx = as_bool(stack[8]), need_dbranch = as_bool(stack[9]), need_dgate = as_bool(stack[10]);
  const bool need_modulation = as_bool(stack[11]);
  const sra2_shape s = check_layer_norm_modulate(op, x_new, "x_new");
  const bool has_dx_new = dx_new.dim() == 3;
  if (has_dx_new) {
    check_array(op, "dx_new", dx_new, {s.B, s.N, s.D});
    check_contiguous(op, "dx_new", dx_new);
    if (dx_new.dtype() != x_new.dtype())
      must_be(op, "dx_new", dtype_name(x_new.dtype()) + " like x_new", dtype_name(dx_new.dtype()));
  }
  check_array(op, "dy", dy, {s.B, s.N, s.D});
  check_contiguous(op, "dy", dy);
  check_array(op, "branch", branch, {s.B, s.N, s.D});
  check_contiguous(op, "branch", branch);
  check_array(op, "gate", gate, {s.B, s.D});
  check_array(op, "scale", scale, {s.B, s.D});
  check_statistics(op, mean, rstd, s);
  Tensor dx = make_if(need_dx, x_new, x_new.dtype(), {s.B, s.N, s.D});
  Tensor dbranch = make_if(need_dbranch, x_new, branch.dtype(), {s.B, s.N, s.D});
  Tensor dgate = make_if(need_dgate, x_new, gate.dtype(), {s.B, s.D});
  Tensor dshift = make_if(need_modulation, x_new, scale.dtype(), {s.B, s.D});
  Tensor dscale = make_if(need_modulation, x_new, scale.dtype(), {s.B, s.D});
  launch(x_new, s, rows_if(has_dx_new, dx_new), dy.rows(), x_new.rows(), branch.rows(), gate.rows(), scale.rows(),
         mean.data<float>(), rstd.data<float>(), rows_if(need_dx, dx), rows_if(need_dbranch, dbranch),
         rows_if(need_dgate, dgate), rows_if(need_modulation, dshift), rows_if(need_modulation, dscale));
  stack[0] = dx.release();
  stack[1] = dbranch.release();
  stack[2] = dgate.release();
  stack[3] = dshift.release();
  stack[4] = dscale.release();
}

}  // namespace sra2
