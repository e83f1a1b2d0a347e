/* Decoding for models of the Llama family. Each thread takes some of the rows from token to token, and needs nothing of the others. */
#include "kernels.h"

/* What a thread's n rows stand in on their way through a layer. */
typedef struct {
    real *x, *inner;      /* [n, D] the residual stream, and its norm */
    real *q, *k, *v;      /* [n, H, E], [n, K, E], [n, K, E] */
    real *attended;       /* [n, H, E] */
    real *gate, *up;      /* [n, F] */
    real *low;            /* [n, rank] */
    real *logits;         /* [n, V] */
    real *rotated;        /* [E] */
    real *scores;         /* [ROWS, S + C], both padded */
    real *queries, *sums; /* [ROWS, E], padded */
    real *keys, *values;  /* [E, S] and [S, E] of a prompt, padded */
    int64_t *slots;       /* [n] the rows that are live, by their place in the grid */
} Buffers;

/* One piece of memory, which begins with x, or none. */
static Buffers make_buffers(const Decoding *d, long n) {
    Buffers b = {0};
    long prompt = padded(d->longest_prompt), wide = padded(d->head_width);
    long size_q = n * d->heads * d->head_width, size_k = n * d->kv_heads * d->head_width;
    struct {
        real **at;
        long size;
    } parts[] = {{&b.x, n * d->width},
                 {&b.inner, n * d->width},
                 {&b.q, size_q},
                 {&b.k, size_k},
                 {&b.v, size_k},
                 {&b.attended, size_q},
                 {&b.gate, n * d->mlp_width},
                 {&b.up, n * d->mlp_width},
                 {&b.low, n * d->rank},
                 {&b.logits, n * d->vocabulary},
                 {&b.rotated, d->head_width},
                 {&b.scores, ROWS * (prompt + padded(d->now + d->num_steps))},
                 {&b.queries, ROWS * wide},
                 {&b.sums, ROWS * wide},
                 {&b.keys, d->head_width * prompt},
                 {&b.values, wide * prompt}};
    long num_parts = sizeof parts / sizeof *parts, size = 0;
    for (long i = 0; i < num_parts; i++) size += parts[i].size;
    int64_t *all = malloc(n * sizeof(int64_t) + size * sizeof(real));
    if (!all) return b;
    b.slots = all;
    real *next = (real *)(all + n);
    for (long i = 0; i < num_parts; next += parts[i++].size) *parts[i].at = next;
    return b;
}

/* out [rows, n] = x [rows, m] @ weight [n, m].T; added to what is there where `add`. */
static void product(Gemm *gemm, const real *x, long rows, long m, const real *weight, long n, real *out, int add) {
    int num_rows = (int)rows, num_in = (int)m, num_out = (int)n;
    real one = 1, kept = add ? 1 : 0;
    gemm("T", "N", &num_out, &num_rows, &num_in, &one, weight, &num_in, x, &num_in, &kept, out, &num_out, 1, 1);
}

/* A layer with its bias and LoRA's matrices: x [rows, m] -> out [rows, n], added to what is there where `add`. */
static void linear(const Decoding *d, const Buffers *b, Gemm *gemm, const real *x, long rows, long m, const Linear *layer,
                   long n, real *out, int add) {
    if (layer->bias)
        for (long i = 0; i < rows; i++)
            for (long j = 0; j < n; j++) out[i * n + j] = (add ? out[i * n + j] : 0) + layer->bias[j];
    product(gemm, x, rows, m, layer->weight, n, out, add || layer->bias);
    if (!layer->a) return;
    product(gemm, x, rows, m, layer->a, d->rank, b->low, 0);
    for (long i = 0; i < rows * d->rank; i++) b->low[i] *= d->lora_scaling;
    product(gemm, b->low, rows, d->rank, layer->b, n, out, 1);
}

static void rms_norm(const real *x, const real *weight, double epsilon, real *out, long rows, long width) {
    for (long i = 0; i < rows; i++) rms_norm_row(x + i * width, weight, epsilon, out + i * width, width);
}

/* Heads of one token, rotated where they lie: x [heads, E]. */
static void rope_heads(const Decoding *d, real *x, long heads, const real *norm, double epsilon, long position,
                       real *rotated) {
    long width = d->head_width;
    const real *cosine = d->cosine + position * width, *sine = d->sine + position * width;
    for (long h = 0; h < heads; h++) {
        real scale = norm ? inverse_rms(x + h * width, width, epsilon) : 1;
        rope(x + h * width, norm, scale, cosine, sine, rotated, width);
        memcpy(x + h * width, rotated, width * sizeof(real));
    }
}

