/* Router ops: which experts each token goes to, and with which weight.
 *
 * Extreme logits, in every op that weighs experts; no weight is ever NaN. A logit that is NaN is chosen last and weighs
 * nothing; one of -infinity weighs nothing. One of +infinity takes the whole weight; several share it. Where all chosen
 * scores are tiny, weights are those of exact arithmetic (equal logits have equal weights), unless epsilon is above 0.
 * Where nothing weighs, weights are 0. Without renormalize an infinite logit has an infinite weight. */
#ifndef DSV4_ROUTER_H
#define DSV4_ROUTER_H

#include <dsv4/dsv4.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Hash routing with uniform weights: the experts of a token are a row of a table, each with weight 1/k.
 * A token id outside [0, vocab), and a token that padding_mask marks, get ids -1 and weights 0; so does the slot of a
 * table entry that is negative or does not fit in int32. */
typedef struct dsv4_hash_router_args {
  size_t struct_size;       /* sizeof(dsv4_hash_router_args) */
  dsv4_tensor token_ids;    /* [tokens] int32 or int64, at any distance that is not negative */
  dsv4_tensor hash_lut;     /* [vocab, k] int32 or int64, k <= 32 */
  dsv4_tensor padding_mask; /* [tokens] bool, true = padding; may be absent */
  dsv4_tensor out_weights;  /* [tokens, k] float32 */
  dsv4_tensor out_ids;      /* [tokens, k] int32 or int64 */
} dsv4_hash_router_args;

DSV4_API dsv4_status dsv4_hash_router(const dsv4_hash_router_args* args, dsv4_stream stream);

/* Hash routing as the DeepSeek-V4 models do it: experts from the table, weights from the gate's logits.
 *     s = sqrt(softplus(logits[token, id])),  weight = scale * s / (sum of the row's s + epsilon)
 * The division only if renormalize. Extreme logits: see above. Table entries outside [0, experts) get id -1 and weight
 * 0 and take no part in the sum. Token ids out of range, padding: as hash_router.
 * A token that bias_alt_mask marks, such as one of an image, has no row in the table: its experts are the k largest of
 * s + bias_alt in descending order, ties to the lower id, NaN lowest, whatever its token id. */
typedef struct dsv4_hash_router_scored_args {
  size_t struct_size;        /* sizeof(dsv4_hash_router_scored_args) */
  dsv4_tensor token_ids;     /* [tokens] int32 or int64, at any distance that is not negative */
  dsv4_tensor hash_lut;      /* [vocab, k] int32 or int64, k <= 32 */
  dsv4_tensor logits;        /* [tokens, experts] float32 or bfloat16; rows may be strided */
  dsv4_tensor padding_mask;  /* [tokens] bool; may be absent */
  dsv4_tensor out_weights;   /* [tokens, k] float32 */
  dsv4_tensor out_ids;       /* [tokens, k] int32 or int64 */
  int32_t renormalize;       /* 0 or 1 */
  float scale;               /* the model's routed scaling factor */
  float epsilon;             /* added to the sum; the models use 0, some engines 1e-20 */
  dsv4_tensor bias_alt;      /* [experts <= 1024] float32; may be absent, together with bias_alt_mask */
  dsv4_tensor bias_alt_mask; /* [tokens] bool */
} dsv4_hash_router_scored_args;

DSV4_API dsv4_status dsv4_hash_router_scored(const dsv4_hash_router_scored_args* args, dsv4_stream stream);

/* hash_router_scored from hidden states and gate, in one launch: only the k logits of each token that its weights need
 * are computed, so a small batch reads k rows of the gate per token rather than all of it.
 *     logit = hidden[token] . weight[id] in float32, summed in an order that is the same in every batch
 * Everything else, also what is out of range, as hash_router_scored with `experts` the rows of weight. */
typedef struct dsv4_hash_router_fused_args {
  size_t struct_size;       /* sizeof(dsv4_hash_router_fused_args) */
  dsv4_tensor token_ids;    /* [tokens] int32 or int64, at any distance that is not negative */
  dsv4_tensor hash_lut;     /* [vocab, k] int32 or int64, k <= 32 */
  dsv4_tensor hidden;       /* [tokens, hidden_size] bfloat16, hidden_size a multiple of 8; rows may be strided */
  dsv4_tensor weight;       /* [experts, hidden_size] bfloat16; rows may be strided */
  dsv4_tensor padding_mask; /* [tokens] bool; may be absent */
  dsv4_tensor out_weights;  /* [tokens, k] float32 */
  dsv4_tensor out_ids;      /* [tokens, k] int32 or int64 */
  int32_t renormalize;      /* 0 or 1 */
  float scale;              /* the model's routed scaling factor */
  float epsilon;            /* added to the sum; the models use 0, some engines 1e-20 */
} dsv4_hash_router_fused_args;

DSV4_API dsv4_status dsv4_hash_router_fused(const dsv4_hash_router_fused_args* args, dsv4_stream stream);

/* Bytes of gate rows that a batch may read (tokens * top_k * hidden_size * 2) for dsv4_hash_router_fused to be faster
 * than a product of all experts followed by dsv4_hash_router_scored. */
DSV4_API int64_t dsv4_hash_router_fused_max_bytes(void);

