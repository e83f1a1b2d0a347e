/* Mixed precision: numbers that stand between two products are kept in bfloat16, everything in between is computed in float32, and
   products add up in float32.

   The products are for processors with AVX512-BF16 or AMX; elsewhere `half_kind` says that there are none. A weight [out, in] is
   packed once: in blocks of 16 outputs, and in them pairs of inputs, so that a vector holds one pair of each output, and 16 of them
   are one tile. Inputs are padded with zeros to whole tiles. */
#include "kernels.h"

enum { NONE, VECTORS, TILES };

#if !DOUBLE
typedef uint16_t half; /* a bfloat16: the upper half of a float */

/* The nearest bfloat16, ties to even. What is not a number stays none. */
static inline half narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (half)(x == x ? rounded : 0x7fc0);
}

static inline float widen(half x) {
    uint32_t bits = (uint32_t)x << 16;
    float found;
    memcpy(&found, &bits, sizeof found);
    return found;
}

/* RMS norm: x [T, D], weight [D] -> out [T, D], and scale [T], what each row was multiplied with. */
int half_rms_norm_forward(const float *x, const float *weight, double epsilon, half *out, float *scale, long rows, long width) {
#pragma omp parallel for schedule(static) if (rows * width > WORTH_THREADS)
    for (long t = 0; t < rows; t++) {
        const float *in = x + t * width, s = inverse_rms(in, width, epsilon);
        scale[t] = s;
        for (long i = 0; i < width; i++) out[t * width + i] = narrow(in[i] * s * weight[i]);
    }
    return DONE;
}

/* silu(gate) * up, n elements, and its gradients. */
int half_swiglu_forward(const half *gate, const half *up, half *out, long n) {
#pragma omp parallel for simd schedule(static) if (n > WORTH_THREADS)
    for (long i = 0; i < n; i++) {
        float g = widen(gate[i]);
        out[i] = narrow(g * sigmoid(g) * widen(up[i]));
    }
    return DONE;
}

int half_swiglu_backward(const half *grad, const half *gate, const half *up, half *grad_gate, half *grad_up, long n) {
#pragma omp parallel for simd schedule(static) if (n > WORTH_THREADS)
    for (long i = 0; i < n; i++) {
        float g = widen(gate[i]), s = sigmoid(g), scaled = widen(grad[i]) * s;
        grad_up[i] = narrow(scaled * g);
        grad_gate[i] = narrow(scaled * widen(up[i]) * (1 + g * (1 - s)));
    }
    return DONE;
}
#endif

#if DOUBLE || !defined(__AVX512BF16__)
int half_kind(void) { return NONE; }
#else
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define BLOCK 16 /* outputs of a block, rows of a tile, and pairs of inputs of a tile */
#define DEPTH 32 /* inputs of a tile */

static inline long up_to(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }

/* How many numbers a packed weight has. */
long half_size(long out, long in) { return up_to(out, 2 * BLOCK) * up_to(in, DEPTH); }

/* weight [out, in] -> packed [out / 16, in / 2, 16, 2], zeros where there is nothing. */
int half_pack(const float *weight, half *packed, long out, long in) {
    long deep = up_to(in, DEPTH);
#pragma omp parallel for schedule(static)
    for (long block = 0; block < up_to(out, 2 * BLOCK) / BLOCK; block++)
        for (long first = 0; first < deep; first += DEPTH) {
            half *tile = packed + block * BLOCK * deep + first * BLOCK;
            long inputs = min_(DEPTH, in - first);
            for (long o = 0; o < BLOCK; o++) {
                long row = block * BLOCK + o;
                for (long i = 0; i < DEPTH; i++)
                    tile[i / 2 * DEPTH + o * 2 + i % 2] = row < out && i < inputs ? narrow(weight[row * in + first + i]) : 0;
            }
        }
    return DONE;
}

