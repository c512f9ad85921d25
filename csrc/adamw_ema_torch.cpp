// adamw_ema_norm and adamw_ema_step as torch sees them on the CPU; schemas in sra2_fast/ops/adamw_ema.py.
#include "torch_abi.h"

using namespace sra2;

// A tensor of float32 that lies in memory as `like` does: the kernels walk flat memory.
static float* flat(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  if (t.dtype() != aoti_torch_dtype_float32()) must_be(op, name, "float32", dtype_name(t.dtype()));
  bool same = t.dim() == like.dim();
  for (int64_t d = 0; same && d < t.dim(); ++d)
    same = t.size(d) == like.size(d) && (t.size(d) < 2 || t.stride(d) == like.stride(d));
  if (!same) must_be(op, name, "of its parameter's shape and strides", sizes_of(t));
  return t.data<float>();
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
  for (const Tensor& grad : grads) table.push_back({flat(op, "grads", grad, grad), grad.numel()});
  Tensor norm = grads[0].make(aoti_torch_dtype_float32(), {});
  check_ran(op, sra2_adamw_ema_norm_cpu(static_cast<int64_t>(table.size()), table.data(), norm.data<float>(),
                                        torch_parallel_for));
  stack[0] = norm.release();
}

// adamw_ema_step(params, grads, exp_avgs, exp_avg_sqs, emas, steps, norm, lr, beta1, beta2, eps, weight_decay,
//                ema_decay, max_grad_norm) -> (); emas is empty where nothing is averaged
static void adamw_ema_step(StableIValue* stack, uint64_t, uint64_t) {
  const char* op = "adamw_ema_step";
  const Tensors params = take_list(stack[0]), grads = take_list(stack[1]), exp_avgs = take_list(stack[2]),
                exp_avg_sqs = take_list(stack[3]), emas = take_list(stack[4]);
  const Tensor steps(stack[5]), norm(stack[6]);
  const sra2_adamw_ema_settings settings{as_double(stack[7]),  as_double(stack[8]),  as_double(stack[9]),
                                         as_double(stack[10]), as_double(stack[11]), as_double(stack[12]),
                                         as_double(stack[13])};
  check_count(op, "grads", grads, params.size());
  check_count(op, "exp_avgs", exp_avgs, params.size());
  check_count(op, "exp_avg_sqs", exp_avg_sqs, params.size());
  if (!emas.empty()) check_count(op, "emas", emas, params.size());
  check_contiguous(op, "steps", steps, {static_cast<int64_t>(params.size())});
  std::vector<sra2_adamw_ema_tensor> table;
  table.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& p = params[i];
    table.push_back({flat(op, "params", p, p), flat(op, "grads", grads[i], p), flat(op, "exp_avgs", exp_avgs[i], p),
                     flat(op, "exp_avg_sqs", exp_avg_sqs[i], p), emas.empty() ? nullptr : flat(op, "emas", emas[i], p),
                     p.numel(), static_cast<double>(steps.data<float>()[i])});
  }
  check_ran(op, sra2_adamw_ema_step_cpu(static_cast<int64_t>(table.size()), table.data(), settings,
                                        static_cast<float>(scalar(op, "norm", norm)), torch_parallel_for));
}

static const Implementations registered =
    Implementations("CPU").add("adamw_ema_norm", adamw_ema_norm).add("adamw_ema_step", adamw_ema_step);
