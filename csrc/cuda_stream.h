// The current CUDA stream of torch, for csrc/*_torch_cuda.cpp.
#pragma once
#include <dlfcn.h>

#include "torch_abi.h"

namespace sra2 {

// Lives in libtorch_cuda.so, which a CPU build of torch lacks: a direct reference would keep the library from loading.
inline void* current_stream(const Tensor& t) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* torch = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch ? reinterpret_cast<Get>(dlsym(torch, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  if (!get) throw std::runtime_error("sra2_fast: this torch has no CUDA");
  void* stream = nullptr;
  SRA2_OK(get(t.device_index(), &stream));
  return stream;
}

inline void check_launched(const char* op, int32_t error) {
  if (error) throw std::runtime_error(std::string(op) + ": " + sra2_cuda_error_string(error));
}

}  // namespace sra2
