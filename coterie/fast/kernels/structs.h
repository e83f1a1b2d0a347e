/* What is handed over from Python. structs.py reads the fields from here: `long` and `double` by value, all else an address. */
#include <stdint.h>

#if DOUBLE
typedef double real;
#else
typedef float real;
#endif

/* BLAS's product, in Fortran's words. */
typedef void Gemm(const char *, const char *, const int *, const int *, const int *, const real *, const real *,
                  const int *, const real *, const int *, const real *, real *, const int *, size_t, size_t);

typedef struct {
    long tokens, num_groups, heads, kv_heads, width, window, longest;
    double scaling;
    const int64_t *starts;  /* [P] where a group begins in the stream */
    const int64_t *prompts; /* [P] tokens of its prompt */
    const int64_t *rows;    /* [P + 1] which of `lengths` are its completions' */
    const int64_t *lengths; /* [B] tokens of each completion */
} Attention;

typedef struct {
    const real *weight, *bias; /* [out, in]; [out] or none */
    const real *a, *b;         /* LoRA's matrices beside it, [rank, in] and [out, rank], or none */
} Linear;

typedef struct {
    const real *attention_norm, *mlp_norm, *q_norm, *k_norm; /* weights; those of heads may be none */
    Linear q, k, v, o, gate, up, down;
    double attention_epsilon, mlp_epsilon, q_epsilon, k_epsilon, scaling;
    long window;
} LayerWeights;

typedef struct {
    real *keys, *values;                     /* [R, K, E, C] and [R, K, C, E], C a multiple of LANES */
    const real *prompt_keys, *prompt_values; /* [P, K, E, S] and [P, K, S, E], or none */
} LayerCache;

typedef struct {
    long num_layers, rows, width, heads, kv_heads, head_width, mlp_width, vocabulary, positions, rank;
    long columns, now, slots, longest_prompt, num_steps, max_tokens, num_ends, draws, greedy;
    double epsilon, temperature, lora_scaling;
    const real *embeddings, *final_norm, *head, *head_bias; /* [V, D], [D], [V, D], [V] or none */
    const real *cosine, *sine;                              /* [positions, E] */
    const int64_t *firsts, *starts, *prompts, *keys;        /* [R] as the grid has them; what seeds a row's noise */
    const int64_t *ends;
    uint8_t *live;   /* [R] */
    real *logits;    /* [R, V] */
    int64_t *tokens; /* [steps, R], as all that follows */
    real *logprobs, *entropies;
    uint8_t *was_live, *ended;
    Gemm *gemm, *head_gemm;
} Decoding;
