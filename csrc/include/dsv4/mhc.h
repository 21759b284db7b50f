/* Hyper-connections (mHC): the residual connection of DeepSeek-V4 class models. A token has four streams R[j] of
 * `hidden` columns in place of one. Before a sublayer they are collapsed to its input, behind it they are mixed and its
 * output is added. The coefficients of both are computed from the streams:
 *
 *     x    = the streams of a token, one behind the other, [4 * hidden]
 *     m    = (x . fn^T) * rsqrt(mean(x^2) + epsilon)                       [24], products and sums in float32
 *     pre  = sigmoid(m[0:4] * scale[0] + base[0:4]) + hc_epsilon           [4]
 *     post = post_factor * sigmoid(m[4:8] * scale[1] + base[4:8])          [4]
 *     C    = softmax of each row of (m[8:24] * scale[2] + base[8:24]) as [4, 4], row-major, + hc_epsilon
 *     C    = C / (column sums + hc_epsilon)
 *     sinkhorn_iterations - 1 times: C = C / (row sums + hc_epsilon);  C = C / (column sums + hc_epsilon)
 *     u    = bfloat16(sum over j of pre[j] * R[j])                         the collapse
 *     n    = bfloat16(norm_weight * (u * rsqrt(mean(u^2) + epsilon)))      the sublayer's RMSNorm, given its weight
 *     R'[k] = bfloat16(post[k] * y + sum over j of C[j][k] * R[j])         the update with the sublayer's output y
 *
 * The first index of C is the old stream. Models use post_factor 2 and 20 iterations. Every sum has one order, whatever
 * the batch and the device: a token gets the same bits in every batch on one device. NaN and infinity stay in their
 * token. `hidden` is a multiple of 8, up to 8192. fn is multiplied exactly: it is split into bfloat16 terms on the way
 * to the tensor cores, three of which hold a float32. A value of fn below 2^-110 may lose bits. */
#ifndef DSV4_MHC_H
#define DSV4_MHC_H

#include <dsv4/dsv4.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of workspace for hyper_connection_pre, _post_pre, _coefficients and _head, which put partial sums there; at most
 * 8 MiB. It must be zeroed once before its first use; every call leaves it zeroed for the next one on the same stream.
 * Calls that may run at the same time need separate workspaces. */
DSV4_API size_t dsv4_hyper_connection_workspace_size(int64_t tokens, int64_t hidden);

/* Ahead of a sublayer: coefficients of these streams, collapse, norm. With pre_in the streams are collapsed with that
 * in place of their own pre, which is an output in any case: the delayed form of DeepSeek-V4.1, where a sublayer's
 * input is collapsed with the pre of the sublayer before it. */
typedef struct dsv4_hyper_connection_pre_args {
  size_t struct_size;          /* sizeof(dsv4_hyper_connection_pre_args) */
  dsv4_tensor streams;         /* [tokens, 4, hidden] bfloat16; tokens and streams may be strided */
  dsv4_tensor fn;              /* [24, 4 * hidden] float32 */
  dsv4_tensor base;            /* [24] float32 */
  dsv4_tensor scale;           /* [3] float32 */
  dsv4_tensor pre_in;          /* [tokens, 4] float32; may be absent */
  dsv4_tensor norm_weight;     /* [hidden] float32 or bfloat16; absent: no norm, out_layer_input is u */
  dsv4_tensor workspace;       /* [>= dsv4_hyper_connection_workspace_size] uint8, zeroed once */
  dsv4_tensor out_layer_input; /* [tokens, hidden] bfloat16 */
  dsv4_tensor out_pre;         /* [tokens, 4] float32 */
  dsv4_tensor out_post;        /* [tokens, 4] float32 */
  dsv4_tensor out_comb;        /* [tokens, 4, 4] float32: C */
  float epsilon;               /* of the root mean squares, the norm's too */
  float hc_epsilon;            /* above 0 */
  float post_factor;
  int32_t sinkhorn_iterations; /* 1 to 1000 */
  int32_t norm_unrounded;      /* 1: the norm's mean square is that of u before its rounding */
} dsv4_hyper_connection_pre_args;

DSV4_API dsv4_status dsv4_hyper_connection_pre(const dsv4_hyper_connection_pre_args* args, dsv4_stream stream);

/* Behind a sublayer: the update alone. */
typedef struct dsv4_hyper_connection_post_args {
  size_t struct_size;      /* sizeof(dsv4_hyper_connection_post_args) */
  dsv4_tensor x;           /* [tokens, hidden] bfloat16: the sublayer's output; rows may be strided */
  dsv4_tensor streams;     /* [tokens, 4, hidden] bfloat16; tokens and streams may be strided */
  dsv4_tensor post;        /* [tokens, 4] float32 */
  dsv4_tensor comb;        /* [tokens, 4, 4] float32 */
  dsv4_tensor out_streams; /* [tokens, 4, hidden] bfloat16; may be streams itself; tokens and streams may be strided */
} dsv4_hyper_connection_post_args;

DSV4_API dsv4_status dsv4_hyper_connection_post(const dsv4_hyper_connection_post_args* args, dsv4_stream stream);

/* Between two sublayers, reading the streams once: the update with the first one's output, then what
 * hyper_connection_pre does with the new streams as they are rounded. */
