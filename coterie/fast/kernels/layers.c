/* Norms, rotary positions and gates, forward and backward. In tensor operations each of these is several passes over memory and, on
   small batches, more calls than arithmetic. */
#include "kernels.h"

long max_threads(void) { return omp_get_max_threads(); }

/* RMS norm: x [T, D], weight [D] -> out [T, D], and scale [T], what each row was multiplied with. */
int rms_norm_forward(const real *x, const real *weight, double epsilon, real *out, real *scale, long rows, long width) {
#pragma omp parallel for schedule(static) if (rows * width > WORTH_THREADS)
    for (long t = 0; t < rows; t++) scale[t] = rms_norm_row(x + t * width, weight, epsilon, out + t * width, width);
    return DONE;
}

/* grad, x, grad_x [T, D]; grad_weight [D]; room [threads, D]. */
int rms_norm_backward(const real *grad, const real *x, const real *weight, const real *scale, real *grad_x,
                      real *grad_weight, real *room, long rows, long width) {
    long threads = 1;
#pragma omp parallel if (rows * width > WORTH_THREADS)
    {
        long first, last = share(rows, &first);
        real *sums = room + omp_get_thread_num() * width;
        memset(sums, 0, width * sizeof(real));
#pragma omp single
        threads = omp_get_num_threads();
        for (long t = first; t < last; t++)
            rms_norm_row_backward(grad + t * width, x + t * width, weight, scale[t], grad_x + t * width, sums, width);
    }
    add_up(room, threads, width, grad_weight);
    return DONE;
}

/* A head's norm, where there is a weight [E], and rotary positions: x [T, H, E], cosine and sine [T, E] -> out [T, H, E], and
   scale [T, H], what each head was multiplied with. */
int rope_forward(const real *x, const real *weight, double epsilon, const real *cosine, const real *sine, real *out,
                 real *scale, long tokens, long heads, long width) {
    if (!rope_fits(width)) return NO_ROOM;
#pragma omp parallel for schedule(static) if (tokens * heads * width > WORTH_THREADS)
    for (long t = 0; t < tokens; t++)
        for (long h = 0; h < heads; h++) {
            const real *in = x + (t * heads + h) * width;
            real s = weight ? inverse_rms(in, width, epsilon) : 1;
            if (weight) scale[t * heads + h] = s;
            rope(in, weight, s, cosine + t * width, sine + t * width, out + (t * heads + h) * width, width);
        }
    return DONE;
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
        for (long head = first * heads; head < last * heads; head++) {
            long at = head * width, angle = head / heads * width;
            rope_backward_row(grad + at, x + at, weight, weight ? scale[head] : 1, cosine + angle, sine + angle, grad_x + at, sums,
                              width);
        }
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
