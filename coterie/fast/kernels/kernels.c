/* What a language model does between its matrix products, as loops over contiguous memory, for CPUs.

   In tensor operations each of these is several passes over memory and, on small batches, more calls than arithmetic. Everything
   is compiled for one type, `real`: float, or double for exactness tests. Arrays are dense and row by row. Each output element is
   written by one thread, and sums over tokens are added in the order of the threads, so equal inputs give equal bits.

   A loop that needs memory, or takes sizes that it could overrun, returns one of the values below.

   Legend: T tokens of a stream, D width, H heads, K key-value heads, E width of a head, F width of the gated layer,
   P prompts or groups, R rows being decoded, S longest prompt, C columns of the cache. */
#include <math.h>
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if DOUBLE
typedef double real;
#else
typedef float real;
#endif
#define BYTES 64
#define LANES (BYTES / (long)sizeof(real))
typedef real vec __attribute__((vector_size(BYTES)));
#define UNREAD ((real)-1e30)
#define ROWS 4             /* queries that share one pass over the keys */
#define MOST_WIDTH 512     /* of a head that is turned */
enum { DONE, NO_MEMORY, NO_ROOM };
#define WORTH_THREADS 8192 /* elements below which a second thread costs more than it saves */

static inline vec load(const real *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void store(real *p, vec v) { memcpy(p, &v, sizeof v); }

static inline long padded(long n) { return (n + LANES - 1) / LANES * LANES; }

static inline long min_(long a, long b) { return a < b ? a : b; }

static inline long max_(long a, long b) { return a > b ? a : b; }

/* exp: x = n log 2 + r, a polynomial in r, and n in the exponent's bits. 0 where the result would be below the normal numbers.
   Once for a number, which the compiler makes vectors of in loops, and once for a vector. */
#if DOUBLE
typedef int64_t whole;
#define DEGREE 13
#define SQRT sqrt
#define LOG log
#define BITS 52
#define BIAS 1023
static const real LARGEST = 709, SMALLEST = -708, ROUNDER = 6755399441055744.0; /* adding it leaves no bits for a fraction */
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

static inline vec choose(whole_vec where, vec a, vec b) { return (vec)(((whole_vec)a & where) | ((whole_vec)b & ~where)); }

static inline vec all(real x) { return (vec){0} + x; }

static inline vec exp_of(vec x) {
    whole_vec tiny = (whole_vec)(x < all(SMALLEST));
    vec clamped = choose((whole_vec)(x > all(LARGEST)), all(LARGEST), choose(tiny, all(SMALLEST), x)), y = all(1);
    vec n = (clamped * (real)1.4426950408889634 + ROUNDER) - ROUNDER, r = (clamped - n * LOG2_HIGH) - n * LOG2_LOW;
#pragma GCC unroll 16
    for (int i = DEGREE; i > 0; i--) y = y * (r * ((real)1 / i)) + (real)1;
    vec power = (vec)((__builtin_convertvector(n, whole_vec) + BIAS) << BITS);
    return choose(tiny, (vec){0}, y * power);
}

static inline real sum_of(vec v) {
    real parts[LANES], sum = 0;
    store(parts, v);
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < LANES; i++) sum += parts[i];
    return sum;
}

static inline real largest_of(vec v) {
    real parts[LANES], largest;
    store(parts, v);
    largest = parts[0];
#pragma omp simd reduction(max : largest)
    for (long i = 0; i < LANES; i++) largest = parts[i] > largest ? parts[i] : largest;
    return largest;
}

static inline real sigmoid(real x) { return 1 / (1 + exp_(-x)); }

long max_threads(void) { return omp_get_max_threads(); }

/* Whether a head of this width can be turned: its halves are swapped, in arrays of a fixed size. */
static inline int rope_fits(long width) { return width >= 0 && width <= MOST_WIDTH && width % 2 == 0; }

/* A thread's share of n things: from *first to what is returned. */
static inline long share(long n, long *first) {
    long threads = omp_get_num_threads(), me = omp_get_thread_num();
    *first = n * me / threads;
    return n * (me + 1) / threads;
}

/* The threads' sums of a weight's gradient, one after another: parts [threads, width] -> total [width]. */
static void add_up(const real *parts, long threads, long width, real *total) {
    memset(total, 0, width * sizeof(real));
    for (long t = 0; t < threads; t++)
        for (long i = 0; i < width; i++) total[i] += parts[t * width + i];
}

static inline real inverse_root(const real *x, long width, double epsilon) {
    real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < width; i++) sum += x[i] * x[i];
    return 1 / SQRT(sum / width + (real)epsilon);
}

/* RMS norm: x [T, D], weight [D] -> out [T, D], and scale [T], what each row was multiplied with. */
int norm_forward(const real *x, const real *weight, double epsilon, real *out, real *scale, long rows, long width) {
#pragma omp parallel for schedule(static) if (rows * width > WORTH_THREADS)
    for (long t = 0; t < rows; t++) {
        const real *in = x + t * width, s = inverse_root(in, width, epsilon);
        real *to = out + t * width;
        scale[t] = s;
        for (long i = 0; i < width; i++) to[i] = in[i] * s * weight[i];
    }
    return DONE;
}

