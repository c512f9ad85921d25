#include "gated_residual_layer_norm_modulate_torch.h"

using namespace sra2;

static void fwd(StableIValue* stack, uint64_t, uint64_t) {
  gated_residual_layer_norm_modulate_fwd(stack, [](const Tensor&, auto... arguments) {
    check_ran("gated_residual_layer_norm_modulate",
              sra2_gated_residual_layer_norm_modulate_fwd_cpu(arguments..., torch_parallel_for));
  });
}

static void bwd(StableIValue* stack, uint64_t, uint64_t) {
  gated_residual_layer_norm_modulate_bwd(stack, [](const Tensor&, auto... arguments) {
    check_ran("gated_residual_layer_norm_modulate",
              sra2_gated_residual_layer_norm_modulate_bwd_cpu(arguments..., torch_parallel_for));
  });
}

static const Implementations registered = Implementations("CPU")
                                              .add("gated_residual_layer_norm_modulate_fwd", fwd)
                                              .add("gated_residual_layer_norm_modulate_bwd", bwd);