/* One row's keys and values [K, E] into the cache, at column `now`. */
static void cache_row(const Decoding *d, const LayerCache *cache, long row, long now, const real *k, const real *v) {
    long width = d->head_width;
    for (long h = 0; h < d->kv_heads; h++) {
        long place = (row * d->kv_heads + h) * d->columns * width;
        for (long e = 0; e < width; e++) cache->keys[place + e * d->columns + now] = k[h * width + e];
        memcpy(cache->values + place + now * width, v + h * width, width * sizeof(real));
    }
}

/* As `scores_of`, of one query. */
static inline void scores_of_one(const real *query, const real *keys, long size, long width, long first, long last,
                                 real *scores) {
    for (long j = first; j < last; j += LANES) {
        vec a = {0}, b = {0};
        long e = 0;
        for (; e + 1 < width; e += 2) {
            a += query[e] * load(keys + e * size + j);
            b += query[e + 1] * load(keys + (e + 1) * size + j);
        }
        if (e < width) a += query[e] * load(keys + e * size + j);
        store(scores + j, a + b);
    }
}

/* As `weighted_sum`, of one query, over the places from first to last, the last one too: values [places, E] -> out [E]. */
static inline void weighted_sum_of_one(const real *weights, const real *values, long width, long first, long last,
                                       real *out) {
    memset(out, 0, width * sizeof(real));
    if (width % LANES) {
        for (long j = first; j <= last; j++)
            for (long e = 0; e < width; e++) out[e] += weights[j] * values[j * width + e];
        return;
    }
    for (long e = 0; e < width; e += LANES) {
        vec a = {0}, b = {0};
        long j = first;
        for (; j < last; j += 2) {
            a += weights[j] * load(values + j * width + e);
            b += weights[j + 1] * load(values + (j + 1) * width + e);
        }
        if (j == last) a += weights[j] * load(values + j * width + e);
        store(out + e, a + b);
    }
}

/* A prompt's keys [E, S] and values [S, E] as wide as vectors are: where they are not, copies of them. */
static void pad_prompt(const Decoding *d, const Buffers *b, const real **keys, const real **values) {
    long width = d->head_width, wide = padded(width), length = d->longest_prompt, size = padded(length);
    if (size != length) {
        for (long e = 0; e < width; e++) memcpy(b->keys + e * size, *keys + e * length, length * sizeof(real));
        *keys = b->keys;
    }
    if (wide != width) {
        for (long j = 0; j < length; j++) memcpy(b->values + j * wide, *values + j * width, width * sizeof(real));
        *values = b->values;
    }
}

/* What one query of a row reads of its own: scores and weights behind those of the prompt, and their sum of values. */
static void read_own(const Decoding *d, const LayerWeights *layer, const LayerCache *cache, long row, long head,
                     long now, const real *query, real *scores, real *out, real *total) {
    long width = d->head_width, prompt_size = padded(d->longest_prompt), used = padded(now + 1), begin = d->firsts[row];
    long prompt = prompt_size ? d->prompts[row] : 0, from = 0;
    if (layer->window) {
        begin = max_(begin, now + 1 - layer->window);
        from = min_(prompt, max_(0, d->prompts[row] + now - d->starts[row] + 1 - layer->window));
    }
    long place = (row * d->kv_heads + head) * d->columns * width;
    real *own = scores + prompt_size;
    scores_of_one(query, cache->keys + place, d->columns, width, begin / LANES * LANES, used, own);
    mask(scores, 0, from, prompt, prompt_size);
    mask(own, 0, begin, now + 1, used);
    softmax(scores, layer->scaling, 0, prompt_size + used, total);
    weighted_sum_of_one(own, cache->values + place, width, begin, now, out);
}