/* grad, x, grad_x [T, D]; grad_weight [D]; room [threads, D]. */
int norm_backward(const real *grad, const real *x, const real *weight, const real *scale, real *grad_x, real *grad_weight,
                   real *room, long rows, long width) {
    long threads = 1;
#pragma omp parallel if (rows * width > WORTH_THREADS)
    {
        long first, last = share(rows, &first);
        real *sums = room + omp_get_thread_num() * width;
        memset(sums, 0, width * sizeof(real));
#pragma omp single
        threads = omp_get_num_threads();
        for (long t = first; t < last; t++) {
            const real *g = grad + t * width, *in = x + t * width, s = scale[t];
            real *to = grad_x + t * width, dot = 0;
#pragma omp simd reduction(+ : dot)
            for (long i = 0; i < width; i++) dot += g[i] * weight[i] * in[i];
            dot *= s * s / width;
            for (long i = 0; i < width; i++) {
                sums[i] += g[i] * in[i] * s;
                to[i] = (g[i] * weight[i] - in[i] * dot) * s;
            }
        }
    }
    add_up(room, threads, width, grad_weight);
    return DONE;
}

/* A head's norm, where the model has one, and rotary positions: x [T, H, E], weight [E] or none, cos and sin [T, E], sin
   negative in the first half -> out [T, H, E], scale [T, H]. E is at most MOST_WIDTH. */
static inline void swap_halves(const real *restrict in, real *restrict out, long width) {
    memcpy(out, in + width / 2, width / 2 * sizeof(real));
    memcpy(out + width / 2, in, width / 2 * sizeof(real));
}

static inline void rope(const real *restrict in, const real *restrict weight, real s, const real *restrict cosine,
                        const real *restrict sine, real *restrict to, long width) {
    real normal[MOST_WIDTH], swapped[MOST_WIDTH];
    if (weight)
        for (long e = 0; e < width; e++) normal[e] = in[e] * s * weight[e];
    else
        memcpy(normal, in, width * sizeof(real));
    swap_halves(normal, swapped, width);
    for (long e = 0; e < width; e++) to[e] = normal[e] * cosine[e] + swapped[e] * sine[e];
}

static inline void rope_tokens(const real *x, const real *weight, double epsilon, const real *cosine, const real *sine, real *out, real *scale,
                        long first, long last, long heads, long width) {
    for (long t = first; t < last; t++)
        for (long h = 0; h < heads; h++) {
            const real *in = x + (t * heads + h) * width;
            real s = weight ? inverse_root(in, width, epsilon) : 1;
            if (weight) scale[t * heads + h] = s;
            rope(in, weight, s, cosine + t * width, sine + t * width, out + (t * heads + h) * width, width);
        }
}

int rope_forward(const real *x, const real *weight, double epsilon, const real *cosine, const real *sine, real *out,
                 real *scale, long tokens, long heads, long width) {
    if (!rope_fits(width)) return NO_ROOM;
#pragma omp parallel if (tokens * heads * width > WORTH_THREADS)
    {
        long first, last = share(tokens, &first);
        rope_tokens(x, weight, epsilon, cosine, sine, out, scale, first, last, heads, width);
    }
    return DONE;
}

static inline void rope_tokens_back(const real *grad, const real *x, const real *restrict weight, const real *cosine, const real *sine, const real *scale,
                             real *grad_x, real *restrict sums, long first, long last, long heads, long width) {
    for (long t = first; t < last; t++) {
        const real *restrict c = cosine + t * width, *restrict n = sine + t * width;
        for (long h = 0; h < heads; h++) {
            const real *restrict g = grad + (t * heads + h) * width, *restrict in = x + (t * heads + h) * width;
            real *restrict to = grad_x + (t * heads + h) * width, back[MOST_WIDTH], turned[MOST_WIDTH], dot = 0;
            for (long e = 0; e < width; e++) turned[e] = g[e] * n[e];
            swap_halves(turned, back, width);
            for (long e = 0; e < width; e++) back[e] += g[e] * c[e];
            if (!weight) {
                memcpy(to, back, width * sizeof(real));
                continue;
            }
            real s = scale[t * heads + h];
#pragma omp simd reduction(+ : dot)
            for (long e = 0; e < width; e++) dot += back[e] * weight[e] * in[e];
            dot *= s * s / width;
            for (long e = 0; e < width; e++) {
                sums[e] += back[e] * in[e] * s;
                to[e] = (back[e] * weight[e] - in[e] * dot) * s;
            }
        }
    }
}

/* room [threads, E]. */
int rope_backward(const real *grad, const real *x, const real *weight, const real *cosine, const real *sine,
                  const real *scale, real *grad_x, real *grad_weight, real *room, long tokens, long heads, long width) {
    long threads = 1;
    if (!rope_fits(width)) return NO_ROOM;
#pragma omp parallel if (tokens * heads * width > WORTH_THREADS)
    {
        long first, last = share(tokens, &first);
        real *sums = room + omp_get_thread_num() * width;
        memset(sums, 0, width * sizeof(real));
#pragma omp single
        threads = omp_get_num_threads();
        rope_tokens_back(grad, x, weight, cosine, sine, scale, grad_x, sums, first, last, heads, width);
    }
    if (weight) add_up(room, threads, width, grad_weight);
    return DONE;
}

/* silu(gate) * up, n elements, and its gradients. */
int swiglu_forward(const real *gate, const real *up, real *out, long n) {
#pragma omp parallel for simd schedule(static) if (n > WORTH_THREADS)
    for (long i = 0; i < n; i++) out[i] = gate[i] * sigmoid(gate[i]) * up[i];
    return DONE;
}

int swiglu_backward(const real *grad, const real *gate, const real *up, real *grad_gate, real *grad_up, long n) {
#pragma omp parallel for simd schedule(static) if (n > WORTH_THREADS)
    for (long i = 0; i < n; i++) {
        real s = sigmoid(gate[i]), scaled = grad[i] * s;
        grad_up[i] = scaled * gate[i];
        grad_gate[i] = scaled * up[i] * (1 + gate[i] * (1 - s));
    }
    return DONE;
}