typedef struct dsv4_hyper_connection_post_pre_args {
  size_t struct_size;          /* sizeof(dsv4_hyper_connection_post_pre_args) */
  dsv4_tensor x;               /* [tokens, hidden] bfloat16: the first sublayer's output; rows may be strided */
  dsv4_tensor streams;         /* [tokens, 4, hidden] bfloat16; tokens and streams may be strided */
  dsv4_tensor post;            /* [tokens, 4] float32: of the first sublayer */
  dsv4_tensor comb;            /* [tokens, 4, 4] float32: of the first sublayer */
  dsv4_tensor fn;              /* [24, 4 * hidden] float32: of the second sublayer, as all that follows */
  dsv4_tensor base;            /* [24] float32 */
  dsv4_tensor scale;           /* [3] float32 */
  dsv4_tensor pre_in;          /* [tokens, 4] float32; may be absent */
  dsv4_tensor norm_weight;     /* [hidden] float32 or bfloat16; absent: no norm, out_layer_input is u */
  dsv4_tensor workspace;       /* [>= dsv4_hyper_connection_workspace_size] uint8, zeroed once */
  dsv4_tensor out_streams;     /* [tokens, 4, hidden] bfloat16; may be streams itself; may be strided */
  dsv4_tensor out_layer_input; /* [tokens, hidden] bfloat16 */
  dsv4_tensor out_pre;         /* [tokens, 4] float32 */
  dsv4_tensor out_post;        /* [tokens, 4] float32 */
  dsv4_tensor out_comb;        /* [tokens, 4, 4] float32 */
  float epsilon;               /* as in dsv4_hyper_connection_pre_args */
  float hc_epsilon;
  float post_factor;
  int32_t sinkhorn_iterations;
  int32_t norm_unrounded;
} dsv4_hyper_connection_post_pre_args;

DSV4_API dsv4_status dsv4_hyper_connection_post_pre(const dsv4_hyper_connection_post_pre_args* args,
                                                    dsv4_stream stream);

/* The coefficients alone. The delayed form needs them at the end of a sublayer only, so they may be computed beside it,
 * on a stream of their own. */
typedef struct dsv4_hyper_connection_coefficients_args {
  size_t struct_size;    /* sizeof(dsv4_hyper_connection_coefficients_args) */
  dsv4_tensor streams;   /* [tokens, 4, hidden] bfloat16; tokens and streams may be strided */
  dsv4_tensor fn;        /* [24, 4 * hidden] float32 */
  dsv4_tensor base;      /* [24] float32 */
  dsv4_tensor scale;     /* [3] float32 */
  dsv4_tensor workspace; /* [>= dsv4_hyper_connection_workspace_size] uint8, zeroed once */
  dsv4_tensor out_pre;   /* [tokens, 4] float32 */
  dsv4_tensor out_post;  /* [tokens, 4] float32 */
  dsv4_tensor out_comb;  /* [tokens, 4, 4] float32 */
  float epsilon;         /* as in dsv4_hyper_connection_pre_args */
  float hc_epsilon;
  float post_factor;
  int32_t sinkhorn_iterations;
} dsv4_hyper_connection_coefficients_args;

DSV4_API dsv4_status dsv4_hyper_connection_coefficients(const dsv4_hyper_connection_coefficients_args* args,
                                                        dsv4_stream stream);

/* Collapse and norm alone, with a pre that is known. Without one the streams' mean is taken, in float32 and rounded
 * once: the head of GLM-5.3-Flash. */
typedef struct dsv4_hyper_connection_collapse_args {
  size_t struct_size;      /* sizeof(dsv4_hyper_connection_collapse_args) */
  dsv4_tensor streams;     /* [tokens, 4, hidden] bfloat16; tokens and streams may be strided */
  dsv4_tensor pre;         /* [tokens, 4] float32; may be absent */
  dsv4_tensor norm_weight; /* [hidden] float32 or bfloat16; absent: no norm */
  dsv4_tensor out_hidden;  /* [tokens, hidden] bfloat16 */
  float epsilon;           /* of the norm */
  int32_t norm_unrounded;
} dsv4_hyper_connection_collapse_args;

DSV4_API dsv4_status dsv4_hyper_connection_collapse(const dsv4_hyper_connection_collapse_args* args,
                                                    dsv4_stream stream);

/* Behind the last layer of DeepSeek-V4: a projection to pre alone, collapse, norm.
 *     pre = sigmoid((x . fn^T) * rsqrt(mean(x^2) + epsilon) * scale + base) + hc_epsilon */
typedef struct dsv4_hyper_connection_head_args {
  size_t struct_size;      /* sizeof(dsv4_hyper_connection_head_args) */
  dsv4_tensor streams;     /* [tokens, 4, hidden] bfloat16; tokens and streams may be strided */
  dsv4_tensor fn;          /* [4, 4 * hidden] float32 */
  dsv4_tensor base;        /* [4] float32 */
  dsv4_tensor scale;       /* [1] float32 */
  dsv4_tensor norm_weight; /* [hidden] float32 or bfloat16; absent: no norm */
  dsv4_tensor workspace;   /* [>= dsv4_hyper_connection_workspace_size] uint8, zeroed once */
  dsv4_tensor out_hidden;  /* [tokens, hidden] bfloat16 */
  float epsilon;           /* as in dsv4_hyper_connection_pre_args */
  float hc_epsilon;
  int32_t norm_unrounded;
} dsv4_hyper_connection_head_args;

DSV4_API dsv4_status dsv4_hyper_connection_head(const dsv4_hyper_connection_head_args* args, dsv4_stream stream);

#ifdef __cplusplus
}
#endif
#endif