/* One key-value head of n rows of one prompt, the i-th and on of the live ones. */
static void attend_prompt(const Decoding *d, const LayerWeights *layer, const LayerCache *cache, const Buffers *b,
                          long i, long n, long head, long now) {
    long width = d->head_width, wide = padded(width), repeats = d->heads / d->kv_heads;
    long prompt_size = padded(d->longest_prompt), size = prompt_size + padded(now + 1), num_queries = n * repeats;
    const real *prompt_keys = NULL, *prompt_values = NULL;
    if (prompt_size) {
        long of_prompt = (b->slots[i] / d->slots * d->kv_heads + head) * d->longest_prompt * width;
        prompt_keys = cache->prompt_keys + of_prompt, prompt_values = cache->prompt_values + of_prompt;
        pad_prompt(d, b, &prompt_keys, &prompt_values);
    }
    for (long first = 0; first < num_queries; first += ROWS) {
        long together = min_(ROWS, num_queries - first), at[ROWS];
        real totals[ROWS];
        for (long j = 0; j < ROWS; j++) {
            long query = first + min_(j, together - 1);
            at[j] = ((i + query / repeats) * d->heads + head * repeats + query % repeats) * width;
            memcpy(b->queries + j * wide, b->q + at[j], width * sizeof(real));
        }
        if (prompt_size) scores_of(b->queries, wide, prompt_keys, prompt_size, width, 0, prompt_size, b->scores, size);
        for (long j = 0; j < together; j++)
            read_own(d, layer, cache, b->slots[i + (first + j) / repeats], head, now, b->queries + j * wide,
                     b->scores + j * size, b->attended + at[j], totals + j);
        if (prompt_size) weighted_sum(b->scores, size, prompt_values, wide, 0, d->longest_prompt, b->sums);
        for (long j = 0; j < together; j++) {
            real *out = b->attended + at[j], share_of = 1 / totals[j];
            for (long e = 0; e < width; e++) out[e] = (out[e] + (prompt_size ? b->sums[j * wide + e] : 0)) * share_of;
        }
    }
}