/* Attention over a stream of groups. A group is a prompt and its completions, one after another; a completion's token reads the
   prompt and what stands before it in its own row. For one group and one key-value head the keys stand side by side: those of
   the prompt first and, after them, those of one completion at a time. So the place of a key is its position, and a window is a
   range of places. */
typedef struct {
    long tokens, num_groups, heads, kv_heads, width, window, longest;
    double scaling;
    const int64_t *starts;  /* [P] where a group begins in the stream */
    const int64_t *prompts; /* [P] tokens of its prompt */
    const int64_t *rows;    /* [P + 1] which of `lengths` are its completions' */
    const int64_t *lengths; /* [B] tokens of each completion */
} Stream;

typedef struct {
    long size, wide;                   /* places of keys, and E, both padded */
    real *keys, *values;               /* [places, E], the values' padded */
    real *across_keys, *across_values; /* [E, places] */
    real *grad_keys, *grad_values;         /* [places, E]: their gradients */
    real *weights, *grad_scores;         /* [ROWS, places] */
    real *block;                       /* [3, ROWS, E]: queries, gradients, and what is made of them */
} Room;

/* Without memory for it, `keys` is none. */
static Room make_room(const Stream *s) {
    Room r = {.size = padded(s->longest), .wide = padded(s->width)};
    long by_place = r.size * r.wide;
    real *all = calloc(6 * by_place + 2 * ROWS * r.size + 3 * ROWS * r.wide, sizeof(real));
    if (!all) return r;
    real **parts[] = {&r.keys, &r.values, &r.across_keys, &r.across_values, &r.grad_keys, &r.grad_values};
    for (int i = 0; i < 6; i++) *parts[i] = all + i * by_place;
    r.weights = all + 6 * by_place;
    r.grad_scores = r.weights + ROWS * r.size;
    r.block = r.grad_scores + ROWS * r.size;
    return r;
}

/* Put the n tokens from `token` on at the places from `place` on. */
static inline void put(const Stream *s, const Room *r, const real *k, const real *v, long head, long token, long place, long n, int backward,
                long width) {
    long stride = s->kv_heads * width;
    for (long i = 0; i < n; i++) {
        const real *key = k + (token + i) * stride + head * width, *value = v + (token + i) * stride + head * width;
        memcpy(r->values + (place + i) * r->wide, value, width * sizeof(real));
        for (long e = 0; e < width; e++) r->across_keys[e * r->size + place + i] = key[e];
        if (!backward) continue;
        memcpy(r->keys + (place + i) * r->wide, key, width * sizeof(real));
        for (long e = 0; e < width; e++) r->across_values[e * r->size + place + i] = value[e];
    }
    if (backward) {
        memset(r->grad_keys + place * r->wide, 0, n * r->wide * sizeof(real));
        memset(r->grad_values + place * r->wide, 0, n * r->wide * sizeof(real));
    }
}

