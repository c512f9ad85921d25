/* The part of cuBLASLt that kernels/cublaslt.py calls, on a CPU: column-major bf16 products with float32 sums and the
   three epilogues, as NVIDIA's documentation defines them. What it is not told, or told wrongly, it refuses. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };
enum { GELU_AUX_BIAS = 164, DGELU_BGRAD = 208, BGRADB = 512 };

typedef struct {
  int32_t transa, transb, epilogue;
  uint16_t *bias, *aux;
  int64_t aux_ld;
} Desc;
typedef struct {
  uint64_t rows, cols;
  int64_t ld;
} Layout;
typedef struct {
  uint64_t workspace;
  uint32_t alignment[4];
} Preference;
typedef struct {
  uint64_t algo[8];
  size_t workspace;
  int32_t state;
  float waves;
  int32_t reserved[4];
} Heuristic;

static float from_bf16(uint16_t h) {
  uint32_t u = (uint32_t)h << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static uint16_t to_bf16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
static double gelu(double x) { return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))); }
static double gelu_derivative(double x) {
  const double t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x));
  return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x);
}

int cublasLtCreate(void** handle) { return (*handle = malloc(1)) ? OK : 1; }
int cublasLtMatmulDescCreate(Desc** desc, int compute_type, int scale_type) {
  if (compute_type != 68 || scale_type != 0) return INVALID_VALUE;
  return (*desc = calloc(1, sizeof(Desc))) ? OK : 1;
}
int cublasLtMatmulDescSetAttribute(Desc* desc, int attribute, const void* value, size_t size) {
  struct {
    int attribute;
    size_t size;
    void* place;
  } known[] = {{3, 4, &desc->transa}, {4, 4, &desc->transb}, {7, 4, &desc->epilogue},
               {8, 8, &desc->bias},   {11, 8, &desc->aux},   {12, 8, &desc->aux_ld}};
  for (size_t i = 0; i < sizeof known / sizeof *known; ++i)
    if (known[i].attribute == attribute && known[i].size == size) {
      memcpy(known[i].place, value, size);
      return OK;
    }
  return INVALID_VALUE;
}
int cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t cols, int64_t ld) {
  if (type != 14 || ld < (int64_t)rows) return INVALID_VALUE;
  if (!(*layout = malloc(sizeof(Layout)))) return 1;
  **layout = (Layout){rows, cols, ld};
  return OK;
}
int cublasLtMatmulPreferenceCreate(Preference** preference) {
  return (*preference = calloc(1, sizeof(Preference))) ? OK : 1;
}
int cublasLtMatmulPreferenceDestroy(Preference* preference) {
  free(preference);
  return OK;
}
int cublasLtMatmulPreferenceSetAttribute(Preference* preference, int attribute, const void* value, size_t size) {
  if (attribute == 1 && size == 8) return memcpy(&preference->workspace, value, size), OK;
  if (attribute >= 5 && attribute <= 8 && size == 4)
    return memcpy(&preference->alignment[attribute - 5], value, size), OK;
  return INVALID_VALUE;
}

static int is_consistent(const Desc* desc, const Layout* a, const Layout* b, const Layout* d) {
  const uint64_t m = desc->transa ? a->cols : a->rows, k = desc->transa ? a->rows : a->cols;
  const uint64_t n = desc->transb ? b->rows : b->cols, also_k = desc->transb ? b->cols : b->rows;
  if (m != d->rows || n != d->cols || k != also_k || !desc->bias) return 0;
  if (desc->epilogue == BGRADB) return 1;
  if (desc->epilogue != GELU_AUX_BIAS && desc->epilogue != DGELU_BGRAD) return 0;
  return desc->aux && desc->aux_ld % 8 == 0 && desc->aux_ld >= (int64_t)d->rows;
}
int cublasLtMatmulAlgoGetHeuristic(void* handle, const Desc* desc, const Layout* a, const Layout* b, const Layout* c,
                                   const Layout* d, const Preference* preference, int wanted, Heuristic* found,
                                   int* count) {
  *count = 0;
  if (!handle || wanted != 1 || c != d || !preference->workspace) return INVALID_VALUE;
  for (int i = 0; i < 4; ++i)
    if (!preference->alignment[i] || preference->alignment[i] > 256) return INVALID_VALUE;
  if (!is_consistent(desc, a, b, d)) return OK; /* none found */
  memset(found, 0, sizeof *found);
  found->algo[3] = 42;
  found->workspace = 96;
  *count = 1;
  return OK;
}

static float at(const uint16_t* p, const Layout* l, int is_transposed, uint64_t row, uint64_t col) {
  return from_bf16(is_transposed ? p[col + row * (uint64_t)l->ld] : p[row + col * (uint64_t)l->ld]);
}
int cublasLtMatmul(void* handle, const Desc* desc, const float* alpha, const uint16_t* a, const Layout* la,
                   const uint16_t* b, const Layout* lb, const float* beta, const uint16_t* c, const Layout* lc,
                   uint16_t* d, const Layout* ld, const uint64_t* algo, void* workspace, size_t workspace_bytes,
                   void* stream) {
  (void)stream;
  if (!handle || *alpha != 1 || *beta != 0 || c != d || lc != ld || algo[3] != 42) return INVALID_VALUE;
  if (!is_consistent(desc, la, lb, ld) || !workspace || workspace_bytes < 96) return NOT_SUPPORTED;
  const uint64_t k = desc->transa ? la->rows : la->cols;
  float* sums = calloc(ld->rows, sizeof(float));
  for (uint64_t j = 0; j < ld->cols; ++j)
    for (uint64_t i = 0; i < ld->rows; ++i) {
      float sum = 0;
      for (uint64_t p = 0; p < k; ++p) sum += at(a, la, desc->transa, i, p) * at(b, lb, desc->transb, p, j);
      if (desc->epilogue == GELU_AUX_BIAS) {
        sum += from_bf16(desc->bias[i]);
        desc->aux[i + j * (uint64_t)desc->aux_ld] = to_bf16(sum);
        sum = (float)gelu(sum);
      } else if (desc->epilogue == DGELU_BGRAD) {
        sum *= (float)gelu_derivative(from_bf16(desc->aux[i + j * (uint64_t)desc->aux_ld]));
        sums[i] += sum;
      }
      d[i + j * (uint64_t)ld->ld] = to_bf16(sum);
    }
  if (desc->epilogue == DGELU_BGRAD)
    for (uint64_t i = 0; i < ld->rows; ++i) desc->bias[i] = to_bf16(sums[i]);
  if (desc->epilogue == BGRADB)
    for (uint64_t j = 0; j < ld->cols; ++j) {
      float sum = 0;
      for (uint64_t p = 0; p < k; ++p) sum += at(b, lb, desc->transb, p, j);
      desc->bias[j] = to_bf16(sum);
    }
  free(sums);
  return OK;
}