/* x [rows, in] -> [rows, deep], padded with zeros. */
static void narrow_rows(const float *x, long rows, long in, long deep, half *to) {
    for (long r = 0; r < rows; r++) {
        for (long i = 0; i < in; i++) to[r * deep + i] = narrow(x[r * in + i]);
        memset(to + r * deep + in, 0, (deep - in) * sizeof(half));
    }
}

/* What is done with the sums [rows, 32] of a block of outputs: rounded to bfloat16 where `rounds`, added to y where `add`. */
typedef struct {
    float *y;
    long stride, out;
    int add, rounds;
} Output;

static inline void put(const Output *o, const float *sums, long row, long rows, long first) {
    long width = min_(2 * BLOCK, o->out - first);
    for (long r = 0; r < rows; r++) {
        float *to = o->y + (row + r) * o->stride + first;
        const float *from = sums + r * 2 * BLOCK;
        for (long i = 0; i < width; i++) {
            float sum = o->rounds ? widen(narrow(from[i])) : from[i];
            to[i] = o->add ? to[i] + sum : sum;
        }
    }
}

/* Up to TOGETHER rows by two blocks of outputs: x [rows, deep] -> sums [rows, 32]. */
#define TOGETHER 8 /* rows that share a pass over a weight */
static inline __attribute__((always_inline)) void by_vectors(const half *x, long rows, long deep, const half *weight, float *sums) {
    __m512 low[TOGETHER], high[TOGETHER];
    for (long r = 0; r < rows; r++) low[r] = high[r] = _mm512_setzero_ps();
    for (long i = 0; i < deep; i += 2) {
        __m512bh a = (__m512bh)_mm512_loadu_si512(weight + i * BLOCK);
        __m512bh b = (__m512bh)_mm512_loadu_si512(weight + (deep + i) * BLOCK);
        for (long r = 0; r < rows; r++) {
            int pair;
            memcpy(&pair, x + r * deep + i, sizeof pair);
            __m512bh given = (__m512bh)_mm512_set1_epi32(pair);
            low[r] = _mm512_dpbf16_ps(low[r], given, a);
            high[r] = _mm512_dpbf16_ps(high[r], given, b);
        }
    }
    for (long r = 0; r < rows; r++) {
        _mm512_storeu_ps(sums + r * 2 * BLOCK, low[r]);
        _mm512_storeu_ps(sums + r * 2 * BLOCK + BLOCK, high[r]);
    }
}

static void rows_by_vectors(const half *x, long rows, long deep, const half *weight, const Output *to) {
    float sums[TOGETHER * 2 * BLOCK];
    for (long first = 0; first < to->out; first += 2 * BLOCK) {
        const half *block = weight + first * deep;
        long r = 0;
        for (; r + TOGETHER <= rows; r += TOGETHER) {
            by_vectors(x + r * deep, TOGETHER, deep, block, sums);
            put(to, sums, r, TOGETHER, first);
        }
        for (; r < rows; r++) {
            by_vectors(x + r * deep, 1, deep, block, sums);
            put(to, sums, r, 1, first);
        }
    }
}

#ifdef __AMX_BF16__
/* Tiles 0 to 3 are sums, two rows of them by two blocks of outputs; 4 and 5 are rows of x, 6 and 7 of the weight. */
static void shape_tiles(long upper, long lower) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    long rows[8] = {upper, upper, lower, lower, upper, lower, BLOCK, BLOCK};
    for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = (uint8_t)rows[i];
    _tile_loadconfig(&shape);
}