/* Scores of ROWS queries [ROWS, wide] with the keys at the places from `first` to `last`, both multiples of LANES. */
static inline void score(const real *queries, long wide, const real *across, long size, long width, long first, long last, real *scores, long stride) {
    for (long j = first; j < last; j += LANES) {
        vec a = {0}, b = {0}, c = {0}, d = {0};
        for (long e = 0; e < width; e++) {
            vec key = load(across + e * size + j);
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

/* out [ROWS, wide] = weights [ROWS, places] @ values [places, stride], over the places from first to last. */
static inline void weigh(const real *weights, long size, const real *values, long stride, long wide, long first, long last, real *out) {
    for (long e = 0; e < wide; e += LANES) {
        vec a = {0}, b = {0}, c = {0}, d = {0}, a2 = {0}, b2 = {0}, c2 = {0}, d2 = {0};
        const real *value = values + e;
        long j = first;
        for (; j + 1 < last; j += 2) {
            vec v = load(value + j * stride), v2 = load(value + (j + 1) * stride);
            a += weights[j] * v, a2 += weights[j + 1] * v2;
            b += weights[size + j] * v, b2 += weights[size + j + 1] * v2;
            c += weights[2 * size + j] * v, c2 += weights[2 * size + j + 1] * v2;
            d += weights[3 * size + j] * v, d2 += weights[3 * size + j + 1] * v2;
        }
        if (j < last) {
            vec v = load(value + j * stride);
            a += weights[j] * v, b += weights[size + j] * v, c += weights[2 * size + j] * v, d += weights[3 * size + j] * v;
        }
        a += a2, b += b2, c += c2, d += d2;
        store(out + e, a), store(out + wide + e, b), store(out + 2 * wide + e, c), store(out + 3 * wide + e, d);
    }
}

/* Scores of places that are not read, in [from, first) and [last, to): so low that their weights are exactly 0. */
static inline void hide(real *scores, long from, long first, long last, long to) {
    for (long j = from; j < first; j++) scores[j] = UNREAD;
    for (long j = last; j < to; j++) scores[j] = UNREAD;
}

/* Scores to weights that are still to be divided by *total, in place, over [from, to), both multiples of LANES. Returns the
   largest score, scaled. */
static inline real softmax(real *scores, real scaling, long from, long to, real *total) {
    vec most = all(UNREAD), sum = {0};
    for (long j = from; j < to; j += LANES) {
        vec x = load(scores + j);
        most = choose((whole_vec)(x > most), x, most);
    }
    real largest = largest_of(most) * scaling;
    for (long j = from; j < to; j += LANES) {
        vec weights = exp_of(load(scores + j) * scaling - largest);
        store(scores + j, weights);
        sum += weights;
    }
    *total = sum_of(sum);
    return largest;
}

/* The queries of one head, `n` tokens from `token` on, whose own keys stand from `place` on. */
static inline void read_forward(const Stream *s, const Room *r, const real *q, real *out, real *normaliser, long head, long token, long place,
                         long n, long width) {
    long stride = s->heads * width, wide = padded(width);
    real *queries = r->block, *found = r->block + ROWS * wide, totals[ROWS];
    for (long i = 0; i < n; i += ROWS) {
        long rows = min_(ROWS, n - i), last = place + i + rows;
        long first = s->window ? max_(0, place + i + 1 - s->window) : 0, from = first / LANES * LANES, to = padded(last);
        for (long row = 0; row < ROWS; row++)
            memcpy(queries + row * wide, q + (token + i + min_(row, rows - 1)) * stride + head * width, width * sizeof(real));
        score(queries, wide, r->across_keys, r->size, width, from, to, r->weights, r->size);
        for (long row = 0; row < rows; row++) {
            long end = place + i + row + 1, begin = s->window ? max_(0, end - s->window) : 0;
            real *scores = r->weights + row * r->size;
            hide(scores, from, begin, end, to);
            real largest = softmax(scores, s->scaling, from, to, totals + row);
            normaliser[(token + i + row) * s->heads + head] = largest + LOG(totals[row]);
        }
        weigh(r->weights, r->size, r->values, wide, wide, first, last, found);
        for (long row = 0; row < rows; row++) {
            real *to = out + (token + i + row) * stride + head * width, share_of = 1 / totals[row];
            for (long e = 0; e < width; e++) to[e] = found[row * wide + e] * share_of;
        }
    }
}

static inline void group_forward(const Stream *s, const Room *r, const real *q, const real *k, const real *v, real *out, real *normaliser, long group,
                          long head, long width) {
    long repeats = s->heads / s->kv_heads, prompt = s->prompts[group], token = s->starts[group];
    put(s, r, k, v, head, token, 0, prompt, 0, width);
    for (long h = head * repeats; h < (head + 1) * repeats; h++) read_forward(s, r, q, out, normaliser, h, token, 0, prompt, width);
    token += prompt;
    for (long row = s->rows[group]; row < s->rows[group + 1]; token += s->lengths[row++]) {
        put(s, r, k, v, head, token, prompt, s->lengths[row], 0, width);
        for (long h = head * repeats; h < (head + 1) * repeats; h++)
            read_forward(s, r, q, out, normaliser, h, token, prompt, s->lengths[row], width);
    }
}

int attend_forward(const Stream *s, const real *q, const real *k, const real *v, real *out, real *normaliser) {
    int state = DONE;
#pragma omp parallel if (s->tokens * s->heads * s->width > WORTH_THREADS)
    {
        Room r = make_room(s);
        if (!r.keys) {
#pragma omp atomic write
            state = NO_MEMORY;
        }
#pragma omp for schedule(dynamic, 1)
        for (long item = 0; item < s->num_groups * s->kv_heads; item++) {
            if (r.keys) group_forward(s, &r, q, k, v, out, normaliser, item / s->kv_heads, item % s->kv_heads, s->width);
        }
        free(r.keys);
    }
    return state;
}

static inline void read_backward(const Stream *s, const Room *r, const real *q, const real *out, const real *normaliser, const real *grad,
                          real *grad_q, long head, long token, long place, long n, long width) {
    long stride = s->heads * width, wide = padded(width);
    real *queries = r->block, *grads = r->block + ROWS * wide, *found = r->block + 2 * ROWS * wide, scaling = s->scaling;
    for (long i = 0; i < n; i += ROWS) {
        long rows = min_(ROWS, n - i), last = place + i + rows;
        long first = s->window ? max_(0, place + i + 1 - s->window) : 0, from = first / LANES * LANES, to = padded(last);
        for (long row = 0; row < ROWS; row++) {
            long at = (token + i + min_(row, rows - 1)) * stride + head * width;
            memcpy(queries + row * wide, q + at, width * sizeof(real));
            memcpy(grads + row * wide, grad + at, width * sizeof(real));
        }
        score(queries, wide, r->across_keys, r->size, width, from, to, r->weights, r->size);
        score(grads, wide, r->across_values, r->size, width, from, to, r->grad_scores, r->size);
        for (long row = 0; row < ROWS; row++) {
            real *weights = r->weights + row * r->size, *grad_scores = r->grad_scores + row * r->size;
            long end = place + i + row + 1, begin = s->window ? max_(0, end - s->window) : 0;
            if (row >= rows) begin = end = from;
            const real *mine = out + (token + i + row) * stride + head * width;
            real held = 0, log_total = row < rows ? normaliser[(token + i + row) * s->heads + head] : 0;
            if (row < rows)
                for (long e = 0; e < width; e++) held += mine[e] * grads[row * wide + e];
            hide(weights, from, begin, end, to);
            for (long j = from; j < to; j += LANES) {
                vec weight = exp_of(load(weights + j) * scaling - log_total);
                store(weights + j, weight);
                store(grad_scores + j, weight * (load(grad_scores + j) - held) * scaling);
            }
        }
        weigh(r->grad_scores, r->size, r->keys, wide, wide, first, last, found);
        for (long row = 0; row < rows; row++)
            memcpy(grad_q + (token + i + row) * stride + head * width, found + row * wide, width * sizeof(real));
        for (long e = 0; e < wide; e += LANES) {
            vec a = load(queries + e), b = load(queries + wide + e), c = load(queries + 2 * wide + e), d = load(queries + 3 * wide + e);
            vec ga = load(grads + e), gb = load(grads + wide + e), gc = load(grads + 2 * wide + e), gd = load(grads + 3 * wide + e);
            for (long j = first; j < last; j++) {
                const real *of = r->grad_scores + j, *weight = r->weights + j;
                real *key = r->grad_keys + j * wide + e, *value = r->grad_values + j * wide + e;
                store(key, load(key) + (of[0] * a + of[r->size] * b) + (of[2 * r->size] * c + of[3 * r->size] * d));
                store(value, load(value) + (weight[0] * ga + weight[r->size] * gb) + (weight[2 * r->size] * gc + weight[3 * r->size] * gd));
            }
        }
    }
}

static void take(const Stream *s, const Room *r, real *grad_k, real *grad_v, long head, long token, long place, long n) {
    long stride = s->kv_heads * s->width, bytes = s->width * sizeof(real);
    for (long i = 0; i < n; i++) {
        memcpy(grad_k + (token + i) * stride + head * s->width, r->grad_keys + (place + i) * r->wide, bytes);
        memcpy(grad_v + (token + i) * stride + head * s->width, r->grad_values + (place + i) * r->wide, bytes);
    }
}

static inline void group_backward(const Stream *s, const Room *r, const real *q, const real *k, const real *v, const real *out, const real *normaliser,
                           const real *grad, real *grad_q, real *grad_k, real *grad_v, long group, long head, long width) {
    long repeats = s->heads / s->kv_heads, prompt = s->prompts[group], start = s->starts[group], token = start + prompt;
    put(s, r, k, v, head, start, 0, prompt, 1, width);
    for (long h = head * repeats; h < (head + 1) * repeats; h++)
        read_backward(s, r, q, out, normaliser, grad, grad_q, h, start, 0, prompt, width);
    for (long row = s->rows[group]; row < s->rows[group + 1]; token += s->lengths[row++]) {
        put(s, r, k, v, head, token, prompt, s->lengths[row], 1, width);
        for (long h = head * repeats; h < (head + 1) * repeats; h++)
            read_backward(s, r, q, out, normaliser, grad, grad_q, h, token, prompt, s->lengths[row], width);
        take(s, r, grad_k, grad_v, head, token, prompt, s->lengths[row]);
    }
    take(s, r, grad_k, grad_v, head, start, 0, prompt);
}

int attend_backward(const Stream *s, const real *q, const real *k, const real *v, const real *out, const real *normaliser,
                     const real *grad, real *grad_q, real *grad_k, real *grad_v) {
    int state = DONE;
#pragma omp parallel if (s->tokens * s->heads * s->width > WORTH_THREADS)
    {
        Room r = make_room(s);
        if (!r.keys) {
#pragma omp atomic write
            state = NO_MEMORY;
        }
#pragma omp for schedule(dynamic, 1)
        for (long item = 0; item < s->num_groups * s->kv_heads; item++) {
            if (r.keys) group_backward(s, &r, q, k, v, out, normaliser, grad, grad_q, grad_k, grad_v, item / s->kv_heads, item % s->kv_heads, s->width);
        }
        free(r.keys);
    }
    return state;
}

/* Decoding. Each thread takes some of the rows from token to token, and needs nothing of the others. */
typedef struct {
    const real *before_attention, *before_mlp, *q_norm, *k_norm; /* weights of norms; of heads, or none */
    const real *q, *k, *v, *o, *gate, *up, *down;                /* [out, in] */
    const real *q_bias, *k_bias, *v_bias, *o_bias, *gate_bias, *up_bias, *down_bias;
    double epsilon_attention, epsilon_mlp, epsilon_q, epsilon_k, scaling;
    long window;
} Layer;

typedef struct {
    real *keys, *values;                     /* [R, K, E, C] and [R, K, C, E], C a multiple of LANES */
    const real *prompt_keys, *prompt_values; /* [P, K, E, S] and [P, K, S, E], or none */
} Cache;

typedef struct {
    long num_layers, rows, width, heads, kv_heads, head_width, mlp_width, vocabulary, positions;
    long columns, now, slots, longest_prompt, num_steps, max_tokens, num_ends, draws, greedy;
    double epsilon, temperature;
    const real *embeddings, *final_norm, *head, *head_bias; /* [V, D], [D], [V, D], [V] or none */
    const real *cosine, *sine;                              /* [positions, E] */
    const int64_t *firsts, *starts, *prompts, *keys;        /* [R] as the grid has them; what seeds a row's noise */
    const int64_t *ends;
    uint8_t *live;               /* [R] */
    real *logits;                /* [R, V] */
    int64_t *tokens;             /* [steps, R], as all that follows */
    real *logprobs, *entropies;
    uint8_t *was_live, *ended;
    void (*gemm)(const char *, const char *, const int *, const int *, const int *, const real *, const real *, const int *,
                 const real *, const int *, const real *, real *, const int *, size_t, size_t); /* BLAS's, in Fortran's words */
} Step;

/* out [rows, n] = x [rows, m] @ weight [n, m].T + bias; added to what is there where `add`. */
static void product(const Step *s, const real *x, long rows, long m, const real *weight, const real *bias, long n, real *out, int add) {
    if (bias)
        for (long i = 0; i < rows; i++)
            for (long j = 0; j < n; j++) out[i * n + j] = (add ? out[i * n + j] : 0) + bias[j];
    int num_rows = (int)rows, num_in = (int)m, num_out = (int)n;
    real one = 1, kept = add || bias ? 1 : 0;
    s->gemm("T", "N", &num_out, &num_rows, &num_in, &one, weight, &num_in, x, &num_in, &kept, out, &num_out, 1, 1);
}

static inline void normalise(const real *restrict x, const real *restrict weight, double epsilon, real *restrict out, long rows, long width) {
    for (long i = 0; i < rows; i++) {
        real s = inverse_root(x + i * width, width, epsilon);
        for (long j = 0; j < width; j++) out[i * width + j] = x[i * width + j] * s * weight[j];
    }
}

/* As `score`, of one query. */
static inline void score_one(const real *query, const real *across, long size, long width, long first, long last, real *scores) {
    for (long j = first; j < last; j += LANES) {
        vec a = {0}, b = {0};
        long e = 0;
        for (; e + 1 < width; e += 2) {
            a += query[e] * load(across + e * size + j);
            b += query[e + 1] * load(across + (e + 1) * size + j);
        }
        if (e < width) a += query[e] * load(across + e * size + j);
        store(scores + j, a + b);
    }
}

/* n rows of one prompt, whose slots in the cache are in `slots`, one key-value head; q and attended [n, H, E]. room: ROWS * (S + C) scores, 2 * E * S for the prompt where it is not
   as wide as vectors are, 2 * ROWS * E. */
static void attend_rows(const Step *s, const Layer *layer, const Cache *cache, const real *q, real *attended, const int64_t *slots, long n,
                        long head, long now, real *room) {
    long width = s->head_width, wide = padded(width), repeats = s->heads / s->kv_heads, prompt_size = padded(s->longest_prompt);
    long used = padded(now + 1), size = prompt_size + used, stride = s->heads * width, num_queries = n * repeats;
    real *scores = room, *queries = scores + ROWS * size, *found = queries + ROWS * wide, *padded_keys = found + ROWS * wide;
    real *padded_values = padded_keys + width * prompt_size, totals[ROWS];
    const real *prompt_keys = NULL, *prompt_values = NULL;
    if (prompt_size) {
        long of_prompt = (slots[0] / s->slots * s->kv_heads + head) * s->longest_prompt * width;
        prompt_keys = cache->prompt_keys + of_prompt, prompt_values = cache->prompt_values + of_prompt;
        if (prompt_size != s->longest_prompt) {
            for (long e = 0; e < width; e++)
                memcpy(padded_keys + e * prompt_size, prompt_keys + e * s->longest_prompt, s->longest_prompt * sizeof(real));
            prompt_keys = padded_keys;
        }
        if (wide != width) {
            for (long j = 0; j < s->longest_prompt; j++) memcpy(padded_values + j * wide, prompt_values + j * width, width * sizeof(real));
            prompt_values = padded_values;
        }
    }
    for (long query = 0; query < num_queries; query += ROWS) {
        long together = min_(ROWS, num_queries - query);
        for (long i = 0; i < ROWS; i++) {
            long number = query + min_(i, together - 1), h = head * repeats + number % repeats;
            memcpy(queries + i * wide, q + number / repeats * stride + h * width, width * sizeof(real));
        }
        if (prompt_size) score(queries, wide, prompt_keys, prompt_size, width, 0, prompt_size, scores, size);
        for (long i = 0; i < together; i++) {
            long number = query + i, row = slots[number / repeats], begin = s->firsts[row], prompt = prompt_size ? s->prompts[row] : 0;
            long from = 0;
            if (layer->window) {
                begin = max_(begin, now + 1 - layer->window);
                from = min_(prompt, max_(0, s->prompts[row] + now - s->starts[row] + 1 - layer->window));
            }
            real *mine = scores + i * size, *own = mine + prompt_size;
            const real *keys = cache->keys + (row * s->kv_heads + head) * s->columns * width;
            const real *values = cache->values + (row * s->kv_heads + head) * s->columns * width;
            score_one(queries + i * wide, keys, s->columns, width, begin / LANES * LANES, used, own);
            hide(mine, 0, from, prompt, prompt_size);
            hide(own, 0, begin, now + 1, used);
            softmax(mine, layer->scaling, 0, size, totals + i);
            real *out = attended + number / repeats * stride + (head * repeats + number % repeats) * width;
            memset(out, 0, width * sizeof(real));
            if (width % LANES == 0)
                for (long e = 0; e < width; e += LANES) {
                    vec a = {0}, b = {0};
                    long j = begin;
                    for (; j < now; j += 2) {
                        a += own[j] * load(values + j * width + e);
                        b += own[j + 1] * load(values + (j + 1) * width + e);
                    }
                    if (j == now) a += own[j] * load(values + j * width + e);
                    store(out + e, a + b);
                }
            else
                for (long j = begin; j <= now; j++)
                    for (long e = 0; e < width; e++) out[e] += own[j] * values[j * width + e];
        }
        if (prompt_size) weigh(scores, size, prompt_values, wide, wide, 0, s->longest_prompt, found);
        for (long i = 0; i < together; i++) {
            long number = query + i;
            real *out = attended + number / repeats * stride + (head * repeats + number % repeats) * width, share_of = 1 / totals[i];
            for (long e = 0; e < width; e++) out[e] = (out[e] + (prompt_size ? found[i * wide + e] : 0)) * share_of;
        }
    }
}

/* SplitMix64's finaliser folds a token's number into its row's key; 53 of the bits are a number in [0, 1). As in noise.py. */
static inline double uniform(int64_t key, int64_t number) {
    const uint64_t step = 0x9E3779B97F4A7C15u;
    uint64_t z = ((uint64_t)key ^ (uint64_t)number * step) + step;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    return (double)(z >> 11) / (double)(1ull << 53);
}

/* Draw a token from logits [V], which become probabilities, as `sample_tokens` does. `at`: where its step's results go. */
static int64_t draw(const Step *s, real *logits, long row, long number, long at) {
    long size = s->vocabulary, best = 0, last = 0;
    real divisor = s->greedy ? 1 : s->temperature, largest, sum = 0, entropy = 0;
    for (long i = 0; i < size; i++) logits[i] /= divisor;
    largest = logits[0];
#pragma omp simd reduction(max : largest)
    for (long i = 0; i < size; i++) largest = logits[i] > largest ? logits[i] : largest;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < size; i++) sum += exp_(logits[i] - largest);
    real normaliser = largest + LOG(sum);
#pragma omp simd reduction(+ : entropy)
    for (long i = 0; i < size; i++) {
        real p = exp_(logits[i] - normaliser);
        entropy -= p > 0 ? p * (logits[i] - normaliser) : 0;
    }
    if (s->greedy) {
        while (best + 1 < size && !(logits[best] == largest)) best++;
    } else {
        double total = 0, threshold;
        for (long i = 0; i < size; i++) total += exp_(logits[i] - normaliser);
        threshold = uniform(s->keys[row], number) * total;
        total = 0;
        for (best = 0; best < size; best++) {
            real p = exp_(logits[best] - normaliser);
            if (p > 0) last = best;
            total += p;
            if (total > threshold) break;
        }
        best = best < size ? best : last;
    }
    s->tokens[at] = best;
    s->logprobs[at] = logits[best] - normaliser;
    s->entropies[at] = entropy;
    s->was_live[at] = 1;
    s->ended[at] = 0;
    for (long i = 0; i < s->num_ends; i++) s->ended[at] |= best == s->ends[i];
    return best;
}

/* The slots first .. last, which are one thread's, through all steps. */
static int decode_rows(const Step *s, const Layer *layers, const Cache *caches, long first, long last) {
    long n = last - first, width = s->head_width, size_q = s->heads * width, size_k = s->kv_heads * width, live = 0;
    long prompt_size = padded(s->longest_prompt), wide = padded(width);
    long attention_room = ROWS * (prompt_size + padded(s->now + s->num_steps)) + (width + wide) * prompt_size + 2 * ROWS * wide;
    long size = n * (2 * s->width + 2 * size_q + 2 * size_k + 2 * s->mlp_width + s->vocabulary) + attention_room + width;
    real *all = malloc((size + 1) * sizeof(real) + n * sizeof(int64_t)), *x = all;
    if (!all) return NO_MEMORY;
    real *inner = x + n * s->width, *q = inner + n * s->width;
    real *k = q + n * size_q, *v = k + n * size_k, *attended = v + n * size_k, *gate = attended + n * size_q, *up = gate + n * s->mlp_width;
    real *logits = up + n * s->mlp_width, *room = logits + n * s->vocabulary, *turned = room + attention_room;
    int64_t *slots = (int64_t *)(all + size + size % 2);
    for (long row = first; row < last; row++)
        if (s->live[row]) slots[live++] = row;
    for (long i = 0; i < live; i++) memcpy(logits + i * s->vocabulary, s->logits + slots[i] * s->vocabulary, s->vocabulary * sizeof(real));
    for (long step = 0; step < s->num_steps && live; step++) {
        long now = s->now + step, kept = 0;
        for (long i = 0; i < live; i++) {
            long row = slots[i], number = now - s->starts[row], at = step * s->rows + row;
            int64_t token = s->draws ? draw(s, logits + i * s->vocabulary, row, number, at) : s->tokens[at];
            if (s->draws && (s->ended[at] || number + 1 >= s->max_tokens)) {
                s->live[row] = 0;
                continue;
            }
            memcpy(x + kept * s->width, s->embeddings + token * s->width, s->width * sizeof(real));
            slots[kept++] = row;
        }
        if (!(live = kept)) break;
        for (long l = 0; l < s->num_layers; l++) {
            const Layer *layer = layers + l;
            const Cache *cache = caches + l;
            normalise(x, layer->before_attention, layer->epsilon_attention, inner, live, s->width);
            product(s, inner, live, s->width, layer->q, layer->q_bias, size_q, q, 0);
            product(s, inner, live, s->width, layer->k, layer->k_bias, size_k, k, 0);
            product(s, inner, live, s->width, layer->v, layer->v_bias, size_k, v, 0);
            for (long i = 0; i < live; i++) {
                long row = slots[i], position = s->prompts[row] + now - s->starts[row];
                const real *cosine = s->cosine + position * width, *sine = s->sine + position * width;
                for (long h = 0; h < s->heads; h++) {
                    real *head = q + i * size_q + h * width, scale = layer->q_norm ? inverse_root(head, width, layer->epsilon_q) : 1;
                    rope(head, layer->q_norm, scale, cosine, sine, turned, width);
                    memcpy(head, turned, width * sizeof(real));
                }
                for (long h = 0; h < s->kv_heads; h++) {
                    real *head = k + i * size_k + h * width, scale = layer->k_norm ? inverse_root(head, width, layer->epsilon_k) : 1;
                    long place = (row * s->kv_heads + h) * s->columns * width;
                    rope(head, layer->k_norm, scale, cosine, sine, turned, width);
                    for (long e = 0; e < width; e++) cache->keys[place + e * s->columns + now] = turned[e];
                    memcpy(cache->values + place + now * width, v + i * size_k + h * width, width * sizeof(real));
                }
            }
            for (long begin = 0, end; begin < live; begin = end) { /* rows of one prompt together */
                for (end = begin + 1; end < live && s->longest_prompt && slots[end] / s->slots == slots[begin] / s->slots;) end++;
                for (long h = 0; h < s->kv_heads; h++)
                    attend_rows(s, layer, cache, q + begin * size_q, attended + begin * size_q, slots + begin, end - begin, h, now, room);
            }
            product(s, attended, live, size_q, layer->o, layer->o_bias, s->width, x, 1);
            normalise(x, layer->before_mlp, layer->epsilon_mlp, inner, live, s->width);
            product(s, inner, live, s->width, layer->gate, layer->gate_bias, s->mlp_width, gate, 0);
            product(s, inner, live, s->width, layer->up, layer->up_bias, s->mlp_width, up, 0);
#pragma omp simd
            for (long i = 0; i < live * s->mlp_width; i++) gate[i] = gate[i] * sigmoid(gate[i]) * up[i];
            product(s, gate, live, s->mlp_width, layer->down, layer->down_bias, s->width, x, 1);
        }
        normalise(x, s->final_norm, s->epsilon, inner, live, s->width);
        product(s, inner, live, s->width, s->head, s->head_bias, s->vocabulary, logits, 0);
    }
    for (long i = 0; i < live; i++) memcpy(s->logits + slots[i] * s->vocabulary, logits + i * s->vocabulary, s->vocabulary * sizeof(real));
    free(all);
    return DONE;
}

/* Steps of decoding. In each a row draws its next token from its logits, or takes the one it is given, and if it has not ended the
   token goes through the layers: its keys and values to the step's column, `now` and on, and new logits to the row's. */
int decode(const Step *s, const Layer *layers, const Cache *caches) {
    long threads = min_(omp_get_max_threads(), (s->rows + 3) / 4);
    int state = DONE;
    if (!rope_fits(s->head_width) || s->now + s->num_steps > s->columns) return NO_ROOM;
    for (long row = 0; row < s->rows; row++) {
        long written = s->now - s->starts[row], more = s->draws ? min_(s->num_steps, s->max_tokens - 1 - written) : s->num_steps;
        if (s->live[row] && s->prompts[row] + written + more > s->positions) return NO_ROOM;
    }
#pragma omp parallel num_threads(threads)
    {
        long first, last = share(s->rows, &first);
        if (first < last && decode_rows(s, layers, caches, first, last) != DONE) {
#pragma omp atomic write
            state = NO_MEMORY;
        }
    }
    return state;
}

/* How this compiler lays out what is handed over from Python, which compares it with its own. A size by itself has no place. */
typedef struct {
    const char *name;
    long place, size;
} Field;

#define WHOLE(type) {#type, -1, sizeof(type)}
#define FIELD(type, name) {#type "." #name, offsetof(type, name), sizeof(((type *)0)->name)}
static const Field FIELDS[] = {
    WHOLE(Stream), FIELD(Stream, tokens), FIELD(Stream, num_groups), FIELD(Stream, heads), FIELD(Stream, kv_heads),
    FIELD(Stream, width), FIELD(Stream, window), FIELD(Stream, longest), FIELD(Stream, scaling), FIELD(Stream, starts),
    FIELD(Stream, prompts), FIELD(Stream, rows), FIELD(Stream, lengths),
    WHOLE(Layer), FIELD(Layer, before_attention), FIELD(Layer, before_mlp), FIELD(Layer, q_norm), FIELD(Layer, k_norm),
    FIELD(Layer, q), FIELD(Layer, k), FIELD(Layer, v), FIELD(Layer, o), FIELD(Layer, gate), FIELD(Layer, up), FIELD(Layer, down),
    FIELD(Layer, q_bias), FIELD(Layer, k_bias), FIELD(Layer, v_bias), FIELD(Layer, o_bias), FIELD(Layer, gate_bias),
    FIELD(Layer, up_bias), FIELD(Layer, down_bias), FIELD(Layer, epsilon_attention), FIELD(Layer, epsilon_mlp),
    FIELD(Layer, epsilon_q), FIELD(Layer, epsilon_k), FIELD(Layer, scaling), FIELD(Layer, window),
    WHOLE(Cache), FIELD(Cache, keys), FIELD(Cache, values), FIELD(Cache, prompt_keys), FIELD(Cache, prompt_values),
    WHOLE(Step), FIELD(Step, num_layers), FIELD(Step, rows), FIELD(Step, width), FIELD(Step, heads), FIELD(Step, kv_heads),
    FIELD(Step, head_width), FIELD(Step, mlp_width), FIELD(Step, vocabulary), FIELD(Step, positions), FIELD(Step, columns),
    FIELD(Step, now), FIELD(Step, slots), FIELD(Step, longest_prompt), FIELD(Step, num_steps), FIELD(Step, max_tokens),
    FIELD(Step, num_ends), FIELD(Step, draws), FIELD(Step, greedy), FIELD(Step, epsilon), FIELD(Step, temperature),
    FIELD(Step, embeddings), FIELD(Step, final_norm), FIELD(Step, head), FIELD(Step, head_bias), FIELD(Step, cosine),
    FIELD(Step, sine), FIELD(Step, firsts), FIELD(Step, starts), FIELD(Step, prompts), FIELD(Step, keys), FIELD(Step, ends),
    FIELD(Step, live), FIELD(Step, logits), FIELD(Step, tokens), FIELD(Step, logprobs), FIELD(Step, entropies),
    FIELD(Step, was_live), FIELD(Step, ended), FIELD(Step, gemm), {NULL, 0, 0},
};

const Field *fields(void) { return FIELDS; }
