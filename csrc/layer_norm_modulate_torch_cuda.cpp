#include "norm_torch.h"

static const sra2::Implementations registered =
    sra2::Implementations("CUDA")
        .add("layer_norm_modulate_fwd_cuda", sra2::norm_fwd<sra2::NormCuda, false>)
        .add("layer_norm_modulate_bwd_cuda", sra2::norm_bwd<sra2::NormCuda, false>);
