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
 * row padded_offsets[e] + i of the swizzled matrix is row expert_offsets[e] + i of scales, for i < expert_offsets[e +
 * 1]
 * - expert_offsets[e]; every other scale of out is zero. Offsets ascend and are read on the device; whatever they are,
 * nothing is read or written out of bounds. padded_offsets are multiples of 128 where a grouped product reads out. */
typedef struct dsv4_assemble_scales_2d_side_args {
  size_t struct_size;         /* sizeof(dsv4_assemble_scales_2d_side_args) */
  dsv4_tensor scales;         /* [rows, columns] uint8, float8_e4m3fn or float8_e8m0fnu; rows may be strided */
  dsv4_tensor expert_offsets; /* [experts + 1] int32 */
  dsv4_tensor padded_offsets; /* [experts + 1] int32 */
  int64_t padded_rows;        /* a multiple of 128 */
  dsv4_tensor out;            /* [padded_rows, columns to 4], the same dtype, on a multiple of 16 bytes */
} dsv4_assemble_scales_2d_side_args;

DSV4_API dsv4_status dsv4_assemble_scales_2d_side(const dsv4_assemble_scales_2d_side_args* args, dsv4_stream stream);

#ifdef __cplusplus
}
#endif
#endif
