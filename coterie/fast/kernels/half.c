/* Mixed precision: products of bfloat16 numbers, which add up in float32.

   They are for processors with AVX512-BF16 or AMX; elsewhere `half_kind` says that there are none. A weight [out, in] is
   packed once: in blocks of 16 outputs, and in them pairs of inputs, so that a vector holds one pair of each output, and 16 of them
   are one tile. Inputs are padded with zeros to whole tiles. */
#include "kernels.h"

enum { NONE, VECTORS, TILES };

#if DOUBLE || !defined(__AVX512BF16__)
int half_kind(void) { return NONE; }
#else
#include <immintrin.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define BLOCK 16 /* outputs of a block, rows of a tile, and pairs of inputs of a tile */
#define DEPTH 32 /* inputs of a tile */

static inline long up_to(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }

/* Ask for large pages in memory that nothing was written to yet. */
int half_room(half *room, long bytes) {
    const long page = 1 << 21, skipped = up_to((long)room, page) - (long)room;
    if (bytes > skipped + page) madvise((char *)room + skipped, (bytes - skipped) / page * page, MADV_HUGEPAGE);
    return DONE;
}

/* How many numbers a packed weight has. */
long half_size(long out, long in) { return up_to(out, 2 * BLOCK) * up_to(in, DEPTH); }

/* 16 rows of 32 numbers -> a tile. */
static void pack_tile(const float *weight, long in, half *tile) {
    const __m512i places = _mm512_set_epi32(240, 224, 208, 192, 176, 160, 144, 128, 112, 96, 80, 64, 48, 32, 16, 0);
    for (long o = 0; o < BLOCK; o++, weight += in) {
        __m512bh pairs = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(weight + BLOCK), _mm512_loadu_ps(weight));
        _mm512_i32scatter_epi32(tile + 2 * o, places, (__m512i)pairs, 4);
    }
}