/* The live rows, whose token is at column `now`, through one layer. */
static void run_layer(const Decoding *d, const LayerWeights *layer, const LayerCache *cache, const Buffers *b,
                      long live, long now) {
    long size_q = d->heads * d->head_width, size_k = d->kv_heads * d->head_width;
    rms_norm(b->x, layer->attention_norm, layer->attention_epsilon, b->inner, live, d->width);
    linear(d, b, d->gemm, b->inner, live, d->width, &layer->q, size_q, b->q, 0);
    linear(d, b, d->gemm, b->inner, live, d->width, &layer->k, size_k, b->k, 0);
    linear(d, b, d->gemm, b->inner, live, d->width, &layer->v, size_k, b->v, 0);
    for (long i = 0; i < live; i++) {
        long row = b->slots[i], position = d->prompts[row] + now - d->starts[row];
        rope_heads(d, b->q + i * size_q, d->heads, layer->q_norm, layer->q_epsilon, position, b->rotated);
        rope_heads(d, b->k + i * size_k, d->kv_heads, layer->k_norm, layer->k_epsilon, position, b->rotated);
        cache_row(d, cache, row, now, b->k + i * size_k, b->v + i * size_k);
    }
    for (long i = 0, end; i < live; i = end) {
        for (end = i + 1; end < live && d->longest_prompt && b->slots[end] / d->slots == b->slots[i] / d->slots;) end++;
        for (long h = 0; h < d->kv_heads; h++) attend_prompt(d, layer, cache, b, i, end - i, h, now);
    }
    linear(d, b, d->gemm, b->attended, live, size_q, &layer->o, d->width, b->x, 1);
    rms_norm(b->x, layer->mlp_norm, layer->mlp_epsilon, b->inner, live, d->width);
    linear(d, b, d->gemm, b->inner, live, d->width, &layer->gate, d->mlp_width, b->gate, 0);
    linear(d, b, d->gemm, b->inner, live, d->width, &layer->up, d->mlp_width, b->up, 0);
#pragma omp simd
    for (long i = 0; i < live * d->mlp_width; i++) b->gate[i] = b->gate[i] * sigmoid(b->gate[i]) * b->up[i];
    linear(d, b, d->gemm, b->gate, live, d->mlp_width, &layer->down, d->width, b->x, 1);
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

/* The sum of exp(x) over x = logits - largest at the places from first to last; that of exp(x) * x is added to *weighted. */
static inline real sum_exp(const real *logits, real largest, long first, long last, real *weighted) {
    vec sums = {0}, products = {0};
    long i = first;
    for (; i + LANES <= last; i += LANES) {
        vec x = load(logits + i) - largest, power = exp_vec(x);
        sums += power;
        products += choose((whole_vec)(power > all(0)), power * x, all(0));
    }
    real sum = sum_vec(sums);
    *weighted += sum_vec(products);
    for (; i < last; i++) {
        real x = logits[i] - largest, power = exp_(x);
        sum += power;
        *weighted += power > 0 ? power * x : 0;
    }
    return sum;
}

/* The first place up to which exp(logits - largest) add up to more than a threshold; where rounding leaves none, the last possible. */
static int64_t place_of(const real *logits, long size, real largest, double threshold) {
    double below = 0;
    real unused = 0;
    long first = 0, span = 0, last = 0;
    for (; first < size; first += SPAN) {
        double sum = sum_exp(logits, largest, first, min_(first + SPAN, size), &unused);
        if (sum > 0) span = first;
        if (below + sum > threshold) break;
        below += sum;
    }
    if (first >= size) below = -INFINITY;
    for (long i = span; i < min_(span + SPAN, size); i++) {
        real power = exp_(logits[i] - largest);
        if (power > 0) last = i;
        if ((below += power) > threshold) break;
    }
    return last;
}

/* Draw a token from logits [V], which are divided by the temperature, as `sample_tokens` does. at: where its step's results go. */
static int64_t draw(const Decoding *d, real *logits, long row, long number, long at) {
    long size = d->vocabulary, best = 0;
    real divisor = d->greedy ? 1 : d->temperature, largest, weighted = 0;
    double sum = 0;
    if (divisor != 1)
        for (long i = 0; i < size; i++) logits[i] /= divisor;
    largest = logits[0];
#pragma omp simd reduction(max : largest)
    for (long i = 0; i < size; i++) largest = logits[i] > largest ? logits[i] : largest;
    for (long i = 0; i < size; i += SPAN) sum += sum_exp(logits, largest, i, min_(i + SPAN, size), &weighted);
    if (d->greedy)
        while (best + 1 < size && !(logits[best] == largest)) best++;
    else
        best = place_of(logits, size, largest, uniform(d->keys[row], number) * sum);
    real normaliser = LOG((real)sum);
    d->tokens[at] = best;
    d->logprobs[at] = logits[best] - largest - normaliser;
    d->entropies[at] = normaliser - weighted / (real)sum;
    d->was_live[at] = 1;
    d->ended[at] = 0;
    for (long i = 0; i < d->num_ends; i++) d->ended[at] |= best == d->ends[i];
    return best;
}

/* The next token of each live row, drawn from its logits or given, as its embedding in x. Returns how many rows are still live. */
static long next_tokens(const Decoding *d, const Buffers *b, long live, long step) {
    long kept = 0;
    for (long i = 0; i < live; i++) {
        long row = b->slots[i], number = d->now + step - d->starts[row], at = step * d->rows + row;
        int64_t token = d->draws ? draw(d, b->logits + i * d->vocabulary, row, number, at) : d->tokens[at];
        if (d->draws && (d->ended[at] || number + 1 >= d->max_tokens)) {
            d->live[row] = 0;
            continue;
        }
        memcpy(b->x + kept * d->width, d->embeddings + token * d->width, d->width * sizeof(real));
        b->slots[kept++] = row;
    }
    return kept;
}

/* The slots first .. last, which are one thread's, through all steps. */
static int decode_rows(const Decoding *d, const LayerWeights *layers, const LayerCache *caches, long first, long last) {
    long live = 0, row_size = d->vocabulary * sizeof(real);
    const Linear head = {d->head, d->head_bias};
    Buffers b = make_buffers(d, last - first);
    if (!b.slots) return NO_MEMORY;
    for (long row = first; row < last; row++)
        if (d->live[row]) b.slots[live++] = row;
    for (long i = 0; i < live; i++)
        memcpy(b.logits + i * d->vocabulary, d->logits + b.slots[i] * d->vocabulary, row_size);
    for (long step = 0; step < d->num_steps; step++) {
        if (!(live = next_tokens(d, &b, live, step))) break;
        for (long l = 0; l < d->num_layers; l++) run_layer(d, layers + l, caches + l, &b, live, d->now + step);
        rms_norm(b.x, d->final_norm, d->epsilon, b.inner, live, d->width);
        linear(d, &b, d->head_gemm, b.inner, live, d->width, &head, d->vocabulary, b.logits, 0);
    }
    for (long i = 0; i < live; i++)
        memcpy(d->logits + b.slots[i] * d->vocabulary, b.logits + i * d->vocabulary, row_size);
    free(b.slots);
    return DONE;
}

/* Steps of decoding. In each a row draws its next token from its logits, or takes the one it is given, and if it has not ended the
   token goes through the layers: its keys and values to the step's column, `now` and on, and new logits to the row's. */
int decode(const Decoding *d, const LayerWeights *layers, const LayerCache *caches) {
    long threads = min_(omp_get_max_threads(), (d->rows + 3) / 4);
    int state = DONE;
    if (!rope_fits(d->head_width) || d->now + d->num_steps > d->columns) return NO_ROOM;
    for (long row = 0; row < d->rows; row++) {
        long written = d->now - d->starts[row];
        long more = d->draws ? min_(d->num_steps, d->max_tokens - 1 - written) : d->num_steps;
        if (d->live[row] && d->prompts[row] + written + more > d->positions) return NO_ROOM;
    }
#pragma omp parallel num_threads(threads)
    {
        long first, last = share(d->rows, &first);
        if (first < last && decode_rows(d, layers, caches, first, last) != DONE) {
#pragma omp atomic write
            state = NO_MEMORY;
        }
    }
    return state;
}
