/* What stands between the products of mixed precision. It is kept in bfloat16 and computed in float32; the residual stream, attention
   and the gradients of weights are float32. */
#include "kernels.h"

#if !DOUBLE

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

/* grad, x, grad_x [T, D]; grad_weight [D]; room [threads, 2 D]. */
int half_rms_norm_backward(const half *grad, const float *x, const float *weight, const float *scale, float *grad_x,
                           float *grad_weight, float *room, long rows, long width) {
    long threads = 1;
#pragma omp parallel if (rows * width > WORTH_THREADS)
    {
        long first, last = share(rows, &first), me = omp_get_thread_num();
#pragma omp single
        threads = omp_get_num_threads();
        float *sums = room + me * width, *wide = room + (threads + me) * width;
        memset(sums, 0, width * sizeof(float));
        for (long t = first; t < last; t++) {
            for (long i = 0; i < width; i++) wide[i] = widen(grad[t * width + i]);
            rms_norm_row_backward(wide, x + t * width, weight, scale[t], grad_x + t * width, sums, width);
        }
    }
    add_up(room, threads, width, grad_weight);
    return DONE;
}

/* gates [T, 2 F], each row a gate and what it lets through -> out [T, F], silu(gate) * up. */
int half_swiglu_forward(const half *gates, half *out, long rows, long width) {
#pragma omp parallel for schedule(static) if (rows * width > WORTH_THREADS)
    for (long t = 0; t < rows; t++) {
        const half *gate = gates + 2 * t * width, *up = gate + width;
        half *to = out + t * width;
#pragma omp simd
        for (long i = 0; i < width; i++) {
            float g = widen(gate[i]);
            to[i] = narrow(g * sigmoid(g) * widen(up[i]));
        }
    }
    return DONE;
}

/* grad [T, F] of the output -> grad_gates [T, 2 F], and the output once more. */
int half_swiglu_backward(const half *grad, const half *gates, half *out, half *grad_gates, long rows, long width) {
#pragma omp parallel for schedule(static) if (rows * width > WORTH_THREADS)
    for (long t = 0; t < rows; t++) {
        const half *gate = gates + 2 * t * width, *up = gate + width, *from = grad + t * width;
        half *to = out + t * width, *grad_gate = grad_gates + 2 * t * width, *grad_up = grad_gate + width;
#pragma omp simd
        for (long i = 0; i < width; i++) {
            float g = widen(gate[i]), u = widen(up[i]), s = sigmoid(g), scaled = widen(from[i]) * s;
            to[i] = narrow(g * s * u);
            grad_up[i] = narrow(scaled * g);
            grad_gate[i] = narrow(scaled * u * (1 + g * (1 - s)));
        }
    }
    return DONE;
}

/* out = x + y, n elements; out may be x. */
int half_add(const float *x, const half *y, float *out, long n) {
#pragma omp parallel for simd schedule(static) if (n > WORTH_THREADS)
    for (long i = 0; i < n; i++) out[i] = x[i] + widen(y[i]);
    return DONE;
}


static inline void widen_row(const half *in, float *out, long n) {
    for (long i = 0; i < n; i++) out[i] = widen(in[i]);
}

/* n heads of a token, each normalised where there is a weight [E], and rotated: in [n, E] -> out [n, E]. */
static inline void turn(const half *in, const float *weight, double epsilon, const float *cosine, const float *sine, float *out, long n,
                        long width) {
    float wide[MOST_WIDTH];
    for (long h = 0; h < n; h++) {
        widen_row(in + h * width, wide, width);
        rope(wide, weight, weight ? inverse_rms(wide, width, epsilon) : 1, cosine, sine, out + h * width, width);
    }
}

