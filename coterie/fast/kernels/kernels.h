/* What the loops share: vectors, exp, rotary positions, and the rows of attention.

   Everything is compiled for one type, `real`: float, or double for exactness tests. Arrays are dense and row by row. Each output
   element is written by one thread, and sums over tokens are added in the order of the threads, so equal inputs give equal bits.

   A loop that needs memory, or takes sizes that it could overrun, returns one of the states below.

   Legend: T tokens of a stream, D width, H heads, K key-value heads, E width of a head, F width of the gated layer,
   P prompts or groups, R rows being decoded, S longest prompt, C columns of the cache. */
#include <math.h>
#include <omp.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "structs.h"

enum { DONE, NO_MEMORY, NO_ROOM };

#define BYTES 64
#define LANES (BYTES / (long)sizeof(real))
#define MASKED ((real)(-1e30))
#define ROWS 4             /* queries that share one pass over the keys */
#define SPAN 512           /* logits whose probabilities are summed together */
#define MOST_WIDTH 512     /* of a head with rotary positions: arrays of this size hold it */
#define WORTH_THREADS 8192 /* elements below which a second thread costs more than it saves */
typedef real vec __attribute__((vector_size(BYTES)));

static inline vec load(const real *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void store(real *p, vec v) { memcpy(p, &v, sizeof v); }

static inline long padded(long n) { return (n + LANES - 1) / LANES * LANES; }

static inline long min_(long a, long b) { return a < b ? a : b; }

static inline long max_(long a, long b) { return a > b ? a : b; }

/* A thread's share of n things: from *first to what is returned. */
static inline long share(long n, long *first) {
    long threads = omp_get_num_threads(), me = omp_get_thread_num();
    *first = n * me / threads;
    return n * (me + 1) / threads;
}

/* exp: x = n log 2 + r, a polynomial in r, and n in the exponent's bits. 0 where the result would be below the normal numbers.
   Once for a number, which the compiler makes vectors of in loops, and once for a vector. */
#if DOUBLE
typedef int64_t whole;
#define DEGREE 13
#define SQRT sqrt
#define LOG log
#define BITS 52
#define BIAS 1023
static const real LARGEST = 709, SMALLEST = -708;
static const real ROUNDER = 6755399441055744.0; /* adding it leaves no bits for a fraction */
static const real LOG2_HIGH = 6.93147180369123816490e-01, LOG2_LOW = 1.90821492927058770002e-10;
#else
typedef int32_t whole;
#define DEGREE 7
#define SQRT sqrtf
#define LOG logf
#define BITS 23
#define BIAS 127
static const real LARGEST = 88, SMALLEST = -87, ROUNDER = 12582912.0f;
static const real LOG2_HIGH = 0.693359375f, LOG2_LOW = -2.12194440054690583e-4f;
#endif
typedef whole whole_vec __attribute__((vector_size(BYTES)));

static inline real exp_(real x) {
    real clamped = x > LARGEST ? LARGEST : x < SMALLEST ? SMALLEST : x, y = 1, power;
    real n = (clamped * (real)1.4426950408889634 + ROUNDER) - ROUNDER, r = (clamped - n * LOG2_HIGH) - n * LOG2_LOW;
    for (int i = DEGREE; i > 0; i--) y = y * r * ((real)1 / i) + 1;
    whole bits = ((whole)n + BIAS) << BITS;
    memcpy(&power, &bits, sizeof power);
    return x < SMALLEST ? 0 : y * power;
}

static inline vec choose(whole_vec where, vec a, vec b) {
    return (vec)(((whole_vec)a & where) | ((whole_vec)b & ~where));
}

static inline vec all(real x) { return (vec){0} + x; }

static inline vec exp_vec(vec x) {
    whole_vec tiny = (whole_vec)(x < all(SMALLEST));
    vec clamped = choose((whole_vec)(x > all(LARGEST)), all(LARGEST), choose(tiny, all(SMALLEST), x)), y = all(1);
    vec n = (clamped * (real)1.4426950408889634 + ROUNDER) - ROUNDER, r = (clamped - n * LOG2_HIGH) - n * LOG2_LOW;
#pragma GCC unroll 16
    for (int i = DEGREE; i > 0; i--) y = y * (r * ((real)1 / i)) + (real)1;
    vec power = (vec)((__builtin_convertvector(n, whole_vec) + BIAS) << BITS);
    return choose(tiny, (vec){0}, y * power);
}

static inline real sum_vec(vec v) {
    real parts[LANES], sum = 0;
    store(parts, v);
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < LANES; i++) sum += parts[i];
    return sum;
}

