#include "dispatch.h"

#include <string.h>

namespace sra2 {

static Isa find_isa() {
#ifdef SRA2_X86_DISPATCH
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const char* at_most = getenv("SRA2_CPU_ISA");  // a lesser one only: what the machine lacks cannot be asked for
  if (at_most && !strcmp(at_most, "base")) return Isa::base;
  if (avx512 && !(at_most && !strcmp(at_most, "avx2"))) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::base;
}

Isa cpu_isa() {
  static const Isa isa = find_isa();
  return isa;
}

void* allocate(int64_t bytes) {
  void* memory = nullptr;
  return posix_memalign(&memory, 64, static_cast<size_t>(bytes > 0 ? bytes : 1)) ? nullptr : memory;
}

}  // namespace sra2

extern "C" const char* sra2_cpu_isa(void) {
  switch (sra2::cpu_isa()) {
    case sra2::Isa::avx512: return "avx512";
    case sra2::Isa::avx2: return "avx2";
    default: return "base";
  }
}

extern "C" int32_t sra2_operators(void) { return SRA2_OPERATORS; }