static inline void turn_back(const float *grad, const half *in, const float *weight, double epsilon, const float *cosine,
                             const float *sine, half *out, float *sums, long n, long width) {
    float wide[MOST_WIDTH], found[MOST_WIDTH];
    for (long h = 0; h < n; h++) {
        widen_row(in + h * width, wide, width);
        float scale = weight ? inverse_rms(wide, width, epsilon) : 1;
        rope_backward_row(grad + h * width, wide, weight, scale, cosine, sine, found, sums, width);
        for (long e = 0; e < width; e++) out[h * width + e] = narrow(found[e]);
    }
}

/* The queries, keys and values of a product, [T, (H + 2 K) E], with rotary positions, cosine and sine [T, E] -> q [T, H, E], k and v
   [T, K, E]. Heads are normalised where there are weights [E]. */
int half_turn_forward(const half *all, const float *q_weight, const float *k_weight, double q_epsilon, double k_epsilon,
                      const float *cosine, const float *sine, float *q, float *k, float *v, long tokens, long heads, long kv_heads,
                      long width) {
    if (!rope_fits(width)) return NO_ROOM;
    long asking = heads * width, read = kv_heads * width;
#pragma omp parallel for schedule(static) if (tokens * asking > WORTH_THREADS)
    for (long t = 0; t < tokens; t++) {
        const half *in = all + t * (asking + 2 * read);
        const float *cos = cosine + t * width, *sin = sine + t * width;
        turn(in, q_weight, q_epsilon, cos, sin, q + t * asking, heads, width);
        turn(in + asking, k_weight, k_epsilon, cos, sin, k + t * read, kv_heads, width);
        widen_row(in + asking + read, v + t * read, read);
    }
    return DONE;
}

/* grad_all [T, (H + 2 K) E]; the gradients of the weights [E], where there are any; room [threads, 2 E]. */
int half_turn_backward(const float *grad_q, const float *grad_k, const float *grad_v, const half *all, const float *q_weight,
                       const float *k_weight, double q_epsilon, double k_epsilon, const float *cosine, const float *sine,
                       half *grad_all, float *grad_q_weight, float *grad_k_weight, float *room, long tokens, long heads,
                       long kv_heads, long width) {
    if (!rope_fits(width)) return NO_ROOM;
    long asking = heads * width, read = kv_heads * width, threads = 1;
#pragma omp parallel if (tokens * asking > WORTH_THREADS)
    {
        long first, last = share(tokens, &first), me = omp_get_thread_num();
#pragma omp single
        threads = omp_get_num_threads();
        float *q_sums = room + me * width, *k_sums = room + (threads + me) * width;
        memset(q_sums, 0, width * sizeof(float));
        memset(k_sums, 0, width * sizeof(float));
        for (long t = first; t < last; t++) {
            long at = t * (asking + 2 * read);
            const float *cos = cosine + t * width, *sin = sine + t * width, *values = grad_v + t * read;
            turn_back(grad_q + t * asking, all + at, q_weight, q_epsilon, cos, sin, grad_all + at, q_sums, heads, width);
            at += asking;
            turn_back(grad_k + t * read, all + at, k_weight, k_epsilon, cos, sin, grad_all + at, k_sums, kv_heads, width);
            at += read;
            for (long i = 0; i < read; i++) grad_all[at + i] = narrow(values[i]);
        }
    }
    if (q_weight) add_up(room, threads, width, grad_q_weight);
    if (k_weight) add_up(room + threads * width, threads, width, grad_k_weight);
    return DONE;
}

/* in [rows, columns] -> out [columns, rows]. */
int half_transpose(const half *in, half *out, long rows, long columns) {
    enum { SIDE = 32 };
#pragma omp parallel for schedule(static) if (rows * columns > WORTH_THREADS)
    for (long c = 0; c < columns; c += SIDE)
        for (long r = 0; r < rows; r += SIDE)
            for (long i = c; i < min_(c + SIDE, columns); i++)
                for (long j = r; j < min_(r + SIDE, rows); j++) out[i * rows + j] = in[j * columns + i];
    return DONE;
}
#endif
