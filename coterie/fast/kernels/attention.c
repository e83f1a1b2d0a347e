/* Attention over a stream of groups. A group is a prompt and its completions, one after another; a completion's token reads the
   prompt and what stands before it in its own row. For one group and one key-value head the keys stand side by side: those of
   the prompt first and, after them, those of one completion at a time. So the place of a key is its position, and a window is a
   range of places. */
#include "kernels.h"

typedef struct {
    const real *q, *k, *v; /* [T, H, E], [T, K, E], [T, K, E] */
    real *out;             /* [T, H, E], and */
    real *normaliser;      /* [T, H] the logarithm of the softmax's: written forward, read backward */
    const real *grad;      /* [T, H, E] of out; none forward */
    real *grad_q, *grad_k, *grad_v;
} Tensors;

typedef struct {
    long size, wide;                   /* places of keys, and E, both padded */
    real *keys, *values;               /* [places, E] */
    real *across_keys, *across_values; /* [E, places] */
    real *grad_keys, *grad_values;     /* [places, E] */
    real *weights, *grad_scores;       /* [ROWS, places] */
    real *queries, *grads, *sums;      /* [ROWS, E] */
} Workspace;

/* Without memory for it, `keys` is none. */
static Workspace make_workspace(const Attention *a) {
    Workspace w = {.size = padded(a->longest), .wide = padded(a->width)};
    long by_place = w.size * w.wide;
    real *all = calloc(6 * by_place + 2 * ROWS * w.size + 3 * ROWS * w.wide, sizeof(real));
    if (!all) return w;
    real **parts[] = {&w.keys, &w.values, &w.across_keys, &w.across_values, &w.grad_keys, &w.grad_values};
    for (int i = 0; i < 6; i++) *parts[i] = all + i * by_place;
    w.weights = all + 6 * by_place;
    w.grad_scores = w.weights + ROWS * w.size;
    w.queries = w.grad_scores + ROWS * w.size;
    w.grads = w.queries + ROWS * w.wide;
    w.sums = w.grads + ROWS * w.wide;
    return w;
}

/* Put the keys and values of n tokens from `token` on at the places from `place` on. */
static inline void copy_in(const Attention *a, const Tensors *x, const Workspace *w, long head, long token, long place,
                           long n) {
    for (long i = 0; i < n; i++) {
        long at = ((token + i) * a->kv_heads + head) * a->width;
        memcpy(w->values + (place + i) * w->wide, x->v + at, a->width * sizeof(real));
        for (long e = 0; e < a->width; e++) w->across_keys[e * w->size + place + i] = x->k[at + e];
        if (!x->grad) continue;
        memcpy(w->keys + (place + i) * w->wide, x->k + at, a->width * sizeof(real));
        for (long e = 0; e < a->width; e++) w->across_values[e * w->size + place + i] = x->v[at + e];
    }
    if (x->grad) {
        memset(w->grad_keys + place * w->wide, 0, n * w->wide * sizeof(real));
        memset(w->grad_values + place * w->wide, 0, n * w->wide * sizeof(real));
    }
}

/* Put what was added up for the keys and values of n tokens where their gradients belong. */
static inline void copy_out(const Attention *a, const Tensors *x, const Workspace *w, long head, long token, long place,
                            long n) {
    for (long i = 0; i < n; i++) {
        long at = ((token + i) * a->kv_heads + head) * a->width;
        memcpy(x->grad_k + at, w->grad_keys + (place + i) * w->wide, a->width * sizeof(real));
        memcpy(x->grad_v + at, w->grad_values + (place + i) * w->wide, a->width * sizeof(real));
    }
}

/* Up to ROWS queries of one head, from `token` on, whose own keys stand from `place` on. */
typedef struct {
    long head, token, place, num;
    long first, last; /* the places that any of them reads */
    long from, to;    /* the same, as multiples of LANES */
} Queries;

static inline Queries queries_at(const Attention *a, long head, long token, long place, long num) {
    long last = place + num, first = a->window ? max_(0, place + 1 - a->window) : 0;
    return (Queries){head, token, place, num, first, last, first / LANES * LANES, padded(last)};
}

/* ROWS rows of x [T, H, E] at the queries: [ROWS, wide]. Where there are fewer queries the last one is there again. */
static inline void gather(const Attention *a, const Workspace *w, const Queries *q, const real *x, real *rows) {
    for (long i = 0; i < ROWS; i++)
        memcpy(rows + i * w->wide, x + ((q->token + min_(i, q->num - 1)) * a->heads + q->head) * a->width,
               a->width * sizeof(real));
}

/* Mask what the i-th query does not read, of its scores at the places from `from` to `to`. */
static inline void mask_query(const Attention *a, const Queries *q, long i, real *scores) {
    long end = q->place + i + 1, begin = a->window ? max_(0, end - a->window) : 0;
    mask(scores, q->from, begin, end, q->to);
}

static inline void queries_forward(const Attention *a, const Tensors *x, const Workspace *w, Queries q) {
    real totals[ROWS];
    gather(a, w, &q, x->q, w->queries);
    scores_of(w->queries, w->wide, w->across_keys, w->size, a->width, q.from, q.to, w->weights, w->size);
    for (long i = 0; i < q.num; i++) {
        real *scores = w->weights + i * w->size;
        mask_query(a, &q, i, scores);
        real largest = softmax(scores, a->scaling, q.from, q.to, totals + i);
        x->normaliser[(q.token + i) * a->heads + q.head] = largest + LOG(totals[i]);
    }
    weighted_sum(w->weights, w->size, w->values, w->wide, q.first, q.last, w->sums);
    for (long i = 0; i < q.num; i++) {
        real *to = x->out + ((q.token + i) * a->heads + q.head) * a->width, share_of = 1 / totals[i];
        for (long e = 0; e < a->width; e++) to[e] = w->sums[i * w->wide + e] * share_of;
    }
}