/* Dense routing of a small batch in one launch: gate GEMM, activation, selection.
 *     logits = hidden . weight^T in float32,  s = sqrt(softplus(logits))
 *     ids = the k largest of s + bias in descending order, ties to the lower id, NaN lowest
 *     weight = scale * s[id] / (sum of the chosen s + epsilon)
 * A token that bias_alt_mask marks is selected by bias_alt instead of bias. The division only if renormalize. Extreme
 * logits: see above. The workspace must be zeroed once before its first use;
 * every call leaves it ready for the next one on the same stream. Calls that may run at the same
 * time need separate workspaces. */
typedef struct dsv4_dense_router_decode_args {
  size_t struct_size;      /* sizeof(dsv4_dense_router_decode_args) */
  dsv4_tensor hidden;      /* [tokens <= 64, hidden_size] bfloat16, hidden_size a multiple of 64; rows may be strided */
  dsv4_tensor weight;      /* [experts, hidden_size] bfloat16, experts <= 512; rows may be strided */
  dsv4_tensor bias;        /* [experts] float32, used for selection only; may be absent */
  dsv4_tensor workspace;   /* [>= dsv4_dense_router_decode_workspace_size] uint8, zeroed once */
  dsv4_tensor out_weights; /* [tokens, k] float32 */
  dsv4_tensor out_ids;     /* [tokens, k] int32 or int64 */
  int32_t top_k;           /* 1 to 32, at most experts */
  int32_t renormalize;     /* 0 or 1 */
  float scale;
  float epsilon;
  dsv4_tensor bias_alt;      /* [experts] float32; may be absent, together with bias_alt_mask */
  dsv4_tensor bias_alt_mask; /* [tokens] bool */
} dsv4_dense_router_decode_args;

/* Bytes of workspace for a batch of that shape; 0 for one that the op refuses. */
DSV4_API size_t dsv4_dense_router_decode_workspace_size(int64_t tokens, int64_t experts);

DSV4_API dsv4_status dsv4_dense_router_decode(const dsv4_dense_router_decode_args* args, dsv4_stream stream);

/* How a gate scores an expert from its logit. Softmax: over the experts of the token whose logit is not NaN. */
typedef enum dsv4_score_function {
  DSV4_SQRT_SOFTPLUS = 0, /* sqrt(log(1 + e^logit)): DeepSeek-V4 */
  DSV4_SIGMOID = 1,
  DSV4_SOFTMAX = 2
} dsv4_score_function;

/* Dense routing from the gate's logits: activation, selection, weights.
 *     s = score_function(logits)
 *     ids = the k largest of s + bias in descending order, ties to the lower id, NaN lowest
 *     weight = scale * s[id] / (sum of the chosen s + epsilon)
 * The division only if renormalize. Extreme logits: see above; ids are valid and different in any case. A token that
 * padding_mask marks gets ids -1 and weights 0. A token that bias_alt_mask marks is selected by
 * bias_alt instead of bias. */
typedef struct dsv4_activation_topk_args {
  size_t struct_size;        /* sizeof(dsv4_activation_topk_args) */
  dsv4_tensor logits;        /* [tokens, experts] float32 or bfloat16, experts <= 1024; rows may be strided */
  dsv4_tensor bias;          /* [experts] float32, used for selection only; may be absent */
  dsv4_tensor padding_mask;  /* [tokens] bool, true = padding; may be absent */
  dsv4_tensor bias_alt;      /* [experts] float32; may be absent, together with bias_alt_mask */
  dsv4_tensor bias_alt_mask; /* [tokens] bool */
  dsv4_tensor out_weights;   /* [tokens, k] float32 */
  dsv4_tensor out_ids;       /* [tokens, k] int32 or int64 */
  int32_t top_k;             /* 1 to 32, at most experts */
  int32_t score_function;    /* a dsv4_score_function */
  int32_t renormalize;       /* 0 or 1 */
  float scale;
  float epsilon;
} dsv4_activation_topk_args;

DSV4_API dsv4_status dsv4_activation_topk(const dsv4_activation_topk_args* args, dsv4_stream stream);

/* The k largest of each row, exactly: equal values (-0 equals +0) go to the lower column, NaN is lower than any number.
 * lengths: how many leading columns of a row count; below 0 it is 0, above the columns all of them. A row with fewer
 * than k ends in ids -1 and values -infinity. */
typedef struct dsv4_topk_select_args {
  size_t struct_size;     /* sizeof(dsv4_topk_select_args) */
  dsv4_tensor scores;     /* [rows, columns] float32 or bfloat16, columns <= 1048576; rows may be strided */
  dsv4_tensor lengths;    /* [rows] int32; may be absent */
  dsv4_tensor out_values; /* [rows, k] float32, with the bits of the scores; may be absent */
  dsv4_tensor out_ids;    /* [rows, k] int32 */
  int32_t top_k;          /* 1 to 2048; may exceed the columns */
  int32_t sorted;         /* 1: descending, equal values by column; 0: by column */
} dsv4_topk_select_args;

DSV4_API dsv4_status dsv4_topk_select(const dsv4_topk_select_args* args, dsv4_stream stream);

#ifdef __cplusplus
}
#endif
#endif