static void rows_by_tiles(const half *x, long rows, long deep, const half *weight, const Output *to) {
    float sums[2 * BLOCK * 2 * BLOCK];
    const long line = 2 * BLOCK * sizeof(float), wide = deep * sizeof(half);
    for (long r = 0; r < rows; r += 2 * BLOCK) {
        long upper = min_(BLOCK, rows - r), lower = min_(BLOCK, rows - r - upper);
        const half *above = x + r * deep, *below = above + upper * deep;
        shape_tiles(upper, lower ? lower : 1);
        for (long first = 0; first < to->out; first += 2 * BLOCK) {
            const half *left = weight + first * deep, *right = left + BLOCK * deep;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (long i = 0; i < deep; i += DEPTH) {
                _tile_loadd(6, left + i * BLOCK, 64);
                _tile_loadd(7, right + i * BLOCK, 64);
                _tile_loadd(4, above + i, wide);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                if (!lower) continue;
                _tile_loadd(5, below + i, wide);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, sums, line);
            _tile_stored(1, sums + BLOCK, line);
            if (lower) {
                _tile_stored(2, sums + upper * 2 * BLOCK, line);
                _tile_stored(3, sums + upper * 2 * BLOCK + BLOCK, line);
            }
            put(to, sums, r, upper + lower, first);
        }
    }
    _tile_release();
}
#endif

/* Which of the products there are here. The kernel is asked for tiles, which a process has to be allowed. */
int half_kind(void) {
#ifdef __AMX_BF16__
    static int kind = NONE;
    if (!kind) kind = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XFEATURE_XTILEDATA */) == 0 ? TILES : VECTORS;
    return kind;
#else
    return VECTORS;
#endif
}

/* y [rows, out] = x [rows, in] @ weight.T, of one thread. */
static int product(const float *x, long rows, long in, const half *weight, const Output *to) {
    long deep = up_to(in, DEPTH);
    half *narrowed = malloc(rows * deep * sizeof(half) + 64);
    if (!narrowed) return NO_MEMORY;
    narrow_rows(x, rows, in, deep, narrowed);
#ifdef __AMX_BF16__
    if (half_kind() == TILES)
        rows_by_tiles(narrowed, rows, deep, weight, to);
    else
#endif
        rows_by_vectors(narrowed, rows, deep, weight, to);
    free(narrowed);
    return DONE;
}

/* As BLAS's product, of a packed weight: y [rows, out] = x [rows, in] @ weight.T, added to y where `beta` is 1. It can't say that
   there is no memory, so then nothing that it gives is a number. */
static void gemm(const int *out, const int *rows, const int *in, const float *weight, const float *x, const float *beta, float *y,
                 int rounds) {
    Output to = {y, *out, *out, *beta == 1, rounds};
    if (product(x, *rows, *in, (const half *)weight, &to) == DONE) return;
    for (long i = 0; i < (long)*rows * *out; i++) y[i] = NAN;
}

/* What decoding calls for each product, which are rounded to bfloat16 as the trainer's are; and for its logits, which are not. */
void half_gemm(const char *a, const char *b, const int *out, const int *rows, const int *in, const float *alpha, const float *weight,
               const int *lda, const float *x, const int *ldb, const float *beta, float *y, const int *ldc, size_t na, size_t nb) {
    gemm(out, rows, in, weight, x, beta, y, 1);
}

void half_gemm_unrounded(const char *a, const char *b, const int *out, const int *rows, const int *in, const float *alpha,
                         const float *weight, const int *lda, const float *x, const int *ldb, const float *beta, float *y,
                         const int *ldc, size_t na, size_t nb) {
    gemm(out, rows, in, weight, x, beta, y, 0);
}

/* y [rows, out] = x [rows, in] @ weight.T over all threads, not rounded; of a weight's rows from `first` on, a multiple of 32. */
int half_product(const float *x, const half *weight, float *y, long rows, long in, long out, long first) {
    int state = DONE;
    long deep = up_to(in, DEPTH);
#pragma omp parallel if (rows * in * out > WORTH_THREADS * DEPTH)
    {
        long from, to = share((rows + 2 * BLOCK - 1) / (2 * BLOCK), &from);
        from *= 2 * BLOCK, to = min_(rows, to * 2 * BLOCK);
        Output output = {y + from * out, out, out, 0, 0};
        if (from < to && product(x + from * in, to - from, in, weight + first * deep, &output) != DONE) {
#pragma omp atomic write
            state = NO_MEMORY;
        }
    }
    return state;
}
#endif
