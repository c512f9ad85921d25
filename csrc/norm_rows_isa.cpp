// Rows of y = LN(x)(1 + scale) + shift and of its gradients, optionally with x = x_old + gate branch on the way in.
// Formulas: sra2_fast/reference/layer_norm_modulate.py and gated_residual_layer_norm_modulate.py.
#include "norm_rows.h"

#include "vec.h"

namespace sra2 {
namespace SRA2_ISA {

// Rows in flight: their loads and reductions overlap, and modulation and partial sums are read once for all of them.
// Each pass prefetches a share of the next rows, since a core waits for few lines at once, and large results are stored
// past the caches. Two threads of a 2.8 GHz Ice Lake, cold caches, (4, 256, 1152), us, when the last pass prefetched
// all and stores went through the caches -> now (a copy of as many bytes): float32 forward 530 -> 429 (514), backward
// 776 -> 678 (751), gated 950 -> 762 (1008) and 1328 -> 1158 (1440); bf16 403 -> 354 (281), 588 -> 518 (393), gated
// 659 -> 590 (503) and 968 -> 820 (733).
constexpr int ROWS = 4;
#define SRA2_ROWS _Pragma("GCC unroll 4") for (int r = 0; r < R; ++r)

template <class T>
SRA2_INLINE T* row(const sra2_rows& rows, int64_t i) {
  return static_cast<T*>(rows.data) + i * rows.stride;
}

// The pass, of PASSES over R rows, that prefetches the r-th of the next R.
template <int R, int PASSES>
constexpr int pass_of(int r) {
  return (r * PASSES + PASSES - 1) / R;
}

// X, B, Y: the types of x and its gradient, of the branch and its, and of y or dy. R rows from row i on.
template <class X, class B, class Y, bool BRANCH, int R>
static void fwd_rows(const NormArgs& args, int64_t i, float* scratch) {
  const NormArgs a = args;  // a copy: the stores below cannot change it, so nothing of it is read twice
  constexpr bool PAIRS = same<X, bf16> && same<Y, bf16> && (!BRANCH || same<B, bf16>);
  const int64_t D = a.shape.D;
  const float *scale1 = scratch, *shift = scratch + a.padded, *gate = scratch + 2 * a.padded;
  X* x_new = reinterpret_cast<X*>(scratch + 3 * a.padded);  // R rows, in cache until the last pass
  const X* x[R];                                            // the rows to normalise
  // Of even and odd vectors: short sums are more exact sums.
  V total[2][R] = {}, squares[2][R] = {};
  SRA2_ROWS x[r] = BRANCH ? x_new + r * a.padded : row<X>(a.x, i + r);
  const auto prefetch_next = [&](int r, int64_t k) __attribute__((always_inline)) {
    prefetch(row<X>(a.x, i + r + R) + k);
    if constexpr (BRANCH) prefetch(row<B>(a.branch, i + r + R) + k);
  };

  each_step(D, [&](int64_t k, int64_t n, auto full) __attribute__((always_inline)) {
    constexpr bool FULL = decltype(full)::value;
    SRA2_ROWS {
      V p, q;
      if (FULL && pass_of<R, 3>(r) == 0) prefetch_next(r, k);
      if constexpr (BRANCH) {
        V bp, bq;
        load<PAIRS, FULL>(row<X>(a.x, i + r) + k, n, p, q);
        load<PAIRS, FULL>(row<B>(a.branch, i + r) + k, n, bp, bq);
        p = rounded_to<X>(p + get<V>(gate + k) * bp);  // the norm is of the x_new that is kept for backward
        q = rounded_to<X>(q + get<V>(gate + k + W) * bq);
        store<PAIRS>(x_new + r * a.padded + k, p, q);
      } else {
        load<PAIRS, FULL>(x[r] + k, n, p, q);
      }
      total[0][r] += p;
      total[1][r] += q;
    }
  });
  float mean[R], rstd[R];
  SRA2_ROWS mean[r] = sum(total[0][r] + total[1][r]) / static_cast<float>(D);

  each_step(D, [&](int64_t k, int64_t n, auto full) __attribute__((always_inline)) {
    constexpr bool FULL = decltype(full)::value;
    V in_p, in_q;  // 1 for elements of the row, 0 for padding
    if constexpr (!FULL) {
      float ones[STEP];
      for (int j = 0; j < STEP; ++j) ones[j] = 1.f;
      load_some<PAIRS>(ones, n, in_p, in_q);
    }
    SRA2_ROWS {
      V p, q;
      if (FULL && pass_of<R, 3>(r) == 1) prefetch_next(r, k);
      load<PAIRS, FULL>(x[r] + k, n, p, q);
      p -= mean[r];
      q -= mean[r];
      if constexpr (!FULL) {
        p *= in_p;
        q *= in_q;
      }
      squares[0][r] += p * p;
      squares[1][r] += q * q;
    }
  });
  SRA2_ROWS {
    rstd[r] = 1.f / __builtin_sqrtf(sum(squares[0][r] + squares[1][r]) / static_cast<float>(D) + a.eps);
    a.mean[i + r] = mean[r];
    a.rstd[i + r] = rstd[r];
  }

  each_step(D, [&](int64_t k, int64_t n, auto full) __attribute__((always_inline)) {
    constexpr bool FULL = decltype(full)::value;
    SRA2_ROWS {
      V p, q;
      if (FULL && pass_of<R, 3>(r) == 2) prefetch_next(r, k);
      load<PAIRS, FULL>(x[r] + k, n, p, q);
      if constexpr (BRANCH) move<FULL>(row<X>(a.x_new, i + r) + k, x[r] + k, n, a.non_temporal);
      p = (p - mean[r]) * rstd[r] * get<V>(scale1 + k) + get<V>(shift + k);
      q = (q - mean[r]) * rstd[r] * get<V>(scale1 + k + W) + get<V>(shift + k + W);
      store<PAIRS, FULL>(row<Y>(a.y, i + r) + k, n, p, q, a.non_temporal);
    }
  });
}

SRA2_INLINE void add_to(float* p, V v) { put(p, get<V>(p) + v); }

template <class X, class B, class Y, bool BRANCH, int R>
static void bwd_rows(const NormArgs& args, int64_t i, const float* scratch, float* sums) {
  const NormArgs a = args;
  constexpr bool PAIRS = same<X, bf16> && same<Y, bf16> && (!BRANCH || same<B, bf16>);
  const int64_t D = a.shape.D;
  const float *scale1 = scratch, *gate = scratch + 2 * a.padded;
  float *dscale = sums, *dshift = sums + a.padded, *dgate = sums + 2 * a.padded;
  const bool want_modulation = a.dscale.data || a.dshift.data;
  float mean[R], rstd[R];
  V g_sum[R] = {}, gx_sum[R] = {};
  const auto prefetch_next = [&](int r, int64_t k) __attribute__((always_inline)) {
    prefetch(row<X>(a.x, i + r + R) + k);
    prefetch(row<Y>(a.dy, i + r + R) + k);
  };
  SRA2_ROWS {
    mean[r] = a.mean[i + r];
    rstd[r] = a.rstd[i + r];
  }

  each_step(D, [&](int64_t k, int64_t n, auto full) __attribute__((always_inline)) {
    constexpr bool FULL = decltype(full)::value;
    const V sp = get<V>(scale1 + k), sq = get<V>(scale1 + k + W);
    V dscale_p = {}, dscale_q = {}, dshift_p = {}, dshift_q = {};
    SRA2_ROWS {
      V p, q, dp, dq;
      if constexpr (FULL) {
        if (pass_of<R, 2>(r) == 0) prefetch_next(r, k);
        if constexpr (BRANCH) {
          if (a.dx_new.data) prefetch(row<X>(a.dx_new, i + r) + k);
          prefetch(row<B>(a.branch, i + r) + k);
        }
      }
      load<PAIRS, FULL>(row<X>(a.x, i + r) + k, n, p, q);
      load<PAIRS, FULL>(row<Y>(a.dy, i + r) + k, n, dp, dq);
      p = (p - mean[r]) * rstd[r];  // not x rstd - mean rstd, which is off by mean rstd 2^-24: much, for a constant row
      q = (q - mean[r]) * rstd[r];
      dscale_p += dp * p;
      dscale_q += dq * q;
      dshift_p += dp;
      dshift_q += dq;
      dp *= sp;
      dq *= sq;
      g_sum[r] += dp + dq;
      gx_sum[r] += dp * p;
      gx_sum[r] += dq * q;
    }
    if (want_modulation) {
      add_to(dscale + k, dscale_p);
      add_to(dscale + k + W, dscale_q);
      add_to(dshift + k, dshift_p);
      add_to(dshift + k + W, dshift_q);
    }
  });
  if (!a.dx.data && !a.dbranch.data && !a.dgate.data) return;

  float c0[R], c1[R];  // dx = rstd g + c1 (x - mean) + c0
  SRA2_ROWS {
    c0[r] = -rstd[r] * sum(g_sum[r]) / static_cast<float>(D);
    c1[r] = -rstd[r] * rstd[r] * sum(gx_sum[r]) / static_cast<float>(D);
  }
  each_step(D, [&](int64_t k, int64_t n, auto full) __attribute__((always_inline)) {
    constexpr bool FULL = decltype(full)::value;
    const V sp = get<V>(scale1 + k), sq = get<V>(scale1 + k + W);
    V dgate_p = {}, dgate_q = {};
    SRA2_ROWS {
      V p, q, dp, dq;
      if (FULL && pass_of<R, 2>(r) == 1) prefetch_next(r, k);
      load<PAIRS, FULL>(row<X>(a.x, i + r) + k, n, p, q);
      load<PAIRS, FULL>(row<Y>(a.dy, i + r) + k, n, dp, dq);
      p = dp * sp * rstd[r] + ((p - mean[r]) * c1[r] + c0[r]);
      q = dq * sq * rstd[r] + ((q - mean[r]) * c1[r] + c0[r]);
      if constexpr (BRANCH) {
        if (a.dx_new.data) {
          load<PAIRS, FULL>(row<X>(a.dx_new, i + r) + k, n, dp, dq);
          p += dp;
          q += dq;
        }
        if (a.dgate.data) {
          load<PAIRS, FULL>(row<B>(a.branch, i + r) + k, n, dp, dq);
          dgate_p += p * dp;
          dgate_q += q * dq;
        }
        if (a.dbranch.data)
          store<PAIRS, FULL>(row<B>(a.dbranch, i + r) + k, n, p * get<V>(gate + k), q * get<V>(gate + k + W),
                             a.non_temporal);
      }
      if (!BRANCH || a.dx.data) store<PAIRS, FULL>(row<X>(a.dx, i + r) + k, n, p, q, a.non_temporal);
    }
    if constexpr (BRANCH) {
      if (a.dgate.data) {
        add_to(dgate + k, dgate_p);
        add_to(dgate + k + W, dgate_q);
      }
    }
  });
}

template <class X, class B, class Y, bool BRANCH>
static void fwd_all(const NormArgs& a, int64_t i, int64_t end, float* scratch) {
  for (; i + ROWS <= end; i += ROWS) fwd_rows<X, B, Y, BRANCH, ROWS>(a, i, scratch);
  for (; i < end; ++i) fwd_rows<X, B, Y, BRANCH, 1>(a, i, scratch);
}

template <class X, class B, class Y, bool BRANCH>
static void bwd_all(const NormArgs& a, int64_t i, int64_t end, const float* scratch, float* sums) {
  for (; i + ROWS <= end; i += ROWS) bwd_rows<X, B, Y, BRANCH, ROWS>(a, i, scratch, sums);
  for (; i < end; ++i) bwd_rows<X, B, Y, BRANCH, 1>(a, i, scratch, sums);
}

// Calls f for the dtypes of x, branch (bf16 where there is none) and y, which is y forward and dy backward.
template <class F>
static void by_dtypes(const NormArgs& a, const sra2_rows& y, const F& f) {
  by_dtype(a.x.dtype, [&](auto x) {
    by_dtype(y.dtype, [&](auto y) {
      if (a.branch.data)
        by_dtype(a.branch.dtype, [&](auto branch) { f(x, branch, y, Yes()); });
      else
        f(x, bf16(), y, No());
    });
  });
}

static bool in_pairs(const NormArgs& a) {
  const int32_t y = a.y.data ? a.y.dtype : a.dy.dtype;
  return a.x.dtype == SRA2_BF16 && y == SRA2_BF16 && (!a.branch.data || a.branch.dtype == SRA2_BF16);
}

static const void* row_of(const sra2_rows& rows, int64_t i) {
  return static_cast<const char*>(rows.data) + i * rows.stride * (rows.dtype == SRA2_BF16 ? 2 : 4);
}

template <bool PAIRS>
static void unpack_modulation(const NormArgs& a, int64_t b, float* scratch) {
  const int64_t D = a.shape.D;
  unpack_row<PAIRS>(row_of(a.scale, b), a.scale.dtype, 1.f, scratch, D);
  if (a.shift.data) unpack_row<PAIRS>(row_of(a.shift, b), a.shift.dtype, 0.f, scratch + a.padded, D);
  if (a.gate.data) unpack_row<PAIRS>(row_of(a.gate, b), a.gate.dtype, 0.f, scratch + 2 * a.padded, D);
}

static void load_modulation(const NormArgs& a, int64_t b, float* scratch) {
  if (in_pairs(a))
    unpack_modulation<true>(a, b, scratch);
  else
    unpack_modulation<false>(a, b, scratch);
}

static void fwd(const NormArgs& a, int64_t b, int64_t first, int64_t end, float* scratch) {
  const int64_t start = b * a.shape.N;
  by_dtypes(a, a.y, [&](auto x, auto branch, auto y, auto has_branch) {
    fwd_all<decltype(x), decltype(branch), decltype(y), has_branch.value>(a, start + first, start + end, scratch);
  });
  if (a.non_temporal) fence();
}

static void bwd(const NormArgs& a, int64_t b, int64_t first, int64_t end, const float* scratch, float* sums) {
  const int64_t start = b * a.shape.N;
  memset(sums, 0, static_cast<size_t>(a.sums()) * sizeof(float));
  by_dtypes(a, a.dy, [&](auto x, auto branch, auto y, auto has_branch) {
    bwd_all<decltype(x), decltype(branch), decltype(y), has_branch.value>(a, start + first, start + end, scratch, sums);
  });
  if (a.non_temporal) fence();
}

template <bool PAIRS, class T>
static void add_sum(const NormArgs& a, T* out, const float* sums, int64_t pieces) {
  each_step(a.shape.D, [&](int64_t k, int64_t n, auto full) __attribute__((always_inline)) {
    V p = {}, q = {};
    for (int64_t piece = 0; piece < pieces; ++piece) {
      p += get<V>(sums + piece * a.sums() + k);
      q += get<V>(sums + piece * a.sums() + k + W);
    }
    store<PAIRS, decltype(full)::value>(out + k, n, p, q);
  });
}

static void add_sums(const NormArgs& a, int64_t b, const float* sums, int64_t pieces) {
  const sra2_rows* outs[3] = {&a.dscale, &a.dshift, &a.dgate};
  const bool pairs = in_pairs(a);
  for (int j = 0; j < 3; ++j, sums += a.padded) {
    if (!outs[j]->data) continue;
    by_dtype(outs[j]->dtype, [&](auto t) {
      const auto out = row<decltype(t)>(*outs[j], b);
      pairs ? add_sum<true>(a, out, sums, pieces) : add_sum<false>(a, out, sums, pieces);
    });
  }
}

extern const NormKernels norm_kernels;
const NormKernels norm_kernels = {load_modulation, fwd, bwd, add_sums};

}  // namespace SRA2_ISA
}  // namespace sra2