static inline real max_vec(vec v) {
    real parts[LANES], largest;
    store(parts, v);
    largest = parts[0];
#pragma omp simd reduction(max : largest)
    for (long i = 0; i < LANES; i++) largest = parts[i] > largest ? parts[i] : largest;
    return largest;
}

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
#endif

static inline real sigmoid(real x) { return 1 / (1 + exp_(-x)); }

/* What an RMS norm multiplies x [D] with, beside its weight. */
static inline real inverse_rms(const real *x, long width, double epsilon) {
    real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < width; i++) sum += x[i] * x[i];
    return 1 / SQRT(sum / width + (real)epsilon);
}

/* in [D], weight [D] -> out [D]. Returns what it was multiplied with. */
static inline real rms_norm_row(const real *restrict in, const real *restrict weight, double epsilon,
                                real *restrict out, long width) {
    real s = inverse_rms(in, width, epsilon);
    for (long i = 0; i < width; i++) out[i] = in[i] * s * weight[i];
    return s;
}

/* Whether a head of this width can have rotary positions: its halves are swapped, in arrays of a fixed size. */
static inline int rope_fits(long width) { return width >= 0 && width <= MOST_WIDTH && width % 2 == 0; }

static inline void swap_halves(const real *restrict in, real *restrict out, long width) {
    memcpy(out, in + width / 2, width / 2 * sizeof(real));
    memcpy(out + width / 2, in, width / 2 * sizeof(real));
}

/* A head's norm, where the model has one, and rotary positions: in [E], weight [E] or none, cosine and sine [E], the sines of the
   first half negative -> to [E]. */
static inline void rope(const real *restrict in, const real *restrict weight, real scale, const real *restrict cosine,
                        const real *restrict sine, real *restrict to, long width) {
    real normal[MOST_WIDTH], swapped[MOST_WIDTH];
    if (weight)
        for (long e = 0; e < width; e++) normal[e] = in[e] * scale * weight[e];
    else
        memcpy(normal, in, width * sizeof(real));
    swap_halves(normal, swapped, width);
    for (long e = 0; e < width; e++) to[e] = normal[e] * cosine[e] + swapped[e] * sine[e];
}

/* The gradient of x = in * s * weight, an RMS norm: grad [D] -> to [D], and added to sums [D], the weight's. */
static inline void rms_norm_row_backward(const real *restrict grad, const real *restrict in,
                                         const real *restrict weight, real s, real *restrict to, real *restrict sums,
                                         long width) {
    real dot = 0;
#pragma omp simd reduction(+ : dot)
    for (long i = 0; i < width; i++) dot += grad[i] * weight[i] * in[i];
    dot *= s * s / width;
    for (long i = 0; i < width; i++) {
        sums[i] += grad[i] * in[i] * s;
        to[i] = (grad[i] * weight[i] - in[i] * dot) * s;
    }
}

/* The threads' sums of a weight's gradient, one after another: parts [threads, width] -> total [width]. */
static inline void add_up(const real *parts, long threads, long width, real *total) {
    memset(total, 0, width * sizeof(real));
    for (long t = 0; t < threads; t++)
        for (long i = 0; i < width; i++) total[i] += parts[t * width + i];
}