/* weight [out, in] -> packed [out / 16, in / 2, 16, 2], zeros where there is nothing. */
int half_pack(const float *weight, half *packed, long out, long in) {
    long deep = up_to(in, DEPTH);
#pragma omp parallel for schedule(static)
    for (long block = 0; block < up_to(out, 2 * BLOCK) / BLOCK; block++)
        for (long first = 0; first < deep; first += DEPTH) {
            half *tile = packed + block * BLOCK * deep + first * BLOCK;
            long inputs = min_(DEPTH, in - first), rows = min_(BLOCK, out - block * BLOCK);
            const float *from = weight + block * BLOCK * in + first;
            if (inputs == DEPTH && rows == BLOCK) {
                pack_tile(from, in, tile);
                continue;
            }
            for (long o = 0; o < BLOCK; o++)
                for (long i = 0; i < DEPTH; i++)
                    tile[i / 2 * DEPTH + o * 2 + i % 2] = o < rows && i < inputs ? narrow(from[o * in + i]) : 0;
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

/* A head's logits, of which softmax is all that is wanted, or its gradient. None of them is kept. */
typedef struct {
    const float *bias; /* of these columns of the vocabulary, or none */
    const int64_t *targets;
    float temperature;
    long first;                    /* of the columns */
    float *most, *total, *chosen;  /* forward: [rows, 16] each, of every sixteenth logit; [rows] */
    const float *normaliser, *grad; /* backward: [rows] */
    half *grad_logits, *across;    /* [rows, columns], [columns, all rows] */
    long all_rows;
} Head;

/* What is done with the sums [rows, 32] of a block of outputs: rounded to bfloat16 where `rounds`, added to y where `add`; or handed to
   the softmax of a head. */
typedef struct {
    float *y;
    long stride, out;
    int add, rounds;
    const Head *head;
} Output;

/* Two vectors of a row's logits, those that are not there masked. */
static inline void logits_of(const Head *h, const float *sums, long first, long width, vec *two) {
    for (long part = 0; part < 2; part++) {
        long at = part * BLOCK;
        vec x = load(sums + at);
        if (h->bias) {
            float bias[BLOCK] = {0};
            for (long i = 0; i < BLOCK && at + i < width; i++) bias[i] = h->bias[first + at + i];
            x += load(bias);
        }
        for (long i = max_(0, width - at); i < BLOCK; i++) x[i] = MASKED;
        two[part] = x / h->temperature;
    }
}

static void softmax_block(const Head *h, const float *sums, long row, long rows, long first, long width) {
    for (long r = 0; r < rows; r++) {
        vec x[2];
        float *most_at = h->most + (row + r) * BLOCK, *total_at = h->total + (row + r) * BLOCK;
        logits_of(h, sums + r * 2 * BLOCK, first, width, x);
        vec before = load(most_at), most = choose((whole_vec)(x[0] > before), x[0], before);
        most = choose((whole_vec)(x[1] > most), x[1], most);
        store(total_at, load(total_at) * exp_vec(before - most) + exp_vec(x[0] - most) + exp_vec(x[1] - most));
        store(most_at, most);
        long target = h->targets[row + r] - h->first - first;
        if (target >= 0 && target < width) h->chosen[row + r] = x[target / BLOCK][target % BLOCK];
    }
}

static void grad_block(const Head *h, const float *sums, long row, long rows, long first, long width, long columns) {
    half found[2 * BLOCK * 2 * BLOCK];
    for (long r = 0; r < rows; r++) {
        vec x[2];
        float grads[2 * BLOCK], grad = h->grad[row + r];
        logits_of(h, sums + r * 2 * BLOCK, first, width, x);
        for (long part = 0; part < 2; part++) store(grads + part * BLOCK, exp_vec(x[part] - h->normaliser[row + r]) * -grad);
        long target = h->targets[row + r] - h->first - first;
        if (target >= 0 && target < width) grads[target] += grad;
        for (long i = 0; i < 2 * BLOCK; i++) found[r * 2 * BLOCK + i] = narrow(grads[i]);
        memcpy(h->grad_logits + (row + r) * columns + first, found + r * 2 * BLOCK, width * sizeof(half));
    }
    for (long i = 0; i < width; i++)
        for (long r = 0; r < rows; r++) h->across[(first + i) * h->all_rows + row + r] = found[r * 2 * BLOCK + i];
}

static inline void put(const Output *o, const float *sums, long row, long rows, long first) {
    long width = min_(2 * BLOCK, o->out - first);
    if (o->head) {
        if (o->head->grad)
            grad_block(o->head, sums, row, rows, first, width, o->out);
        else
            softmax_block(o->head, sums, row, rows, first, width);
        return;
    }
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

/* x [rows, deep] @ weight.T, of one thread. */
static void narrowed_product(const half *x, long rows, long deep, const half *weight, const Output *to) {
#ifdef __AMX_BF16__
    if (half_kind() == TILES) {
        rows_by_tiles(x, rows, deep, weight, to);
        return;
    }
#endif
    rows_by_vectors(x, rows, deep, weight, to);
}

/* x [rows, in], narrowed: none where there is no memory. */
static half *narrowed(const float *x, long rows, long in) {
    long deep = up_to(in, DEPTH);
    half *found = malloc(rows * deep * sizeof(half) + 64);
    if (found) narrow_rows(x, rows, in, deep, found);
    return found;
}

/* y [rows, out] = x [rows, in] @ weight.T, of one thread. */
static int product(const float *x, long rows, long in, const half *weight, const Output *to) {
    half *narrow_x = narrowed(x, rows, in);
    if (!narrow_x) return NO_MEMORY;
    narrowed_product(narrow_x, rows, up_to(in, DEPTH), weight, to);
    free(narrow_x);
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

/* Rows of whole blocks for each thread: from *first to what is returned. */
static long share_of_rows(long rows, long *first) {
    long last = share((rows + 2 * BLOCK - 1) / (2 * BLOCK), first);
    *first *= 2 * BLOCK;
    return min_(rows, last * 2 * BLOCK);
}

/* y [rows, out] = x [rows, in] @ weight.T over all threads, not rounded; of a weight's rows from `first` on, a multiple of 32. */
int half_product(const float *x, const half *weight, float *y, long rows, long in, long out, long first) {
    int state = DONE;
    long deep = up_to(in, DEPTH);
#pragma omp parallel if (rows * in * out > WORTH_THREADS * DEPTH)
    {
        long from, to = share_of_rows(rows, &from);
        Output output = {y + from * out, out, out};
        if (from < to && product(x + from * in, to - from, in, weight + first * deep, &output) != DONE) {
#pragma omp atomic write
            state = NO_MEMORY;
        }
    }
    return state;
}

#define TOGETHER_COLUMNS 1024 /* of the vocabulary, whose weights stay in a cache while all rows pass */

/* The softmax of some rows: logits x [rows, in] @ weight.T, divided by the temperature. Of one thread. */
static int softmax_of_rows(const float *x, const half *weight, const float *bias, Head h, float *logprobs, float *normaliser, long rows,
                           long in, long out) {
    long deep = up_to(in, DEPTH);
    half *narrow_x = narrowed(x, rows, in);
    float *sums = malloc(2 * rows * BLOCK * sizeof(float) + 64);
    if (!narrow_x || !sums) {
        free(narrow_x), free(sums);
        return NO_MEMORY;
    }
    h.most = sums, h.total = sums + rows * BLOCK, h.chosen = logprobs;
    for (long i = 0; i < rows * BLOCK; i++) h.most[i] = MASKED, h.total[i] = 0;
    for (h.first = 0; h.first < out; h.first += TOGETHER_COLUMNS) {
        h.bias = bias ? bias + h.first : 0;
        Output output = {.out = min_(TOGETHER_COLUMNS, out - h.first), .head = &h};
        narrowed_product(narrow_x, rows, deep, weight + h.first * deep, &output);
    }
    for (long r = 0; r < rows; r++) {
        vec most = load(h.most + r * BLOCK);
        float largest = max_vec(most), total = sum_vec(load(h.total + r * BLOCK) * exp_vec(most - largest));
        normaliser[r] = largest + logf(total);
        logprobs[r] -= normaliser[r];
    }
    free(narrow_x), free(sums);
    return DONE;
}

/* A packed head's log-probabilities of the targets [rows], and the logarithm of each softmax's normaliser, [rows]. bias [out], or none. */
int half_head_forward(const float *x, const half *weight, const float *bias, double temperature, const int64_t *targets,
                      float *logprobs, float *normaliser, long rows, long in, long out) {
    int state = DONE;
#pragma omp parallel
    {
        long from, to = share_of_rows(rows, &from);
        Head h = {.temperature = temperature, .targets = targets + from};
        if (from < to &&
            softmax_of_rows(x + from * in, weight, bias, h, logprobs + from, normaliser + from, to - from, in, out) != DONE) {
#pragma omp atomic write
            state = NO_MEMORY;
        }
    }
    return state;
}

/* The gradient of the logits, whose log-probabilities have the gradients grad [rows], of the columns from `first` on, a multiple of 32:
   grad_logits [rows, columns], and across, the same the other way, [columns, rows]. */
int half_head_backward(const float *x, const half *weight, const float *bias, double temperature, const int64_t *targets,
                       const float *normaliser, const float *grad, half *grad_logits, half *across, long rows, long in, long columns,
                       long first) {
    int state = DONE;
    long deep = up_to(in, DEPTH);
#pragma omp parallel
    {
        long from, to = share_of_rows(rows, &from);
        Head h = {.bias = bias ? bias + first : 0, .targets = targets + from, .temperature = temperature, .first = first,
                  .normaliser = normaliser + from, .grad = grad + from, .grad_logits = grad_logits + from * columns,
                  .across = across + from, .all_rows = rows};
        Output output = {.out = columns, .head = &h};
        if (from < to && product(x + from * in, to - from, in, weight + first * deep, &output) != DONE) {
#pragma omp atomic write
            state = NO_MEMORY;
        }
    }
    return state;
}
#endif
