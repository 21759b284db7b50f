/* Mixture-of-experts ops: activations, number formats, grouped GEMM. */
#ifndef DSV4_MOE_H
#define DSV4_MOE_H

#include <dsv4/dsv4.h>

#ifdef __cplusplus
extern "C" {
#endif

/* out[row] = bfloat16(max(x[row], 0)^2), squared in float32, for each row < n_used with permutation_map[row] >= 0.
 * Other rows of out are not written. n_used is read on the device, so a captured graph follows it; values outside
 * [0, rows] act as the nearest end. NaN stays NaN. */
typedef struct dsv4_padded_squared_relu_args {
  size_t struct_size;          /* sizeof(dsv4_padded_squared_relu_args) */
  dsv4_tensor x;               /* [rows, columns] bfloat16; rows may be strided */
  dsv4_tensor permutation_map; /* [rows] int32, negative = padding */
  dsv4_tensor n_used;          /* one int32, rank 0 or 1 */
  dsv4_tensor out;             /* [rows, columns] bfloat16; rows may be strided; may be x itself */
} dsv4_padded_squared_relu_args;

DSV4_API dsv4_status dsv4_padded_squared_relu(const dsv4_padded_squared_relu_args* args, dsv4_stream stream);

/* out[row] = bfloat16(silu(min(gate, limit)) * clamp(up, -limit, limit)) in float32, gate being the first half of
 * x[row] and up the second, for the rows that dsv4_padded_squared_relu would process. NaN stays NaN; a gate of -inf
 * gives NaN. */
typedef struct dsv4_padded_swiglu_args {
  size_t struct_size;          /* sizeof(dsv4_padded_swiglu_args) */
  dsv4_tensor x;               /* [rows, 2 * columns] bfloat16; rows may be strided */
  dsv4_tensor permutation_map; /* [rows] int32, negative = padding */
  dsv4_tensor n_used;          /* one int32, rank 0 or 1 */
  float limit;                 /* 0 (no clamp) or more, finite */
  dsv4_tensor out;             /* [rows, columns] bfloat16; rows may be strided */
} dsv4_padded_swiglu_args;

DSV4_API dsv4_status dsv4_padded_swiglu(const dsv4_padded_swiglu_args* args, dsv4_stream stream);

/* MXFP8 of what dsv4_padded_squared_relu computes, its rounding to bfloat16 included. Of 32 neighbouring columns:
 *
 *     scale = the least power of two >= amax / 448, as E8M0; 0 gives byte 0, a quotient in (0, 2^-126] byte 1
 *     code = e4m3(value / scale), to nearest
 *
 * out_data is not written in rows that are not processed. out_scale is written whole, in the layout of
 * dsv4_blackwell_swizzle_32_4_4: it is 0 in those rows and in its padding. A group that holds a NaN or an infinity
 * has scale 255, which is NaN, and codes of NaN. */
typedef struct dsv4_squared_relu_and_quantize_mxfp8_args {
  size_t struct_size;          /* sizeof(dsv4_squared_relu_and_quantize_mxfp8_args) */
  dsv4_tensor x;               /* [rows, columns] bfloat16, columns a multiple of 32; rows may be strided */
  dsv4_tensor permutation_map; /* [rows] int32, negative = padding */
  dsv4_tensor n_used;          /* one int32, rank 0 or 1 */
  dsv4_tensor out_data;        /* [rows, columns] float8_e4m3fn or uint8, on a multiple of 16 bytes */
  dsv4_tensor out_scale;       /* [rows to 128, columns / 32 to 4] float8_e8m0fnu or uint8, on a multiple of 16 bytes */
} dsv4_squared_relu_and_quantize_mxfp8_args;

DSV4_API dsv4_status dsv4_squared_relu_and_quantize_mxfp8(const dsv4_squared_relu_and_quantize_mxfp8_args* args,
                                                          dsv4_stream stream);

/* The same of what dsv4_padded_swiglu computes. */
typedef struct dsv4_swiglu_and_quantize_mxfp8_args {
  size_t struct_size;          /* sizeof(dsv4_swiglu_and_quantize_mxfp8_args) */
  dsv4_tensor x;               /* [rows, 2 * columns] bfloat16, columns a multiple of 32; rows may be strided */
  dsv4_tensor permutation_map; /* [rows] int32, negative = padding */
  dsv4_tensor n_used;          /* one int32, rank 0 or 1 */
  float limit;                 /* 0 (no clamp) or more, finite */
  dsv4_tensor out_data;        /* [rows, columns] float8_e4m3fn or uint8, on a multiple of 16 bytes */
  dsv4_tensor out_scale;       /* [rows to 128, columns / 32 to 4] float8_e8m0fnu or uint8, on a multiple of 16 bytes */
} dsv4_swiglu_and_quantize_mxfp8_args;

DSV4_API dsv4_status dsv4_swiglu_and_quantize_mxfp8(const dsv4_swiglu_and_quantize_mxfp8_args* args,
                                                    dsv4_stream stream);

/* Where each routed slot (token, k) goes when slots are grouped by expert: rows in tiles of tile_size, each tile of one
 * expert, experts in order, the slots of an expert in their own order. Slot s is element s of topk_ids. An id that is
 * negative or not one of the local_experts from experts_start_idx on takes no row. With expert_map, id i is the local
 * expert expert_map[i] instead; ids outside the map, and those that it sends outside of [0, local_experts), take no row.
 * One launch for any batch.
 *
 * With X slots and L experts, tiles = dsv4_moe_sort_max_tiles(X, L, T) are enough for any routing. */
typedef struct dsv4_moe_sort_args {
  size_t struct_size;             /* sizeof(dsv4_moe_sort_args) */
  dsv4_tensor topk_ids;           /* [tokens, top_k <= 32] int32 or int64, at most 2^30 elements; rows may be strided */
  dsv4_tensor out_tile_to_expert; /* [tiles] int32: local expert, -1 for tiles that are not used, which come last */
  dsv4_tensor out_tile_rows;      /* [tiles] int32: rows of the tile that hold a slot, the first ones; 0 if unused */
  dsv4_tensor out_row_to_slot;    /* [tiles * tile_size] int32: -1 for the padding of a used tile; rows of unused tiles
                                     are not written */
  dsv4_tensor out_slot_to_row;    /* [tokens, top_k] int32, -1 for slots that take no row */
  dsv4_tensor out_counts;         /* [2] int32: tiles used, slots that take a row */
  int32_t local_experts;          /* 1 to 1024 */
  int32_t tile_size;              /* 16, 32, 64 or 128 */
  int32_t experts_start_idx;      /* the id of local expert 0; 0 with expert_map */
  dsv4_tensor expert_map;         /* optional [ids] int32: the local expert of each id, -1 for those elsewhere */
} dsv4_moe_sort_args;

DSV4_API dsv4_status dsv4_moe_sort(const dsv4_moe_sort_args* args, dsv4_stream stream);

/* The most tiles that any routing of so many slots can use: slots if they are no more than the experts, else
 * floor((slots + (tile_size - 1) * local_experts) / tile_size). */
DSV4_API int64_t dsv4_moe_sort_max_tiles(int64_t slots, int64_t local_experts, int64_t tile_size);

/* Tiles of rows that lie by expert already, max_rows for each of which the first counts[e] are used: row i of expert e
 * is row e * max_rows + i, in products as in their results. A count below 0 acts as 0, one above max_rows as max_rows. */
typedef struct dsv4_moe_tiles_from_counts_args {
  size_t struct_size;             /* sizeof(dsv4_moe_tiles_from_counts_args) */
  dsv4_tensor counts;             /* [experts] int32 or int64; experts * max_rows at most 2^30 */
  dsv4_tensor out_tile_to_expert; /* [experts * max_rows / tile_size] int32: the expert, -1 for tiles without a row */
  dsv4_tensor out_row_to_slot;    /* [experts * max_rows] int32: the row itself, -1 for rows that are not used */
  int32_t max_rows;               /* a multiple of tile_size */
  int32_t tile_size;              /* 16, 32, 64 or 128 */
} dsv4_moe_tiles_from_counts_args;

DSV4_API dsv4_status dsv4_moe_tiles_from_counts(const dsv4_moe_tiles_from_counts_args* args, dsv4_stream stream);

/* Gives the slots of each rank the rows of a message to it, in the order of the slots: place rank * capacity + i for the
 * i-th slot whose id is that rank's. With one_per_rank only a token's first slot for a rank takes a place. Slots for
 * which no place is left, the last ones, are added to dropped. One launch for any batch. */
typedef struct dsv4_moe_dispatch_places_args {
  size_t struct_size;            /* sizeof(dsv4_moe_dispatch_places_args) */
  dsv4_tensor topk_ids;          /* [tokens, top_k] int32 or int64, at most 2^30 elements; top_k <= 32 */
  dsv4_tensor rank_of_id;        /* [ids] int32: ids outside, and ranks outside [0, ranks), go nowhere */
  dsv4_tensor dropped;           /* [1] int64, added to */
  dsv4_tensor out_slot_to_place; /* [tokens, top_k] int32, -1 for slots without a place */
  dsv4_tensor out_place_to_slot; /* [ranks * capacity] int32, -1 for places that are not used */
  int32_t ranks;                 /* 1 to 65535 */
  int32_t capacity;              /* places for each rank; ranks * capacity at most 2^30 */
  int32_t one_per_rank;          /* 0 or 1 */
} dsv4_moe_dispatch_places_args;

DSV4_API dsv4_status dsv4_moe_dispatch_places(const dsv4_moe_dispatch_places_args* args, dsv4_stream stream);

/* The rows of messages. A row holds, each part from a multiple of 16 bytes on and filled up with zeros: the token's row
 * of x, its scales, int32 ids and float32 weights of its routes. routes top_k: all of its token's, with id -1 for those
 * of other ranks; routes 1: its slot's. A place without a slot gets ids -1 and nothing else. */
typedef struct dsv4_moe_dispatch_rows_args {
  size_t struct_size;       /* sizeof(dsv4_moe_dispatch_rows_args) */
  dsv4_tensor x;            /* [tokens, bytes] uint8, bytes a multiple of 16; rows may be strided, on multiples of 16 */
  dsv4_tensor scale;        /* optional [tokens, bytes] uint8 */
  dsv4_tensor topk_weights; /* [tokens, top_k] float32 */
  dsv4_tensor topk_ids;     /* [tokens, top_k] int32 or int64; top_k <= 32 */
  dsv4_tensor rank_of_id;   /* [ids] int32, as in dsv4_moe_dispatch_places_args */
  dsv4_tensor place_to_slot; /* [places] int32, of dsv4_moe_dispatch_places; slots out of range act as -1 */
  dsv4_tensor out;           /* [places, row bytes] uint8, on a multiple of 16 bytes */
  int32_t capacity;          /* places for each rank, at least 1 */
  int32_t routes;            /* top_k or 1 */
} dsv4_moe_dispatch_rows_args;

DSV4_API dsv4_status dsv4_moe_dispatch_rows(const dsv4_moe_dispatch_rows_args* args, dsv4_stream stream);

/* The average number of slots per expert up to which tiles of so many rows are the fastest for the grouped products:
 * a number for 16 and for 64, INT64_MAX for 128, 0 for other sizes. */
DSV4_API int64_t dsv4_moe_tile_max_slots_per_expert(int32_t tile_size);

/* out[r] = f(x[source(r)] . weight[e]^T * alpha[e]) * slot_weights[slot] for each row r of a tile of expert e =
 * tile_to_expert[r / T] with slot = row_to_slot[r], T = rows / tiles: one of 16, 64, 128. Products and sums in float32.
 * source(r) = slot / top_k, or r itself with top_k 0. f is nothing, or with swiglu
 *     gate = min(first half, limit), up = clamp(second half, -limit, limit), silu(gate) * up.
 * Not written: rows whose slot is negative or whose source is beyond x, and tiles whose expert is out of range.
 *
 * x and weight: bfloat16 with FP4 weights of either kind; NVFP4 with NVFP4; MXFP8 with MXFP4 (no tiles of 64 rows).
 *     MXFP4: E2M1 codes with an E8M0 scale per 32
 *     NVFP4: E2M1 codes with an E4M3 scale per 16; per-tensor scales go into alpha, each once
 *     MXFP8: E4M3 codes with an E8M0 scale per 32
 * The dtype of weight_scale selects the format of the weights. Rows start on multiples of 16 bytes.
 *
 * Weights of rank 4 are interleaved (bfloat16 x only), about twice as fast. K is that of x, a multiple of the scales'
 * group; the last block of 128 inner positions may be padding in part, which is not multiplied. Word
 * 4 w + 2 g + h of row n in block b holds the codes of inner positions 128 b + 64 h + 32 g + 8 p + 2 w + c, p = 0 to 3,
 * c = 0, 1. The bits of the sign, the exponent (high, low) and the mantissa of code (p, c) are, for c = 0 and c = 1,
 *     p = 0: 15 8 7 6, 31 24 23 22      p = 1: 18 11 10 9, 2 27 26 25
 *     p = 2: 21 14 13 12, 5 30 29 28    p = 3: 1 0 4 3, 17 16 20 19
 * Scales are bfloat16, times 2^118, two per word: low half for h = 0, high half for h = 1. MXFP4 has a word for each
 * g; NVFP4 two, for p below 2 and from 2 on. With swiglu, 8 gate rows are followed by the same 8 up rows. */
typedef struct dsv4_moe_grouped_gemm_args {
  size_t struct_size;         /* sizeof(dsv4_moe_grouped_gemm_args) */
  dsv4_tensor x;              /* [x_rows, K] bfloat16 or float8_e4m3fn, or [x_rows, K / 2] packed FP4; may be strided */
  dsv4_tensor weight;         /* [experts, N, K / 2] packed FP4 (uint8 or float4_e2m1fn_x2, low nibble first); with
                                 swiglu [experts, 2 N, K / 2], gate rows before up rows. K a multiple of 32, N
                                 one of 16. Interleaved: [experts, ceil(K / 128), N or 2 N, 16] int32 */
  dsv4_tensor weight_scale;   /* [experts, N or 2 N, K / 16] float8_e4m3fn, or [.., K / 32] uint8 or float8_e8m0fnu;
                                 interleaved: [experts, ceil(K / 128), N or 2 N, 4 (NVFP4) or 2 (MXFP4)] int32 */
  dsv4_tensor tile_to_expert; /* [tiles] int32, of dsv4_moe_sort */
  dsv4_tensor row_to_slot;    /* [tiles * T] int32, of dsv4_moe_sort */
  dsv4_tensor x_scale;        /* of quantised x: [x_rows, K / 16] float8_e4m3fn, or [x_rows, K / 32] uint8 or
                                 float8_e8m0fnu; row after row, not swizzled */
  dsv4_tensor alpha;          /* optional [experts] float32; with swiglu also [experts, 2]: gate, up */
  dsv4_tensor slot_weights;   /* optional [x_rows, top_k] float32 */
  dsv4_tensor out;            /* [tiles * T, N] bfloat16; rows may be strided */
  int32_t top_k;              /* 0 to 32 */
  int32_t swiglu;             /* 0 or 1 */
  float limit;                /* of swiglu, finite; 0: none */
} dsv4_moe_grouped_gemm_args;

DSV4_API dsv4_status dsv4_moe_grouped_gemm(const dsv4_moe_grouped_gemm_args* args, dsv4_stream stream);

/* dsv4_moe_grouped_gemm of quantised x with swiglu, its results quantised in turn, as x is: NVFP4 of NVFP4, MXFP8 of
 * MXFP8. To the bit what dsv4_quantize_nvfp4 (ties to even, no floor) and dsv4_quantize_mx (E4M3, round_scale_up, no
 * floor) make of the bfloat16 that dsv4_moe_grouped_gemm would give; the second product reads it with top_k 0.
 *
 * Codes of rows that dsv4_moe_grouped_gemm does not write are not written. Their scales: one row after another, not
 * written either; with swizzle 0, as is all padding, so that all of out_scale is written. */
typedef struct dsv4_moe_grouped_gemm_quantized_args {
  size_t struct_size; /* sizeof(dsv4_moe_grouped_gemm_quantized_args) */
  dsv4_tensor x;      /* [x_rows, K / 2] packed FP4 or [x_rows, K] float8_e4m3fn; rows may be strided */
  dsv4_tensor weight; /* [experts, 2 N, K / 2], and up to slot_weights as in dsv4_moe_grouped_gemm_args with
                         swiglu, but not interleaved, and N a multiple of 32 */
  dsv4_tensor weight_scale;
  dsv4_tensor tile_to_expert; /* [tiles] int32 */
  dsv4_tensor row_to_slot;    /* [tiles * T] int32 */
  dsv4_tensor x_scale;
  dsv4_tensor global_scale; /* of NVFP4 results: one float32, rank 0 or 1, amax / (448 * 6), finite and above 0; else
                               absent */
  dsv4_tensor alpha;        /* optional */
  dsv4_tensor slot_weights; /* optional; rows are multiplied by them before they are rounded */
  dsv4_tensor out;          /* [tiles * T, N / 2] uint8 or float4_e2m1fn_x2, or [tiles * T, N] uint8 or
                               float8_e4m3fn; on a multiple of 16 bytes */
  dsv4_tensor out_scale;    /* [tiles * T, N / 16] uint8 or float8_e4m3fn, or [tiles * T, N / 32] uint8 or
                               float8_e8m0fnu; with swizzle rounded up to multiples of 128 and 4; on a multiple of 16
                               bytes */
  int32_t top_k;            /* 0 to 32 */
  float limit;              /* of swiglu, finite; 0: none */
  int32_t swizzle;          /* scales in the order 32_4_4, of the matrix of all rows */
} dsv4_moe_grouped_gemm_quantized_args;

DSV4_API dsv4_status dsv4_moe_grouped_gemm_quantized(const dsv4_moe_grouped_gemm_quantized_args* args,
                                                     dsv4_stream stream);

/* out[t] = bfloat16(sum over k, in order, of weights[t, k] * rows[slot_to_row[t, k]], plus shared[t]), in float32. A
 * row that is negative or beyond the rows contributes nothing. */
typedef struct dsv4_moe_finalize_args {
  size_t struct_size;      /* sizeof(dsv4_moe_finalize_args) */
  dsv4_tensor rows;        /* [rows, columns] bfloat16, the experts' outputs; rows may be strided */
  dsv4_tensor slot_to_row; /* [tokens, top_k] int32, of dsv4_moe_sort; top_k <= 32 */
  dsv4_tensor weights;     /* optional [tokens, top_k] float32, rows may be strided; absent: all 1 */
  dsv4_tensor shared;      /* optional [tokens, columns] bfloat16, such as the shared expert's output; may be strided */
  dsv4_tensor out;         /* [tokens, columns] bfloat16; rows may be strided; may be shared itself */
} dsv4_moe_finalize_args;

DSV4_API dsv4_status dsv4_moe_finalize(const dsv4_moe_finalize_args* args, dsv4_stream stream);

/* Block scales in the 32_4_4 layout that Blackwell's block-scaled tensor core instructions read. With C4 =
 * ceil(columns / 4), the scale of row r and column c is the byte
 *
 *     ((r / 128) * C4 + c / 4) * 512 + (r % 32) * 16 + (r % 128) / 32 * 4 + c % 4
 *
 * of out, whose rows are padded to a multiple of 128 and columns to one of 4; the padding is written with zeros. A
 * scale is any byte: columns are groups along K, K / 32 for MXFP8 and MXFP4, K / 16 for NVFP4. */
typedef struct dsv4_blackwell_swizzle_32_4_4_args {
  size_t struct_size; /* sizeof(dsv4_blackwell_swizzle_32_4_4_args) */
  dsv4_tensor scales; /* [rows, columns] or [matrices, rows, columns] uint8, float8_e4m3fn or float8_e8m0fnu; rows may
                         be strided */
  dsv4_tensor out;    /* [rows to 128, columns to 4] or [matrices, ...], the same dtype, on a multiple of 16 bytes */
} dsv4_blackwell_swizzle_32_4_4_args;

DSV4_API dsv4_status dsv4_blackwell_swizzle_32_4_4(const dsv4_blackwell_swizzle_32_4_4_args* args, dsv4_stream stream);

/* The inverse: out is the matrix without padding. */
typedef struct dsv4_blackwell_unswizzle_32_4_4_args {
  size_t struct_size;   /* sizeof(dsv4_blackwell_unswizzle_32_4_4_args) */
  dsv4_tensor swizzled; /* [rows to 128, columns to 4] or [matrices, ...], on a multiple of 16 bytes */
  int64_t rows;
  int64_t columns;
  dsv4_tensor out; /* [rows, columns] or [matrices, rows, columns], the same dtype; rows may be strided */
} dsv4_blackwell_unswizzle_32_4_4_args;

DSV4_API dsv4_status dsv4_blackwell_unswizzle_32_4_4(const dsv4_blackwell_unswizzle_32_4_4_args* args,
                                                     dsv4_stream stream);

/* Scales of activations that are sorted by expert, swizzled so that each expert has a padded section of its own:
 *
 *     out's row padded_offsets[e] + i = row expert_offsets[e] + i of scales
 *     for i < expert_offsets[e + 1] - expert_offsets[e]
 *
 * Every other scale of out is zero. Offsets ascend and are read on the device; whatever they are, nothing is read or
 * written out of bounds. padded_offsets are multiples of 128 where a grouped product reads out. */
typedef struct dsv4_assemble_scales_2d_side_args {
  size_t struct_size;         /* sizeof(dsv4_assemble_scales_2d_side_args) */
  dsv4_tensor scales;         /* [rows, columns] uint8, float8_e4m3fn or float8_e8m0fnu; rows may be strided */
  dsv4_tensor expert_offsets; /* [experts + 1] int32 */
  dsv4_tensor padded_offsets; /* [experts + 1] int32 */
  int64_t padded_rows;        /* a multiple of 128 */
  dsv4_tensor out;            /* [padded_rows, columns to 4], the same dtype, on a multiple of 16 bytes */
} dsv4_assemble_scales_2d_side_args;

DSV4_API dsv4_status dsv4_assemble_scales_2d_side(const dsv4_assemble_scales_2d_side_args* args, dsv4_stream stream);

/* Which values an op quantises. */
typedef enum dsv4_quantize_source {
  DSV4_SOURCE_PLAIN = 0,        /* the columns of x */
  DSV4_SOURCE_DEINTERLEAVE = 1, /* the gates of x: of each 2 * granularity columns the first granularity */
  DSV4_SOURCE_SWIGLU = 2        /* silu(min(gate, limit)) * clamp(up, -limit, limit) in float32. granularity 0: gates
                                   are the first half of the columns, ups the second; else each granularity of gates is
                                   followed by as many of ups */
} dsv4_quantize_source;

/* NVFP4: E2M1 codes, an E4M3 scale per 16 of them, one float32 scale above these. In float32, rounded to nearest at
 * each step, with decode = global_scale and encode = 1 / global_scale (reciprocal_global_scale: the other way round):
 *
 *     scale = e4m3(max(encode * (amax * (1/6)), scale_floor))
 *     code = e2m1(value * (1 / (scale * decode))), 0 if scale is 0
 *
 * A block that holds a NaN has scale NaN (0x7f) and codes +6; infinities become +-6 under the largest scale. Both
 * conversions saturate. global_scale must be finite and at least 2^-126: being on the device it is not checked, and
 * under another one codes and scales mean nothing. A row whose expert id is outside [0, experts) gets codes and scales
 * 0. */
typedef struct dsv4_quantize_nvfp4_args {
  size_t struct_size;       /* sizeof(dsv4_quantize_nvfp4_args) */
  dsv4_tensor x;            /* [rows, columns or 2 * columns] bfloat16, float16 or float32; rows may be strided */
  dsv4_tensor global_scale; /* float32: [] or [1], [rows], or [experts] with expert_ids */
  dsv4_tensor expert_ids;   /* optional, [rows] int32 */
  int32_t reciprocal_global_scale; /* 0: amax / (448 * 6), as checkpoints have it; 1: 448 * 6 / amax */
  int32_t source;                  /* a dsv4_quantize_source */
  int32_t granularity;             /* of gates and ups: 0, or a power of two from 4 that divides columns */
  int32_t round_to_bfloat16;       /* whether results of SwiGLU are rounded to bfloat16 first */
  float limit;                     /* of SwiGLU, finite; 0: none */
  int32_t ties_to_even;            /* 1: as the hardware; 0: toward zero */
  float scale_floor;
  int32_t swizzle;       /* scales in the order 32_4_4, padded with 0 */
  dsv4_tensor n_used;    /* optional, one int32, rank 0 or 1: rows from it on are not written, but for the scales of a
                            tile of 128 rows that it cuts, which are 0 */
  dsv4_tensor out;       /* [rows, columns / 2] uint8 or float4_e2m1fn_x2 */
  dsv4_tensor out_scale; /* [rows, columns / 16] uint8 or float8_e4m3fn; with swizzle [rows, columns / 16] rounded up
                            to multiples of 128 and 4 */
} dsv4_quantize_nvfp4_args;

DSV4_API dsv4_status dsv4_quantize_nvfp4(const dsv4_quantize_nvfp4_args* args, dsv4_stream stream);

typedef enum dsv4_element_format {
  DSV4_ELEMENT_E4M3 = 0, /* FP8, largest 448 */
  DSV4_ELEMENT_E2M1 = 1  /* FP4, largest 6 */
} dsv4_element_format;

/* MXFP8 and MXFP4: E4M3 or E2M1 codes, an E8M0 scale (a power of two) per 32 of them. In float32, rounded to nearest:
 *
 *     round_scale_up: scale = the least power of two >= max(amax, amax_floor) / largest; 0 gives byte 0, and a quotient
 *                     in (0, 2^-126] byte 1. Codes never saturate.
 *     else: scale = the power of two in max(amax, amax_floor), over that in `largest` (OCP MX 1.0). Codes may saturate.
 *     code = nearest of value / scale, exact but for underflow
 *
 * A group that holds a NaN or an infinity has scale 255, which is NaN, and as codes the NaN of E4M3, or +6 of E2M1. */
typedef struct dsv4_quantize_mx_args {
  size_t struct_size;     /* sizeof(dsv4_quantize_mx_args) */
  dsv4_tensor x;          /* [rows, columns or 2 * columns] bfloat16, float16 or float32; rows may be strided */
  int32_t element_format; /* a dsv4_element_format */
  int32_t source;         /* a dsv4_quantize_source; this and the next three as in dsv4_quantize_nvfp4_args */
  int32_t granularity;
  int32_t round_to_bfloat16;
  float limit;
  int32_t round_scale_up;
  float amax_floor;
  int32_t ties_to_even;  /* of E2M1; 1: as the hardware; 0: toward zero */
  int32_t swizzle;       /* scales in the order 32_4_4, padded with 0 */
  dsv4_tensor n_used;    /* optional, one int32, as in dsv4_quantize_nvfp4_args */
  dsv4_tensor out;       /* [rows, columns] uint8 or float8_e4m3fn; [rows, columns / 2] uint8 or float4_e2m1fn_x2 */
  dsv4_tensor out_scale; /* [rows, columns / 32] uint8 or float8_e8m0fnu; with swizzle [rows, columns / 32] rounded up
                            to multiples of 128 and 4 */
} dsv4_quantize_mx_args;

DSV4_API dsv4_status dsv4_quantize_mx(const dsv4_quantize_mx_args* args, dsv4_stream stream);

/* NVFP4 with the global scale taken from the values, amax clipped to [amax_floor, the largest float32]:
 *
 *     global_scale = amax / (448 * 6) (reciprocal_global_scale: 448 * 6 / amax)
 *
 * of the whole tensor, of each row (per_token), or of the rows of each expert (expert_ids). The codes and scales are
 * then to the bit those of dsv4_quantize_nvfp4 with that global_scale. A block of 16 values that holds a NaN counts for
 * no global_scale: its own scale is NaN, and no other block is affected. The workspace must be zeroed once before its
 * first use; every call leaves it ready for the next one on the same stream. Calls that may run at the same time need
 * separate workspaces. */
typedef struct dsv4_quantize_nvfp4_gpu_fused_args {
  size_t struct_size;     /* sizeof(dsv4_quantize_nvfp4_gpu_fused_args) */
  dsv4_tensor x;          /* [rows, columns or 2 * columns] bfloat16, float16 or float32; rows may be strided */
  dsv4_tensor expert_ids; /* optional, [rows] int32; rows with an id outside [0, experts) count for no scale */
  int32_t experts;        /* with expert_ids, else 0 */
  int32_t per_token;      /* 0 or 1; 0 with expert_ids */
  int32_t reciprocal_global_scale; /* this and the rest up to n_used as in dsv4_quantize_nvfp4_args */
  int32_t source;
  int32_t granularity;
  int32_t round_to_bfloat16;
  float limit;
  float amax_floor; /* at least 448 * 6 * 2^-126 */
  int32_t ties_to_even;
  float scale_floor;
  int32_t swizzle;
  dsv4_tensor n_used;
  dsv4_tensor workspace;        /* [>= dsv4_quantize_nvfp4_gpu_fused_workspace_size] uint8, zeroed once */
  dsv4_tensor out;              /* [rows, columns / 2] uint8 or float4_e2m1fn_x2 */
  dsv4_tensor out_scale;        /* as in dsv4_quantize_nvfp4_args */
  dsv4_tensor out_global_scale; /* [1], [rows] or [experts] float32 */
} dsv4_quantize_nvfp4_gpu_fused_args;

/* Bytes of workspace for `experts` experts; 0 without expert_ids. */
DSV4_API size_t dsv4_quantize_nvfp4_gpu_fused_workspace_size(int64_t experts);

DSV4_API dsv4_status dsv4_quantize_nvfp4_gpu_fused(const dsv4_quantize_nvfp4_gpu_fused_args* args, dsv4_stream stream);

/* FP8 E4M3 with one scale per row: scale = max(amax / 448, scale_floor), code = e4m3(value * (1 / scale)), or with
 * divide e4m3(value / scale), in float32, each step rounded to nearest; a scale of 0 gives codes 0. A row that holds a
 * NaN has scale and codes NaN; one with an infinity has scale infinity and codes 0, and NaN where it is infinite. */
typedef struct dsv4_quantize_fp8_per_token_args {
  size_t struct_size; /* sizeof(dsv4_quantize_fp8_per_token_args) */
  dsv4_tensor x;      /* [rows, columns] bfloat16, float16 or float32, columns a multiple of 16; rows may be strided */
  float scale_floor;
  int32_t divide;        /* 0 or 1 */
  dsv4_tensor out;       /* [rows, columns] uint8 or float8_e4m3fn */
  dsv4_tensor out_scale; /* [rows] float32 */
} dsv4_quantize_fp8_per_token_args;

DSV4_API dsv4_status dsv4_quantize_fp8_per_token(const dsv4_quantize_fp8_per_token_args* args, dsv4_stream stream);

/* What scales are, and how many elements share one. */
typedef enum dsv4_scale_format {
  DSV4_SCALE_E4M3 = 0,   /* 16 elements: NVFP4 */
  DSV4_SCALE_E8M0 = 1,   /* 32 elements: the MX formats */
  DSV4_SCALE_FLOAT32 = 2 /* a row: FP8 per token */
} dsv4_scale_format;

/* out = code * scale * global scale, multiplied in this order in float32 (the first product is exact) and rounded to
 * out's dtype. Without global_scale, that is 1; a row whose expert id is out of range has 0. */
typedef struct dsv4_dequantize_blocks_args {
  size_t struct_size;       /* sizeof(dsv4_dequantize_blocks_args) */
  dsv4_tensor data;         /* [rows, columns] uint8 or float8_e4m3fn; [rows, columns / 2] uint8, float4_e2m1fn_x2 */
  dsv4_tensor scale;        /* [rows, columns / 16 or 32] uint8, float8_e4m3fn or float8_e8m0fnu, with swizzle
                               rounded up to multiples of 128 and 4; or [rows] float32 */
  dsv4_tensor global_scale; /* optional, as in dsv4_quantize_nvfp4_args */
  dsv4_tensor expert_ids;   /* optional, as in dsv4_quantize_nvfp4_args */
  int32_t reciprocal_global_scale; /* as in dsv4_quantize_nvfp4_args: 0 multiplies, 1 divides */
  int32_t element_format;          /* a dsv4_element_format */
  int32_t scale_format;            /* a dsv4_scale_format */
  int32_t swizzle;
  dsv4_tensor out; /* [rows, columns] bfloat16, float16 or float32 */
} dsv4_dequantize_blocks_args;

DSV4_API dsv4_status dsv4_dequantize_blocks(const dsv4_dequantize_blocks_args* args, dsv4_stream stream);

#ifdef __cplusplus
}
#endif
#endif