/* The gradient of `rope`: grad [E] of its output -> to [E], and added to sums [E], the weight's. */
static inline void rope_backward_row(const real *restrict grad, const real *restrict in, const real *restrict weight, real scale,
                                     const real *restrict cosine, const real *restrict sine, real *restrict to,
                                     real *restrict sums, long width) {
    real rotated[MOST_WIDTH], normal[MOST_WIDTH];
    for (long e = 0; e < width; e++) rotated[e] = grad[e] * sine[e];
    swap_halves(rotated, normal, width);
    for (long e = 0; e < width; e++) normal[e] += grad[e] * cosine[e];
    if (weight)
        rms_norm_row_backward(normal, in, weight, scale, to, sums, width);
    else
        memcpy(to, normal, width * sizeof(real));
}

/* Scores of ROWS queries [ROWS, wide] with the keys [E, size] at the places from `first` to `last`, multiples of LANES. */
static inline void scores_of(const real *queries, long wide, const real *keys, long size, long width, long first,
                             long last, real *scores, long stride) {
    for (long j = first; j < last; j += LANES) {
        vec a = {0}, b = {0}, c = {0}, d = {0};
        for (long e = 0; e < width; e++) {
            vec key = load(keys + e * size + j);
            a += queries[e] * key;
            b += queries[wide + e] * key;
            c += queries[2 * wide + e] * key;
            d += queries[3 * wide + e] * key;
        }
        store(scores + j, a);
        store(scores + stride + j, b);
        store(scores + 2 * stride + j, c);
        store(scores + 3 * stride + j, d);
    }
}

/* out [ROWS, wide] = weights [ROWS, size] @ values [places, wide], over the places from first to last. */
static inline void weighted_sum(const real *weights, long size, const real *values, long wide, long first, long last,
                                real *out) {
    for (long e = 0; e < wide; e += LANES) {
        vec a = {0}, b = {0}, c = {0}, d = {0}, a2 = {0}, b2 = {0}, c2 = {0}, d2 = {0};
        const real *value = values + e;
        long j = first;
        for (; j + 1 < last; j += 2) {
            vec v = load(value + j * wide), v2 = load(value + (j + 1) * wide);
            a += weights[j] * v, a2 += weights[j + 1] * v2;
            b += weights[size + j] * v, b2 += weights[size + j + 1] * v2;
            c += weights[2 * size + j] * v, c2 += weights[2 * size + j + 1] * v2;
            d += weights[3 * size + j] * v, d2 += weights[3 * size + j + 1] * v2;
        }
        if (j < last) {
            vec v = load(value + j * wide);
            a += weights[j] * v, b += weights[size + j] * v, c += weights[2 * size + j] * v;
            d += weights[3 * size + j] * v;
        }
        a += a2, b += b2, c += c2, d += d2;
        store(out + e, a), store(out + wide + e, b), store(out + 2 * wide + e, c), store(out + 3 * wide + e, d);
    }
}

/* Mask the places in [from, first) and [last, to): scores so low that their weights are exactly 0. */
static inline void mask(real *scores, long from, long first, long last, long to) {
    for (long j = from; j < first; j++) scores[j] = MASKED;
    for (long j = last; j < to; j++) scores[j] = MASKED;
}

/* Scores to weights that are still to be divided by *total, in place, over [from, to), both multiples of LANES. Returns the
   largest score, scaled. */
static inline real softmax(real *scores, real scaling, long from, long to, real *total) {
    vec most = all(MASKED), sum = {0};
    for (long j = from; j < to; j += LANES) {
        vec x = load(scores + j);
        most = choose((whole_vec)(x > most), x, most);
    }
    real largest = max_vec(most) * scaling;
    for (long j = from; j < to; j += LANES) {
        vec weights = exp_vec(load(scores + j) * scaling - largest);
        store(scores + j, weights);
        sum += weights;
    }
    *total = sum_vec(sum);
    return largest;
}
