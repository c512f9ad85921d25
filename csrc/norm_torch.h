// layer_norm_modulate and gated_residual_layer_norm_modulate as torch sees them: their arguments checked, and filled
// into the sra2_norm that both share. csrc/<op>_torch.cpp and csrc/<op>_torch_cuda.cpp register them; schemas:
// sra2_fast/ops/<op>.py.
#pragma once
#include "cuda_stream.h"

namespace sra2 {

// Where an op runs.
struct NormCpu {
  static void fwd(const char* op, const Tensor&, const sra2_norm& a) {
    check_ran(op, sra2_norm_fwd_cpu(&a, torch_parallel_for));
  }
  static void bwd(const char* op, const Tensor&, const sra2_norm& a) {
    check_ran(op, sra2_norm_bwd_cpu(&a, torch_parallel_for));
  }
};

struct NormCuda {
  static void fwd(const char* op, const Tensor& x, const sra2_norm& a) {
    DeviceGuard guard(x);
    check_launched(op, sra2_norm_fwd_cuda(&a, current_stream(x)));
  }
  static void bwd(const char* op, const Tensor& x, sra2_norm a) {
    DeviceGuard guard(x);
    Tensor workspace = x.make(aoti_torch_dtype_float32(), {sra2_norm_workspace(a.shape)});
    a.workspace = workspace.data<float>();
    check_launched(op, sra2_norm_bwd_cuda(&a, current_stream(x)));
  }
};

constexpr const char* norm_name(bool gated) {
  return gated ? "gated_residual_layer_norm_modulate" : "layer_norm_modulate";
}

// The shape of what is normalised, (B, N, D).
inline sra2_shape check_shape(const char* op, const char* name, const Tensor& x) {
  if (x.dim() != 3) must_be(op, name, "(B, N, D)", sizes_of(x));
  const sra2_shape s{x.size(0), x.size(1), x.size(2)};
  check_contiguous(op, name, x, {s.B, s.N, s.D});
  if (s.D < 1 || s.D > 8192) must_be(op, "D", "from 1 to 8192", std::to_string(s.D));
  return s;
}

// A float32 statistic of each row.
inline float* check_statistic(const char* op, const char* name, const Tensor& t, sra2_shape s) {
  check_contiguous(op, name, t, {s.B, s.N});
  if (t.is_bf16()) must_be(op, name, "float32", "torch.bfloat16");
  return t.data<float>();
}

// ..._fwd(x, [branch, gate,] shift, scale, eps, bf16_out) -> ([x_new,] y, mean, rstd)
// What is in brackets is the gated op's.
template <class Device, bool GATED>
void norm_fwd(StableIValue* stack, uint64_t, uint64_t) {
  const char* op = norm_name(GATED);
  const StableIValue* next = stack;
  const Tensor x(*next++), branch(GATED ? *next++ : 0), gate(GATED ? *next++ : 0), shift(*next++), scale(*next++);
  const double eps = as_double(*next++);
  const bool bf16_out = as_bool(*next++);
  const sra2_shape s = check_shape(op, "x", x);
  if (GATED) {
    check_contiguous(op, "branch", branch, {s.B, s.N, s.D});
    check_array(op, "gate", gate, {s.B, s.D});
  }
  check_array(op, "shift", shift, {s.B, s.D});
  check_array(op, "scale", scale, {s.B, s.D});
  const int32_t f32 = aoti_torch_dtype_float32();
  Tensor x_new = GATED ? x.make(x.dtype(), {s.B, s.N, s.D}) : Tensor(0);
  Tensor y = x.make(bf16_out ? aoti_torch_dtype_bfloat16() : f32, {s.B, s.N, s.D});
  Tensor mean = x.make(f32, {s.B, s.N}), rstd = x.make(f32, {s.B, s.N});
  sra2_norm a{};
  a.shape = s;
  a.x = x.rows();
  a.branch = branch.rows();
  a.gate = gate.rows();
  a.shift = shift.rows();
  a.scale = scale.rows();
  a.x_new = x_new.rows();
  a.y = y.rows();
  a.mean = mean.data<float>();
  a.rstd = rstd.data<float>();
  a.eps = static_cast<float>(eps);
  Device::fwd(op, x, a);
  give_back(stack, x_new, y, mean, rstd);
}

// layer_norm_modulate_bwd(dy, x, scale, mean, rstd, need_dx, need_modulation) -> (dx, dshift, dscale)
// gated_..._bwd(dx_new, dy, x_new, branch, gate, scale, mean, rstd, need_dx, need_dbranch, need_dgate, need_modulation)
//   -> (dx, dbranch, dgate, dshift, dscale); dx_new may have no elements: no gradient arrives there.
// A gradient that is not wanted has no elements.
template <class Device, bool GATED>
void norm_bwd(StableIValue* stack, uint64_t, uint64_t) {
  const char *op = norm_name(GATED), *x_name = GATED ? "x_new" : "x";
  const StableIValue* next = stack;
  const Tensor dx_new(GATED ? *next++ : 0), dy(*next++), x(*next++), branch(GATED ? *next++ : 0),
      gate(GATED ? *next++ : 0), scale(*next++), mean(*next++), rstd(*next++);
  const bool need_dx = as_bool(*next++), need_dbranch = GATED && as_bool(*next++);
  const bool need_dgate = GATED && as_bool(*next++), need_modulation = as_bool(*next++);
  const sra2_shape s = check_shape(op, x_name, x);
  const bool has_dx_new = GATED && dx_new.dim() == 3;
  if (has_dx_new) {
    check_contiguous(op, "dx_new", dx_new, {s.B, s.N, s.D});
    if (dx_new.dtype() != x.dtype())
      must_be(op, "dx_new", dtype_name(x.dtype()) + " like x_new", dtype_name(dx_new.dtype()));
  }
  check_contiguous(op, "dy", dy, {s.B, s.N, s.D});
  if (GATED) {
    check_contiguous(op, "branch", branch, {s.B, s.N, s.D});
    check_array(op, "gate", gate, {s.B, s.D});
  }
  check_array(op, "scale", scale, {s.B, s.D});
  const auto make_if = [&](bool wanted, const Tensor& like, std::initializer_list<int64_t> sizes) {
    return wanted ? x.make(like.dtype(), sizes) : x.make(like.dtype(), {0});
  };
  sra2_norm a{};
  a.shape = s;
  a.mean = check_statistic(op, "mean", mean, s);
  a.rstd = check_statistic(op, "rstd", rstd, s);
  Tensor dx = make_if(need_dx, x, {s.B, s.N, s.D}), dshift = make_if(need_modulation, scale, {s.B, s.D});
  Tensor dscale = make_if(need_modulation, scale, {s.B, s.D});
  Tensor dbranch = GATED ? make_if(need_dbranch, branch, {s.B, s.N, s.D}) : Tensor(0);
  Tensor dgate = GATED ? make_if(need_dgate, gate, {s.B, s.D}) : Tensor(0);
  a.x = x.rows();
  a.branch = branch.rows();
  a.gate = gate.rows();
  a.scale = scale.rows();
  if (has_dx_new) a.dx_new = dx_new.rows();
  a.dy = dy.rows();
  a.dx = dx.rows();
  a.dbranch = dbranch.rows();
  a.dgate = dgate.rows();
  a.dshift = dshift.rows();
  a.dscale = dscale.rows();
  Device::bwd(op, x, a);
  give_back(stack, dx, dbranch, dgate, dshift, dscale);
}

}  // namespace sra2
