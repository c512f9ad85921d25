#include "norm_torch.h"

static const sra2::Implementations registered =
    sra2::Implementations("CPU")
        .add("layer_norm_modulate_fwd", sra2::norm_fwd<sra2::NormCpu, false>)
        .add("layer_norm_modulate_bwd", sra2::norm_bwd<sra2::NormCpu, false>);
