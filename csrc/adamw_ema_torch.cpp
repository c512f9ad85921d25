// adamw_ema_norm and adamw_ema_step as torch sees them on the CPU; schemas in sra2_fast/ops/adamw_ema.py.
#include "torch_abi.h"

using namespace sra2;

enum class Takes { float32, bfloat16, both };

// A tensor that lies in memory as `like` does: the kernels walk flat memory.
static void* flat_memory(const char* op, const char* name, const Tensor& t, const Tensor& like, Takes takes) {
  const bool is_float32 = t.dtype() == aoti_torch_dtype_float32();
  if (takes == Takes::float32 && !is_float32) must_be(op, name, "float32", dtype_name(t.dtype()));
  if (takes == Takes::bfloat16 && !t.is_bf16()) must_be(op, name, "bfloat16", dtype_name(t.dtype()));
  if (!is_float32 && !t.is_bf16()) must_be(op, name, "float32 or bfloat16", dtype_name(t.dtype()));
  bool same = t.dim() == like.dim();
  for (int64_t d = 0; same && d < t.dim(); ++d)
    same = t.size(d) == like.size(d) && (t.size(d) < 2 || t.stride(d) == like.stride(d));
  if (!same) must_be(op, name, "of its parameter's shape and strides", sizes_of(t));
  return t.data();
}

static float* flat(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  return static_cast<float*>(flat_memory(op, name, t, like, Takes::float32));
}

using Tensors = std::vector<Tensor>;

static void check_count(const char* op, const char* name, const Tensors& list, size_t count) {
  if (list.size() != count)
    must_be(op, name, std::to_string(count) + " tensors, as many as params", std::to_string(list.size()));
}

static double scalar(const char* op, const char* name, const Tensor& t) {
  if (t.numel() != 1 || t.dtype() != aoti_torch_dtype_float32()) must_be(op, name, "one float32", sizes_of(t));
  return static_cast<double>(*t.data<float>());
}

// adamw_ema_norm(grads) -> norm
static void adamw_ema_norm(StableIValue* stack, uint64_t, uint64_t) {
  const char* op = "adamw_ema_norm";
  const Tensors grads = take_list(stack[0]);
  std::vector<sra2_flat> table;
  table.reserve(grads.size());
  for (const Tensor& grad : grads)
    table.push_back({flat_memory(op, "grads", grad, grad, Takes::both), grad.numel(), grad.dtype_code()});
  Tensor norm = grads[0].make(aoti_torch_dtype_float32(), {});
  check_ran(op, sra2_adamw_ema_norm_cpu(static_cast<int64_t>(table.size()), table.data(), norm.data<float>(),
                                        torch_parallel_for));
  stack[0] = norm.release();
}

// adamw_ema_step(params, grads, exp_avgs, exp_avg_sqs, emas, shadows, steps, norm, rates, lr, beta1, beta2, eps,
//                weight_decay, ema_decay, max_grad_norm) -> (); emas and shadows are empty where there are none, rates
//                (lr, ema_decay) where the numbers hold
static void adamw_ema_step(StableIValue* stack, uint64_t, uint64_t) {
  const char* op = "adamw_ema_step";
  const Tensors params = take_list(stack[0]), grads = take_list(stack[1]), exp_avgs = take_list(stack[2]),
                exp_avg_sqs = take_list(stack[3]), emas = take_list(stack[4]), shadows = take_list(stack[5]);
  const Tensor steps(stack[6]), norm(stack[7]), rates(stack[8]);
  sra2_adamw_ema_settings settings{as_double(stack[9]),  as_double(stack[10]), as_double(stack[11]),
                                   as_double(stack[12]), as_double(stack[13]), as_double(stack[14]),
                                   as_double(stack[15])};
  if (rates.numel() > 0) {
    if (rates.numel() != 2 || rates.dtype() != aoti_torch_dtype_float64() || !rates.is_contiguous())
      must_be(op, "rates", "two float64, lr and ema_decay", dtype_name(rates.dtype()) + " " + sizes_of(rates));
    settings.lr = rates.data<double>()[0];
    settings.ema_decay = rates.data<double>()[1];
  }
  check_count(op, "grads", grads, params.size());
  check_count(op, "exp_avgs", exp_avgs, params.size());
  check_count(op, "exp_avg_sqs", exp_avg_sqs, params.size());
  if (!emas.empty()) check_count(op, "emas", emas, params.size());
  if (!shadows.empty()) check_count(op, "shadows", shadows, params.size());
  check_contiguous(op, "steps", steps, {static_cast<int64_t>(params.size())});
  std::vector<sra2_adamw_ema_tensor> table;
  table.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& p = params[i];
    const auto shadow = [&] { return flat_memory(op, "shadows", shadows[i], p, Takes::bfloat16); };
    table.push_back({flat(op, "params", p, p), flat_memory(op, "grads", grads[i], p, Takes::both),
                     flat(op, "exp_avgs", exp_avgs[i], p), flat(op, "exp_avg_sqs", exp_avg_sqs[i], p),
                     emas.empty() ? nullptr : flat(op, "emas", emas[i], p),
                     shadows.empty() ? nullptr : static_cast<uint16_t*>(shadow()), p.numel(),
                     static_cast<double>(steps.data<float>()[i]), grads[i].dtype_code()});
  }
  check_ran(op, sra2_adamw_ema_step_cpu(static_cast<int64_t>(table.size()), table.data(), settings,
                                        static_cast<float>(scalar(op, "norm", norm)), torch_parallel_for));
}

static const Implementations registered =
    Implementations("CPU").add("adamw_ema_norm", adamw_ema_norm).add("adamw_ema_step", adamw_ema_step);
