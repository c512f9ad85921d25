// alignment_velocity_loss as torch sees it on the CPU; schemas in sra2_fast/ops/alignment_velocity_loss.py.
#include "torch_abi.h"

using namespace sra2;

static const char* const OP = "alignment_velocity_loss";

static void check(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes, int32_t dtype) {
  check_contiguous(OP, name, t, sizes);
  if (t.dtype() != dtype) must_be(OP, name, dtype_name(dtype), dtype_name(t.dtype()));
}

// alignment_velocity_loss_fwd(hidden, weight, bias, velocity_tokens, latents, noise, t, patch_size, path, align, beta,
//                             eps) -> (velocity, align, dvelocity, dp)
static void fwd(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor hidden(stack[0]), weight(stack[1]), bias(stack[2]), velocity(stack[3]), latents(stack[4]),
      noise(stack[5]), t(stack[6]);
  const int64_t p = as_int(stack[7]), path = as_int(stack[8]), align = as_int(stack[9]);
  const int32_t f32 = aoti_torch_dtype_float32();
  if (hidden.dim() != 3) must_be(OP, "hidden", "(B, N, K)", sizes_of(hidden));
  if (latents.dim() != 4) must_be(OP, "latents", "(B, C, H, W)", sizes_of(latents));
  const int64_t B = hidden.size(0), N = hidden.size(1), K = hidden.size(2);
  const int64_t C = latents.size(1), H = latents.size(2), W = latents.size(3), P = p * p * C;
  if (p < 1 || H % p || W % p || H / p * (W / p) != N)
    must_be(OP, "latents", "of N = " + std::to_string(N) + " patches", sizes_of(latents));
  if (P < 1 || P > 256) must_be(OP, "P", "from 1 to 256", std::to_string(P));
  if (K < 1) must_be(OP, "hidden", "(B, N, K) with K at least 1", sizes_of(hidden));
  if (path < 0 || path > 1) must_be(OP, "path", "0 or 1", std::to_string(path));
  if (align < 0 || align > 3) must_be(OP, "align", "from 0 to 3", std::to_string(align));
  check("hidden", hidden, {B, N, K}, hidden.dtype());
  check("weight", weight, {P, K}, hidden.dtype());
  check("bias", bias, {P}, hidden.dtype());
  check("velocity_tokens", velocity, {B, N, P}, velocity.dtype());
  check("latents", latents, {B, C, H, W}, f32);
  check("noise", noise, {B, C, H, W}, f32);
  check("t", t, {B}, f32);
  Tensor velocity_loss = hidden.make(f32, {}), align_loss = hidden.make(f32, {});
  Tensor dvelocity = hidden.make(velocity.dtype(), {B, N, P}), dp = hidden.make(hidden.dtype(), {B, N, P});
  const sra2_loss args{B,
                       N,
                       K,
                       P,
                       C,
                       H,
                       W,
                       p,
                       hidden.data(),
                       weight.data(),
                       bias.data(),
                       velocity.data(),
                       latents.data<float>(),
                       noise.data<float>(),
                       t.data<float>(),
                       dvelocity.data(),
                       dp.data(),
                       hidden.dtype_code(),
                       velocity.dtype_code(),
                       static_cast<int32_t>(path),
                       static_cast<int32_t>(align),
                       static_cast<float>(as_double(stack[10])),
                       static_cast<float>(as_double(stack[11]))};
  check_ran(OP, sra2_alignment_velocity_loss_fwd_cpu(&args, velocity_loss.data<float>(), align_loss.data<float>(),
                                                     torch_parallel_for));
  give_back(stack, velocity_loss, align_loss, dvelocity, dp);
}

// alignment_velocity_loss_bwd(dalign, dp, hidden, weight, need_dhidden, need_dweight, need_dbias) -> (dhidden, dweight,
// dbias); hidden and weight may be empty where their partner's gradient is not wanted
static void bwd(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor dalign(stack[0]), dp(stack[1]), hidden(stack[2]), weight(stack[3]);
  const bool need_dhidden = as_bool(stack[4]), need_dweight = as_bool(stack[5]), need_dbias = as_bool(stack[6]);
  const int32_t f32 = aoti_torch_dtype_float32();
  check("dalign", dalign, {}, f32);
  if (dp.dim() != 3 || dp.size(2) < 1 || dp.size(2) > 256)
    must_be(OP, "dp", "(B, N, P), P from 1 to 256", sizes_of(dp));
  const int64_t B = dp.size(0), N = dp.size(1), P = dp.size(2);
  if (need_dhidden && weight.dim() != 2) must_be(OP, "weight", "(P, K)", sizes_of(weight));
  if (need_dweight && hidden.dim() != 3) must_be(OP, "hidden", "(B, N, K)", sizes_of(hidden));
  const int64_t K = need_dhidden ? weight.size(1) : need_dweight ? hidden.size(2) : 0;
  check("dp", dp, {B, N, P}, dp.dtype());
  if (need_dhidden) check("weight", weight, {P, K}, dp.dtype());
  if (need_dweight) check("hidden", hidden, {B, N, K}, dp.dtype());
  Tensor dhidden = need_dhidden ? dp.make(dp.dtype(), {B, N, K}) : dp.make(dp.dtype(), {0});
  Tensor dweight = need_dweight ? dp.make(f32, {P, K}) : dp.make(f32, {0});
  Tensor dbias = dp.make(f32, {need_dbias ? P : 0});
  const sra2_loss_bwd args{B * N,
                           K,
                           P,
                           hidden.data(),
                           weight.data(),
                           dp.data(),
                           *dalign.data<float>(),
                           need_dhidden ? dhidden.data() : nullptr,
                           need_dweight ? dweight.data<float>() : nullptr,
                           need_dbias ? dbias.data<float>() : nullptr,
                           dp.dtype_code()};
  check_ran(OP, sra2_alignment_velocity_loss_bwd_cpu(&args, torch_parallel_for));
  give_back(stack, dhidden, dweight, dbias);
}

static const Implementations registered =
    Implementations("CPU").add("alignment_velocity_loss_fwd", fwd).add("alignment_velocity_loss_bwd", bwd);
