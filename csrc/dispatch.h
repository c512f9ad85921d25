// Which instruction set, memory, and how work is spread over threads; what every csrc/*_cpu.cpp starts from.
#pragma once
#include <stdint.h>
#include <stdlib.h>

#include "sra2_c_api.h"

namespace sra2 {

enum class Isa { base, avx2, avx512 };

Isa cpu_isa();
void* allocate(int64_t bytes);

// A table of kernels that a csrc/*_isa.cpp defines once for each instruction set, as `const TABLE SRA2_ISA::NAME`:
// declares the three and defines `const TABLE& NAME()`, which picks. Use inside namespace sra2.
#ifdef SRA2_X86_DISPATCH
#define SRA2_DISPATCH(TABLE, NAME)           \
  namespace base {                           \
  extern const TABLE NAME;                   \
  }                                          \
  namespace avx2 {                           \
  extern const TABLE NAME;                   \
  }                                          \
  namespace avx512 {                         \
  extern const TABLE NAME;                   \
  }                                          \
  static const TABLE& NAME() {               \
    switch (cpu_isa()) {                     \
      case Isa::avx512: return avx512::NAME; \
      case Isa::avx2: return avx2::NAME;     \
      default: return base::NAME;            \
    }                                        \
  }
#else
#define SRA2_DISPATCH(TABLE, NAME) \
  namespace base {                 \
  extern const TABLE NAME;         \
  }                                \
  static const TABLE& NAME() { return base::NAME; }
#endif

// Uninitialised, 64-byte aligned memory for n of T; null data where there is none left.
template <class T>
struct Array {
  T* data;
  explicit Array(int64_t n) : data(static_cast<T*>(allocate(n * static_cast<int64_t>(sizeof(T))))) {}
  Array(const Array&) = delete;
  ~Array() { free(data); }
};

// f(begin, end) over [0, n) in pieces of at least grain.
template <class F>
int32_t parallel_for(sra2_parallel parallel, int64_t n, int64_t grain, const F& f) {
  auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); };
  void* context = const_cast<F*>(&f);
  if (n <= 0) return 0;
  if (parallel) return parallel(0, n, grain < 1 ? 1 : grain, call, context);
  call(0, n, context);
  return 0;
}

// f(begin, end, scratch) likewise, with that many floats of scratch for each call; 1 where memory ran out.
template <class F>
int32_t parallel_for(sra2_parallel parallel, int64_t n, int64_t grain, int64_t floats, const F& f) {
  bool out_of_memory = false;
  const int32_t error = parallel_for(parallel, n, grain, [&](int64_t begin, int64_t end) {
    const Array<float> scratch(floats);
    if (scratch.data)
      f(begin, end, scratch.data);
    else
      __atomic_store_n(&out_of_memory, true, __ATOMIC_RELAXED);
  });
  return out_of_memory ? 1 : error;
}

// How the N rows of each of B samples are cut into pieces, runs of rows that one thread takes and sums. It depends on
// the shape alone, never on the number of threads, and the pieces' sums are added in order: so every run gives the same
// bits. At most about 256 pieces: enough for the threads of one socket, few enough that the partial sums stay small
// beside the rows.
struct Pieces {
  int64_t B, N, per_sample;
  Pieces(int64_t B, int64_t N, int64_t smallest_rows = 32) : B(B), N(N) {
    int64_t most = (256 + B - 1) / (B > 0 ? B : 1);
    per_sample = N / smallest_rows;
    if (per_sample > most) per_sample = most;
    if (per_sample < 1) per_sample = 1;
  }
  int64_t count() const { return B * per_sample; }
  int64_t sample(int64_t piece) const { return piece / per_sample; }
  int64_t first_row(int64_t piece) const { return N * (piece % per_sample) / per_sample; }  // within the sample
  int64_t end_row(int64_t piece) const { return N * (piece % per_sample + 1) / per_sample; }
};

// Whether rows are better stored past the caches (vec.h): they are more than a core keeps, and aligned. Null data is.
inline bool is_non_temporal(const void* data, int64_t rows, int64_t columns, int32_t dtype) {
  const int64_t row_bytes = columns * (dtype == SRA2_BF16 ? 2 : 4);
  return !data || (rows * row_bytes >= (1 << 20) && row_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(data) % 64 == 0);
}

}  // namespace sra2
