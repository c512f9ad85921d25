// The arithmetic of alignment_velocity_loss.h, compiled once for each instruction set.
#include "alignment_velocity_loss.h"

#include "vec.h"

namespace sra2 {
namespace SRA2_ISA {

constexpr int64_t PADDED = MAX_PATCH + STEP;

#if defined(__AVX512F__)
constexpr int DHIDDEN_ROWS = 8, DWEIGHT_COLUMNS = 8;  // times two vectors: 16 of the 32 registers accumulate
#else
constexpr int DHIDDEN_ROWS = 4, DWEIGHT_COLUMNS = 4;
#endif

SRA2_INLINE float to_float(float x) { return x; }
SRA2_INLINE float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  return get<float>(&bits);
}
SRA2_INLINE void from_float(float x, float* out) { *out = x; }
SRA2_INLINE void from_float(float x, bf16* out) {
  const uint32_t u = get<uint32_t>(&x);
  const uint32_t rounded = x != x ? u | 0x400000u : u + 0x7fffu + ((u >> 16) & 1u);
  out->bits = static_cast<uint16_t>(rounded >> 16);
}

SRA2_INLINE V splat(float x) { return x - V{}; }  // x + V{} would stay an addition: -0 + 0 is 0

// Lane sums of a and b, halved: groups of 2 GROUP lanes of (a, b) become groups of GROUP lanes.
template <int GROUP>
SRA2_INLINE V halve(V a, V b) {
  U low, high;  // lanes counted over those of a, then of b
  for (unsigned i = 0; i < W; ++i) {
    low[i] = i / GROUP * 2 * GROUP + i % GROUP;
    high[i] = low[i] + GROUP;
  }
#if defined(__clang__)
  V sums;  // no __builtin_shuffle there, but this loop becomes shuffles
  for (int i = 0; i < W; ++i) {
    const unsigned l = low[i], h = high[i];
    sums[i] = (l < W ? a[l] : b[l - W]) + (h < W ? a[h] : b[h - W]);
  }
  return sums;
#else
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
#endif
}

// out[i] = sum of the lanes of v[i]; a tree over W vectors at a time, with as many shuffles as additions.
template <int GROUP = W / 2>
SRA2_INLINE void sum_lanes(V* v) {
  if constexpr (GROUP >= 1) {
    for (int i = 0; i < GROUP; ++i) v[i] = halve<GROUP>(v[2 * i], v[2 * i + 1]);
    sum_lanes<GROUP / 2>(v);
  }
}
SRA2_INLINE void sum_sixteen(V v[16], float out[16]) {
  for (int i = 0; i < 16; i += W) {
    sum_lanes(v + i);
    put(out + i, v[i]);
  }
}

constexpr int TILE = 4;  // rows and columns of p that accumulate together

// p[r][q] = <hidden row r, weight row q> + bias for TILE rows; rows beyond the last are read twice, never stored.
template <class T>
static void project(const sra2_loss& a, int64_t row, int64_t rows, float p[TILE][PADDED]) {
  const int64_t K = a.K, P = a.P, tiles = (P + TILE - 1) / TILE;
  const T* hidden[TILE];
  for (int r = 0; r < TILE; ++r) hidden[r] = static_cast<const T*>(a.hidden) + (row + (r < rows ? r : rows - 1)) * K;
  for (int64_t q = 0; q < P; q += TILE) {
    const T* weight[TILE];
    for (int c = 0; c < TILE; ++c) weight[c] = static_cast<const T*>(a.weight) + (q + c < P ? q + c : P - 1) * K;
    // Rows of the next tile that these columns prefetch: all columns a share. Cold, 897 -> 723 us, bf16 797 -> 627.
    const T* next[TILE];
    int prefetched = 0;
    for (int r = 0; r < TILE; ++r)
      if (r * tiles / TILE == q / TILE) next[prefetched++] = hidden[r] + TILE * K;
    V sums[TILE * TILE] = {};
    each_step(K, [&](int64_t k, int64_t n, auto full) __attribute__((always_inline)) {
      constexpr bool FULL = decltype(full)::value;
      constexpr bool PAIRS = same<T, bf16>;
      V w[TILE], w2[TILE];
      for (int r = 0; FULL && r < prefetched; ++r) prefetch(next[r] + k);
      _Pragma("GCC unroll 4") for (int c = 0; c < TILE; ++c) load<PAIRS, FULL>(weight[c] + k, n, w[c], w2[c]);
      _Pragma("GCC unroll 4") for (int r = 0; r < TILE; ++r) {
        V h, h2;
        load<PAIRS, FULL>(hidden[r] + k, n, h, h2);
        hold_in_register(h);
        hold_in_register(h2);
        _Pragma("GCC unroll 4") for (int c = 0; c < TILE; ++c) sums[TILE * r + c] += h * w[c];
        _Pragma("GCC unroll 4") for (int c = 0; c < TILE; ++c) sums[TILE * r + c] += h2 * w2[c];
      }
    });
    float out[TILE * TILE];
    sum_sixteen(sums, out);
    for (int r = 0; r < TILE; ++r)
      for (int c = 0; c < TILE; ++c) {
        const int64_t column = q + c < P ? q + c : P - 1;
        p[r][q + c] = out[TILE * r + c] + to_float(static_cast<const T*>(a.bias)[column]);
      }
  }
  for (int r = 0; r < TILE; ++r)
    for (int64_t q = P; q < P + W; ++q) p[r][q] = 0.f;
}

// Where token n of sample b begins in an image (B, C, H, width).
SRA2_INLINE int64_t corner_of(const sra2_loss& a, int64_t b, int64_t n) {
  const int64_t columns = a.width / a.patch_size, row = n / columns;
  return (b * a.C * a.H + row * a.patch_size) * a.width + (n - row * columns) * a.patch_size;
}

// That token, padded with zeros to whole vectors. SIZE is the patch size where the compiler shall know it, or 0.
template <int SIZE>
SRA2_INLINE void patch_of(const sra2_loss& a, const float* corner, float* out) {
  const int64_t p = SIZE ? SIZE : a.patch_size, plane = a.H * a.width;
  for (int64_t c = 0; c < a.C; ++c, corner += plane, ++out)
    for (int64_t i = 0; i < p; ++i)
      for (int64_t j = 0; j < p; ++j) out[(i * p + j) * a.C] = corner[i * a.width + j];
}
static void patch(const sra2_loss& a, const float* corner, float* out) {
  switch (a.patch_size) {
    case 1: patch_of<1>(a, corner, out); break;
    case 2: patch_of<2>(a, corner, out); break;
    case 4: patch_of<4>(a, corner, out); break;
    default: patch_of<0>(a, corner, out);
  }
  for (int64_t q = a.P; q < a.P + W; ++q) out[q] = 0.f;
}

template <class T>
SRA2_INLINE void store_row(void* out, int64_t row, int64_t P, const float* values) {
  T* to = static_cast<T*>(out) + row * P;
  for (int64_t q = 0; q < P; ++q) from_float(values[q], to + q);
}

SRA2_INLINE V absolute(V x) { return (V)((U)x & 0x7fffffffu); }
SRA2_INLINE V sign_of(V x) { return x > 0.f ? splat(1.f) : (x < 0.f ? splat(-1.f) : V{}); }
SRA2_INLINE V lesser(V a, V b) { return a < b ? a : b; }

// The loss of one token's elements, added to `loss` lane by lane; their gradients, times `scale`, replace p.
static void elementwise(int32_t align, int64_t P, float beta, float scale, float* p, const float* z, V& loss) {
  const V beta_v = splat(beta);
  for (int64_t q = 0; q < P; q += W) {
    const V d = get<V>(p + q) - get<V>(z + q), size = absolute(d);
    if (align == SRA2_SMOOTH_L1) {
      const V inside = lesser(size, beta_v);  // loss = inside (|d| - inside / 2) / beta: both branches in one
      loss += inside * (size - 0.5f * inside) / beta;
      put(p + q, d * scale / (size > beta_v ? size : beta_v));
    } else if (align == SRA2_MSE) {
      loss += d * d;
      put(p + q, d * (2.f * scale));
    } else {
      loss += size;
      put(p + q, sign_of(d) * scale);
    }
  }
}

// The same for the cosine of TILE tokens; returns the sum of their cosines, negative.
static float cosines(int64_t P, int64_t rows, float eps, float scale, float p[TILE][PADDED], float z[TILE][PADDED]) {
  V products[16] = {};  // of TILE rows each: p p, z z, p z
  for (int r = 0; r < TILE; ++r)
    for (int64_t q = 0; q < P; q += W) {
      const V a = get<V>(p[r] + q), b = get<V>(z[r] + q);
      products[r] += a * a;
      products[TILE + r] += b * b;
      products[2 * TILE + r] += a * b;
    }
  float sums[16], loss = 0.f;
  sum_sixteen(products, sums);
  for (int r = 0; r < rows; ++r) {
    const float norm = __builtin_sqrtf(sums[r]), z_norm = __builtin_sqrtf(sums[TILE + r]);
    const float m = norm > eps ? norm : eps, z_m = z_norm > eps ? z_norm : eps;
    const float cosine = sums[2 * TILE + r] / (m * z_m);
    const float along = norm >= eps ? cosine / m : 0.f;
    loss -= cosine;
    for (int64_t q = 0; q < P; q += W) {
      const V gradient = get<V>(z[r] + q) / z_m - along * get<V>(p[r] + q);
      put(p[r] + q, gradient * (-scale / m));
    }
  }
  return loss;
}

template <class T, class S>
static void fwd_of(const sra2_loss& a, int64_t b, int64_t first, int64_t end, double sums[2]) {
  const int64_t P = a.P;
  const float tokens = static_cast<float>(a.B * a.N), elements = tokens * static_cast<float>(P);
  const float half_pi = 1.57079632679489662f, angle = half_pi * a.t[b];
  const float da = a.path == SRA2_LINEAR ? -1.f : -half_pi * __builtin_sinf(angle);
  const float ds = a.path == SRA2_LINEAR ? 1.f : half_pi * __builtin_cosf(angle);
  float p[TILE][PADDED], z[TILE][PADDED], noise[PADDED], velocity[PADDED];
  V velocity_loss = {}, align_loss = {};
  double cosine_loss = 0;
  for (int64_t n = first; n < end; n += TILE) {
    const int64_t rows = end - n < TILE ? end - n : TILE, row = b * a.N + n;
    project<T>(a, row, rows, p);
    for (int64_t r = 0; r < TILE; ++r) {
      if (r >= rows) {
        memcpy(z[r], z[0], sizeof(float) * static_cast<size_t>(P + W));
        continue;
      }
      const int64_t corner = corner_of(a, b, n + r);
      patch(a, a.latents + corner, z[r]);
      patch(a, a.noise + corner, noise);
      unpack_row<false>(static_cast<const S*>(a.velocity) + (row + r) * P, same<S, bf16>, 0.f, velocity, P);
      for (int64_t q = 0; q < P; q += W) {
        const V d = get<V>(velocity + q) - (da * get<V>(z[r] + q) + ds * get<V>(noise + q));
        velocity_loss += d * d;
        put(velocity + q, d * (2.f / elements));
      }
      store_row<S>(a.dvelocity, row + r, P, velocity);
      if (a.align != SRA2_COSINE) elementwise(a.align, P, a.beta, 1.f / elements, p[r], z[r], align_loss);
    }
    if (a.align == SRA2_COSINE) cosine_loss += static_cast<double>(cosines(P, rows, a.eps, 1.f / tokens, p, z));
    for (int64_t r = 0; r < rows; ++r) store_row<T>(a.dp, row + r, P, p[r]);
  }
  sums[0] = static_cast<double>(sum(velocity_loss));
  sums[1] = cosine_loss + static_cast<double>(sum(align_loss));
}

static void fwd(const sra2_loss& a, int64_t b, int64_t first, int64_t end, double sums[2]) {
  by_dtype(a.hidden_dtype, [&](auto h) {
    by_dtype(a.velocity_dtype, [&](auto v) { fwd_of<decltype(h), decltype(v)>(a, b, first, end, sums); });
  });
}

// scale dp of one row as float32.
template <class T>
SRA2_INLINE void scaled_row(const sra2_loss_bwd& a, int64_t row, float* out) {
  const T* dp = static_cast<const T*>(a.dp) + row * a.P;
  for (int64_t q = 0; q < a.P; ++q) out[q] = a.scale * to_float(dp[q]);
}

template <class T, int R>
static void dhidden_rows(const sra2_loss_bwd& a, int64_t row, bool non_temporal) {
  constexpr bool PAIRS = same<T, bf16>;
  float dp[MAX_PATCH][R];
  float one[MAX_PATCH];
  for (int r = 0; r < R; ++r) {
    scaled_row<T>(a, row + r, one);
    for (int64_t q = 0; q < a.P; ++q) dp[q][r] = one[q];
  }
  T* out = static_cast<T*>(a.dhidden) + row * a.K;
  each_step(a.K, [&](int64_t k, int64_t n, auto full) __attribute__((always_inline)) {
    constexpr bool FULL = decltype(full)::value;
    V sums[R] = {}, sums2[R] = {};
    const T* weight = static_cast<const T*>(a.weight) + k;
    for (int64_t q = 0; q < a.P; ++q, weight += a.K) {
      V w, w2;
      load<PAIRS, FULL>(weight, n, w, w2);
      _Pragma("GCC unroll 8") for (int r = 0; r < R; ++r) {
        V d = splat(dp[q][r]);
        hold_in_register(d);
        sums[r] += d * w;
        sums2[r] += d * w2;
      }
    }
    _Pragma("GCC unroll 8") for (int r = 0; r < R; ++r)
        store<PAIRS, FULL>(out + r * a.K + k, n, sums[r], sums2[r], non_temporal);
  });
}

template <class T>
static void dhidden_of(const sra2_loss_bwd& a, int64_t first, int64_t end, bool non_temporal) {
  for (; first + DHIDDEN_ROWS <= end; first += DHIDDEN_ROWS) dhidden_rows<T, DHIDDEN_ROWS>(a, first, non_temporal);
  for (; first < end; ++first) dhidden_rows<T, 1>(a, first, non_temporal);
  if (non_temporal) fence();
}

// Rows are taken in blocks small enough to stay in the first-level cache while all of P is accumulated; a block's sum
// starts from zero, which also keeps the rounding of a long sum down.
template <class T>
static void dweight_of(const sra2_loss_bwd& a, int64_t first, int64_t end, float* total) {
  constexpr int64_t BLOCK = 64, AHEAD = 32;
  constexpr int Q = DWEIGHT_COLUMNS;
  constexpr bool PAIRS = same<T, bf16>;
  const int64_t width = end - first;
  const int64_t stride = (a.P + Q - 1) / Q * Q;
  float dp[BLOCK * MAX_PATCH + Q];
  for (int64_t i = 0; i < a.P * width; ++i) total[i] = 0.f;
  for (int64_t row = 0; row < a.rows; row += BLOCK) {
    const int64_t rows = a.rows - row < BLOCK ? a.rows - row : BLOCK;
    for (int64_t r = 0; r < rows; ++r) {
      scaled_row<T>(a, row + r, dp + r * stride);
      for (int64_t q = a.P; q < stride; ++q) dp[r * stride + q] = 0.f;
    }
    each_step(width, [&](int64_t k, int64_t n, auto full) __attribute__((always_inline)) {
      constexpr bool FULL = decltype(full)::value;
      for (int64_t q = 0; q < a.P; q += Q) {
        V sums[Q] = {}, sums2[Q] = {};
        const T* hidden = static_cast<const T*>(a.hidden) + row * a.K + first + k;
        const float* d = dp + q;
        for (int64_t r = 0; r < rows; ++r, hidden += a.K, d += stride) {
          V h, h2;
          if (q == 0) {  // no hardware prefetcher follows a stride of K; within the noise to 20 % faster
            __builtin_prefetch(hidden + AHEAD * a.K);
            __builtin_prefetch(hidden + AHEAD * a.K + STEP - 1);
          }
          load<PAIRS, FULL>(hidden, n, h, h2);
          _Pragma("GCC unroll 8") for (int c = 0; c < Q; ++c) {
            V one = splat(d[c]);
            hold_in_register(one);
            sums[c] += one * h;
            sums2[c] += one * h2;
          }
        }
        for (int c = 0; c < Q && q + c < a.P; ++c) {
          V s, s2;
          float* to = total + (q + c) * width + k;
          float natural[STEP];
          store<PAIRS>(natural, sums[c], sums2[c]);
          load<false, FULL>(to, n, s, s2);
          store<false, FULL>(to, n, s + get<V>(natural), s2 + get<V>(natural + W));
        }
      }
    });
  }
  for (int64_t q = 0; q < a.P; ++q)
    memcpy(a.dweight + q * a.K + first, total + q * width, sizeof(float) * static_cast<size_t>(width));
}

template <class T>
static void dbias_of(const sra2_loss_bwd& a) {
  double total[MAX_PATCH] = {};
  float one[MAX_PATCH];
  for (int64_t row = 0; row < a.rows; ++row) {
    scaled_row<T>(a, row, one);
    for (int64_t q = 0; q < a.P; ++q) total[q] += static_cast<double>(one[q]);
  }
  for (int64_t q = 0; q < a.P; ++q) a.dbias[q] = static_cast<float>(total[q]);
}

static void dhidden(const sra2_loss_bwd& a, int64_t first, int64_t end, bool non_temporal) {
  a.dtype == SRA2_BF16 ? dhidden_of<bf16>(a, first, end, non_temporal) : dhidden_of<float>(a, first, end, non_temporal);
}
static void dweight(const sra2_loss_bwd& a, int64_t first, int64_t end, float* sums) {
  a.dtype == SRA2_BF16 ? dweight_of<bf16>(a, first, end, sums) : dweight_of<float>(a, first, end, sums);
}
static void dbias(const sra2_loss_bwd& a) { a.dtype == SRA2_BF16 ? dbias_of<bf16>(a) : dbias_of<float>(a); }

extern const LossKernels loss_kernels;
const LossKernels loss_kernels = {fwd, dhidden, dweight, dbias};

}  // namespace SRA2_ISA
}  // namespace sra2
