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
  dsv4_tensor out;             /* [rows, columns] bfloat16; rows may be strided */
} dsv4_padded_squared_relu_args;

DSV4_API dsv4_status dsv4_padded_squared_relu(const dsv4_padded_squared_relu_args* args, dsv4_stream stream);

/* Where each routed slot (token, k) goes when slots are grouped by expert: rows in tiles of tile_size, each tile of one
 * expert, experts in order, the slots of an expert in their own order. Slot s is element s of topk_ids. An id that is
 * negative or not one of the local_experts from experts_start_idx on takes no row. One launch for any batch.
 *
 * With X slots and L experts, tiles = dsv4_moe_sort_max_tiles(X, L, T) are enough for any routing. */
typedef struct dsv4_moe_sort_args {
  size_t struct_size;             /* sizeof(dsv4_moe_sort_args) */
  dsv4_tensor topk_ids;           /* [tokens, top_k] int32 or int64, at most 2^30 elements; top_k <= 32 */
  dsv4_tensor out_tile_to_expert; /* [tiles] int32: local expert, -1 for tiles that are not used, which come last */
  dsv4_tensor out_tile_rows;      /* [tiles] int32: rows of the tile that hold a slot, the first ones; 0 if unused */
  dsv4_tensor out_row_to_slot;    /* [tiles * tile_size] int32: -1 for the padding of a used tile; rows of unused tiles
                                     are not written */
  dsv4_tensor out_slot_to_row;    /* [tokens, top_k] int32, -1 for slots that take no row */
  dsv4_tensor out_counts;         /* [2] int32: tiles used, slots that take a row */
  int32_t local_experts;          /* 1 to 1024 */
  int32_t tile_size;              /* 16, 32, 64 or 128 */
  int32_t experts_start_idx;      /* the id of local expert 0 */
} dsv4_moe_sort_args;

DSV4_API dsv4_status dsv4_moe_sort(const dsv4_moe_sort_args* args, dsv4_stream stream);

/* The most tiles that any routing of so many slots can use: slots if they are no more than the experts, else
 * floor((slots + (tile_size - 1) * local_experts) / tile_size). */
DSV4_API int64_t dsv4_moe_sort_max_tiles(int64_t slots, int64_t local_experts, int64_t tile_size);

/* out[t] = bfloat16(sum over k, in order, of weights[t, k] * rows[slot_to_row[t, k]], plus shared[t]), in float32. A
 * row that is negative or beyond the rows contributes nothing. */
typedef struct dsv4_moe_finalize_args {
  size_t struct_size;      /* sizeof(dsv4_moe_finalize_args) */
  dsv4_tensor rows;        /* [rows, columns] bfloat16, the experts' outputs; rows may be strided */
  dsv4_tensor slot_to_row; /* [tokens, top_k] int32, of dsv4_moe_sort; top_k <= 32 */
  dsv4_tensor weights;     /* optional [tokens, top_k] float32; absent: all 1 */
  dsv4_tensor shared;      /* optional [tokens, columns] bfloat16, such as the shared expert's output; may be strided */
  dsv4_tensor out;         /* [tokens, columns] bfloat16; rows may be strided */
} dsv4_moe_finalize_args;

DSV4_API dsv4_status dsv4_moe_finalize(const dsv4_moe_finalize_args* args, dsv4_stream stream);

#ifdef __cplusplus
}
#endif
#endif
