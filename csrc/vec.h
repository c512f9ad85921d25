// The vectors of one instruction set: float32 arithmetic on float32 and bf16 memory. Included by csrc/*_isa.cpp, which
// are compiled once for each set with SRA2_ISA its name. Nothing from std:: in those files: an inline function compiled
// for wider registers must not be the one copy the linker keeps for everybody.
//
// Memory is walked in steps of STEP = 2 W elements, two vectors at a time, in one of two orders. NATURAL: the first W,
// then the next W. PAIRS, for rows that are all bf16: the even elements, then the odd ones. Two bf16 share a 32-bit
// lane, so splitting and joining them in that order takes shifts and masks but no shuffle; conversions, not bytes, are
// what bf16 rows cost.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "sra2_c_api.h"

#define SRA2_INLINE inline __attribute__((always_inline))

namespace sra2 {
namespace SRA2_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#else
constexpr int W = 8;  // also where registers hold four: sums over more lanes are more exact
#endif
constexpr int STEP = 2 * W;

// The compiler's vector types: arithmetic is lane by lane. V: float32, U: its bits, H: as many bf16.
typedef float V __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));
struct bf16 {
  uint16_t bits;
};
template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

// Calls f with a value of the type that a dtype of sra2_c_api.h names.
template <class F>
void by_dtype(int32_t dtype, const F& f) {
  dtype == SRA2_BF16 ? f(bf16()) : f(float());
}

SRA2_INLINE float sum(V v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
  __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
#endif
}

// float32 bits whose upper half is the nearest bf16 (ties to even), NaN kept and made quiet; the lower half is noise.
SRA2_INLINE U round_bits(V f) {
#if defined(__AVX512F__)
  // Four instructions instead of six: a table look-up makes NaN's lower bits zero, so that rounding cannot overflow
  // them, and the tie goes to even by a masked add.
  const __m512i token_of_nan = _mm512_set1_epi32(0x33);  // QNaN and SNaN: the canonical NaN; all else: as it is
  __m512i u = _mm512_castps_si512(_mm512_fixupimm_ps((__m512)f, (__m512)f, token_of_nan, 0));
  __mmask16 is_odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
  __m512i rounded = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
  return (U)_mm512_mask_add_epi32(rounded, is_odd, rounded, _mm512_set1_epi32(1));
#else
  U u = (U)f;
  U rounded = u + 0x7fffu + ((u >> 16) & 1u);
  return f != f ? u | 0x400000u : rounded;
#endif
}

// One element, for plain loops.
SRA2_INLINE float widened(float f) { return f; }
SRA2_INLINE float widened(bf16 h) {
  const uint32_t u = static_cast<uint32_t>(h.bits) << 16;
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}
SRA2_INLINE uint16_t rounded_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, sizeof u);
  const uint32_t rounded = u + 0x7fffu + ((u >> 16) & 1u);
  return static_cast<uint16_t>((f != f ? u | 0x400000u : rounded) >> 16);
}

// Have v in a register. A product that reads memory itself loads once for each use, and with an index costs another
// instruction: a tile of 4 x 4 sums runs at 146 GFLOP/s with its rows held, at 80 without (one core of an Ice Lake).
SRA2_INLINE void hold_in_register(V& v) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(v));
#elif defined(__AVX2__)
  __asm__("" : "+x"(v));
#endif
  (void)v;
}

// The value that storing as T keeps.
template <class T>
SRA2_INLINE V rounded_to(V f) {
  if constexpr (same<T, bf16>) return (V)(round_bits(f) & 0xffff0000u);
  return f;
}

