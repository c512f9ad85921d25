#include "norm_torch.h"

static const sra2::Implementations registered =
    sra2::Implementations("CPU")
        .add("gated_residual_layer_norm_modulate_fwd", sra2::norm_fwd<sra2::NormCpu, true>)
        .add("gated_residual_layer_norm_modulate_bwd", sra2::norm_bwd<sra2::NormCpu, true>);
