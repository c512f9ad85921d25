#include "cuda_stream.h"
#include "layer_norm_modulate_torch.h"

using namespace sra2;

static const char* OP = "layer_norm_modulate";

static void fwd(StableIValue* stack, uint64_t, uint64_t) {
  layer_norm_modulate_fwd(stack, [](const Tensor& x, auto... arguments) {
    DeviceGuard guard(x);
    check_launched(OP, sra2_layer_norm_modulate_fwd_cuda(arguments..., current_stream(x)));
  });
}

static void bwd(StableIValue* stack, uint64_t, uint64_t) {
  layer_norm_modulate_bwd(stack, [](const Tensor& x, sra2_shape shape, auto... arguments) {
    DeviceGuard guard(x);
    Tensor sums = x.make(aoti_torch_dtype_float32(), {sra2_norm_workspace(shape)});
    check_launched(OP, sra2_layer_norm_modulate_bwd_cuda(shape, arguments..., sums.data<float>(), current_stream(x)));
  });
}

static const Implementations registered =
    Implementations("CUDA").add("layer_norm_modulate_fwd_cuda", fwd).add("layer_norm_modulate_bwd_cuda", bwd);