template <class T>
SRA2_INLINE T get(const void* p) {
  T v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
SRA2_INLINE void put(void* p, T v) {
  memcpy(p, &v, sizeof v);
}

// STEP elements.
template <bool PAIRS>
SRA2_INLINE void load(const float* p, V& a, V& b) {
  if constexpr (PAIRS) {
    for (int i = 0; i < W; ++i) {
      a[i] = p[2 * i];
      b[i] = p[2 * i + 1];
    }
  } else {
    a = get<V>(p);
    b = get<V>(p + W);
  }
}
template <bool PAIRS>
SRA2_INLINE void load(const bf16* p, V& a, V& b) {
  if constexpr (PAIRS) {
    U u = get<U>(p);
    a = (V)(u << 16);
    b = (V)(u & 0xffff0000u);
  } else {
    a = (V)(__builtin_convertvector(get<H>(p), U) << 16);
    b = (V)(__builtin_convertvector(get<H>(p + W), U) << 16);
  }
}
// Non-temporal stores, past the caches, for rows larger than they are: a plain store first reads the line that it
// overwrites. p must be aligned to the vector; fence() before another thread looks.
SRA2_INLINE void put_non_temporal(void* p, V v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(static_cast<float*>(p), (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(static_cast<float*>(p), (__m256)v);
#elif defined(__SSE2__)
  const __m128* half = reinterpret_cast<const __m128*>(&v);
  _mm_stream_ps(static_cast<float*>(p), half[0]);
  _mm_stream_ps(static_cast<float*>(p) + 4, half[1]);
#else
  put(p, v);
#endif
}
SRA2_INLINE void put_non_temporal(void* p, H v) {
#if defined(__AVX512F__)
  _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#elif defined(__AVX2__)
  _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
#else
  put(p, v);
#endif
}
SRA2_INLINE void fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}
template <bool NON_TEMPORAL, class T>
SRA2_INLINE void place(void* p, T v) {
  if constexpr (NON_TEMPORAL)
    put_non_temporal(p, v);
  else
    put(p, v);
}

// STEP elements.
template <bool PAIRS, bool NON_TEMPORAL = false>
SRA2_INLINE void store(float* p, V a, V b) {
  if constexpr (PAIRS) {
    for (int i = 0; i < W; ++i) {
      p[2 * i] = a[i];
      p[2 * i + 1] = b[i];
    }
  } else {
    place<NON_TEMPORAL>(p, a);
    place<NON_TEMPORAL>(p + W, b);
  }
}
template <bool PAIRS, bool NON_TEMPORAL = false>
SRA2_INLINE void store(bf16* p, V a, V b) {
  if constexpr (PAIRS) {
    place<NON_TEMPORAL>(p, (V)((round_bits(a) >> 16) | (round_bits(b) & 0xffff0000u)));
  } else {
    place<NON_TEMPORAL>(p, __builtin_convertvector(round_bits(a) >> 16, H));
    place<NON_TEMPORAL>(p + W, __builtin_convertvector(round_bits(b) >> 16, H));
  }
}

// The same for the last n < STEP elements of a row: nothing beyond them is touched, and zeros are loaded for them.
template <bool PAIRS, class T>
SRA2_INLINE void load_some(const T* p, int64_t n, V& a, V& b) {
  T row[STEP] = {};
  if (n == W)  // a latent's token, at times; a copy of a size known here is two instructions
    memcpy(row, p, W * sizeof(T));
  else
    memcpy(row, p, static_cast<size_t>(n) * sizeof(T));
  load<PAIRS>(row, a, b);
}
template <bool PAIRS, class T>
SRA2_INLINE void store_some(T* p, int64_t n, V a, V b) {
  T row[STEP];
  store<PAIRS>(row, a, b);
  memcpy(p, row, static_cast<size_t>(n) * sizeof(T));
}

// Either of the two: FULL is known when compiling.
template <bool PAIRS, bool FULL, class T>
SRA2_INLINE void load(const T* p, int64_t n, V& a, V& b) {
  if constexpr (FULL)
    load<PAIRS>(p, a, b);
  else
    load_some<PAIRS>(p, n, a, b);
}
template <bool PAIRS, bool FULL, class T>
SRA2_INLINE void store(T* p, int64_t n, V a, V b, bool non_temporal = false) {
  if constexpr (!FULL)
    store_some<PAIRS>(p, n, a, b);
  else if (non_temporal)
    store<PAIRS, true>(p, a, b);
  else
    store<PAIRS>(p, a, b);
}

// n elements from cache to where store() would put them.
template <bool FULL, class T>
SRA2_INLINE void move(T* to, const T* from, int64_t n, bool non_temporal) {
  if constexpr (FULL) {
    for (int i = 0; i < STEP; i += static_cast<int>(sizeof(V) / sizeof(T))) {
      if (non_temporal)
        put_non_temporal(to + i, get<V>(from + i));
      else
        put(to + i, get<V>(from + i));
    }
  } else {
    memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
  }
}

// The cache lines of STEP elements.
template <class T>
SRA2_INLINE void prefetch(const T* p) {
  const char* line = reinterpret_cast<const char*>(p);
  for (int i = 0; i < static_cast<int>(STEP * sizeof(T)); i += 64) __builtin_prefetch(line + i);
}

// true and false as types, which a lambda's argument can carry to `if constexpr`.
struct Yes {
  static constexpr bool value = true;
};
struct No {
  static constexpr bool value = false;
};
// Calls body(k, n, full) for every step of a row of D elements: full is Yes() for all but a last short one.
template <class F>
SRA2_INLINE void each_step(int64_t D, const F& body) {
  int64_t k = 0;
  for (; k + STEP <= D; k += STEP) body(k, static_cast<int64_t>(STEP), Yes());
  if (k < D) body(k, D - k, No());
}

// A row of any dtype as float32 in the given order, plus a constant, padded with zeros to whole steps.
template <bool PAIRS>
inline void unpack_row(const void* row, bool is_bf16, float plus, float* out, int64_t D) {
  each_step(D, [&](int64_t k, int64_t n, auto full) __attribute__((always_inline)) {
    constexpr bool FULL = decltype(full)::value;
    V a, b;
    if (is_bf16)
      load<PAIRS, FULL>(static_cast<const bf16*>(row) + k, n, a, b);
    else
      load<PAIRS, FULL>(static_cast<const float*>(row) + k, n, a, b);
    put(out + k, a + plus);
    put(out + k + W, b + plus);
  });
}

}  // namespace SRA2_ISA
}  // namespace sra2