static inline void queries_backward(const Attention *a, const Tensors *x, const Workspace *w, Queries q) {
    long size = w->size, wide = w->wide;
    real scaling = a->scaling;
    gather(a, w, &q, x->q, w->queries);
    gather(a, w, &q, x->grad, w->grads);
    scores_of(w->queries, wide, w->across_keys, size, a->width, q.from, q.to, w->weights, size);
    scores_of(w->grads, wide, w->across_values, size, a->width, q.from, q.to, w->grad_scores, size);
    for (long i = 0; i < ROWS; i++) {
        real *weights = w->weights + i * size, *grad_scores = w->grad_scores + i * size, held = 0, log_total = 0;
        if (i < q.num) {
            long at = (q.token + i) * a->heads + q.head;
            log_total = x->normaliser[at];
            for (long e = 0; e < a->width; e++) held += x->out[at * a->width + e] * w->grads[i * wide + e];
            mask_query(a, &q, i, weights);
        } else
            mask(weights, q.from, q.from, q.from, q.to);
        for (long j = q.from; j < q.to; j += LANES) {
            vec weight = exp_vec(load(weights + j) * scaling - log_total);
            store(weights + j, weight);
            store(grad_scores + j, weight * (load(grad_scores + j) - held) * scaling);
        }
    }
    weighted_sum(w->grad_scores, size, w->keys, wide, q.first, q.last, w->sums);
    for (long i = 0; i < q.num; i++)
        memcpy(x->grad_q + ((q.token + i) * a->heads + q.head) * a->width, w->sums + i * wide, a->width * sizeof(real));
    real *grad_keys = w->grad_keys, *grad_values = w->grad_values;
    const real *all_weights = w->weights, *all_scores = w->grad_scores;
    for (long e = 0; e < wide; e += LANES) {
        const real *query = w->queries + e, *grad = w->grads + e;
        vec qa = load(query), qb = load(query + wide), qc = load(query + 2 * wide), qd = load(query + 3 * wide);
        vec ga = load(grad), gb = load(grad + wide), gc = load(grad + 2 * wide), gd = load(grad + 3 * wide);
        for (long j = q.first; j < q.last; j++) {
            const real *s = all_scores + j, *p = all_weights + j;
            real *key = grad_keys + j * wide + e, *value = grad_values + j * wide + e;
            store(key, load(key) + (s[0] * qa + s[size] * qb) + (s[2 * size] * qc + s[3 * size] * qd));
            store(value, load(value) + (p[0] * ga + p[size] * gb) + (p[2 * size] * gc + p[3 * size] * gd));
        }
    }
}

/* The queries of n tokens from `token` on, of all heads that share the keys, which stand from `place` on. */
static inline void sequence(const Attention *a, const Tensors *x, const Workspace *w, long head, long token, long place,
                            long n) {
    long repeats = a->heads / a->kv_heads;
    copy_in(a, x, w, head, token, place, n);
    for (long h = head * repeats; h < (head + 1) * repeats; h++)
        for (long i = 0; i < n; i += ROWS) {
            Queries q = queries_at(a, h, token + i, place + i, min_(ROWS, n - i));
            if (x->grad)
                queries_backward(a, x, w, q);
            else
                queries_forward(a, x, w, q);
        }
}

static inline void group(const Attention *a, const Tensors *x, const Workspace *w, long number, long head) {
    long prompt = a->prompts[number], start = a->starts[number], token = start + prompt;
    sequence(a, x, w, head, start, 0, prompt);
    for (long row = a->rows[number]; row < a->rows[number + 1]; token += a->lengths[row++]) {
        sequence(a, x, w, head, token, prompt, a->lengths[row]);
        if (x->grad) copy_out(a, x, w, head, token, prompt, a->lengths[row]);
    }
    if (x->grad) copy_out(a, x, w, head, start, 0, prompt);
}

static int attend(const Attention *a, const Tensors *x) {
    int state = DONE;
#pragma omp parallel if (a->tokens * a->heads * a->width > WORTH_THREADS)
    {
        Workspace w = make_workspace(a);
        if (!w.keys) {
#pragma omp atomic write
            state = NO_MEMORY;
        }
#pragma omp for schedule(dynamic, 1)
        for (long item = 0; item < a->num_groups * a->kv_heads; item++)
            if (w.keys) group(a, x, &w, item / a->kv_heads, item % a->kv_heads);
        free(w.keys);
    }
    return state;
}

int attend_forward(const Attention *a, const real *q, const real *k, const real *v, real *out, real *normaliser) {
    Tensors x = {q, k, v, out, normaliser};
    return attend(a, &x);
}

int attend_backward(const Attention *a, const real *q, const real *k, const real *v, real *out, real *normaliser,
                    const real *grad, real *grad_q, real *grad_k, real *grad_v) {
    Tensors x = {q, k, v, out, normaliser, grad, grad_q, grad_k, grad_v};
    return attend(a, &x);
}
