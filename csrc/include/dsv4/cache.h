/* Compressed key-value cache: compression of token rows to entries, quantised entries in pages.
 *
 * The ops of the tail-counting state. A request owns a slot of the state; the rows of its current block of m tokens
 * gather in the slot's tail buffers, and when tail_len reaches m the block becomes one entry. Every op reads tail_len
 * (or the valid_mask made from it) on the device, so one captured graph serves every step. A request whose slot is
 * outside the state is padding: it has no effect. The slots of one call are distinct.
 *
 * Streams: CSA softmaxes over 2m rows, the a rows of the current block (tail_ka, tail_za) and the b rows of the block
 * before (tail_kb, tail_zb). Rows are as wide as entry and indexer key together: the softmax is taken per column, so
 * one pass gives both. HCA has the a rows alone. */
#ifndef DSV4_CACHE_H
#define DSV4_CACHE_H

#include <dsv4/dsv4.h>

#ifdef __cplusplus
extern "C" {
#endif

/* For each request whose tail is full (tail_len >= m), per column, over the first m rows of both streams in float32:
 *     entry = sum softmax(z) * k      out_valid_mask = tail_len >= m
 * Columns [0, head_dim) are the entry, the rest the indexer key. A score of -inf has weight 0; a column whose scores
 * are all -inf gives 0. Rows of out_entry and out_indexer_key whose mask is false are not written. */
typedef struct dsv4_csa_compress_tail_args {
  size_t struct_size;          /* sizeof(dsv4_csa_compress_tail_args) */
  dsv4_tensor tail_ka;         /* [slots, rows >= m, width] float32, width a multiple of 4, 16-byte aligned */
  dsv4_tensor tail_za;         /* like tail_ka */
  dsv4_tensor tail_kb;         /* like tail_ka */
  dsv4_tensor tail_zb;         /* like tail_ka */
  dsv4_tensor tail_len;        /* [slots] int32 */
  dsv4_tensor request_slots;   /* [requests] int32 */
  dsv4_tensor out_entry;       /* [requests, head_dim] bfloat16, head_dim <= width */
  dsv4_tensor out_indexer_key; /* [requests, width - head_dim] bfloat16 */
  dsv4_tensor out_valid_mask;  /* [requests] bool */
  int32_t m;                   /* tokens a block, 1 or more */
} dsv4_csa_compress_tail_args;

DSV4_API dsv4_status dsv4_csa_compress_tail(const dsv4_csa_compress_tail_args* args, dsv4_stream stream);

/* For each request whose tail is full (tail_len >= m), per column, over the first m rows in float32:
 *     entry = sum softmax(za) * ka      out_valid_mask = tail_len >= m
 * A score of -inf has weight 0; a column whose scores are all -inf gives 0. Rows of out_entry whose mask is false are
 * not written. */
typedef struct dsv4_hca_compress_tail_args {
  size_t struct_size;         /* sizeof(dsv4_hca_compress_tail_args) */
  dsv4_tensor tail_ka;        /* [slots, rows >= m, width] float32, width a multiple of 4, 16-byte aligned */
  dsv4_tensor tail_za;        /* like tail_ka */
  dsv4_tensor tail_len;       /* [slots] int32 */
  dsv4_tensor request_slots;  /* [requests] int32 */
  dsv4_tensor out_entry;      /* [requests, width] bfloat16 */
  dsv4_tensor out_valid_mask; /* [requests] bool */
  int32_t m;                  /* tokens a block, 1 or more */
} dsv4_hca_compress_tail_args;

DSV4_API dsv4_status dsv4_hca_compress_tail(const dsv4_hca_compress_tail_args* args, dsv4_stream stream);

/* Puts rows of new tokens into the tail buffers. Request r brings tokens [token_offsets[r], token_offsets[r + 1]) of
 * kv, at positions[r] and on; token p of a request belongs to block p / m and row p mod m. One call takes the tokens of
 * one block of each request: block positions[r] / m + round. A call for n tokens a request at most, followed by a
 * flush, is repeated for round 0 to (n + m - 2) / m. Where a request has tokens in the round, tail_len[slot] = rows
 * that its block then holds      slot_positions[slot] = position after the last of them A token row is [kv |
 * indexer_kv], with scores [z + ape | indexer_z + indexer_ape]. With two projections each of these has the b columns
 * first, then the a columns; the b rows go to next_kb and next_zb. Tokens of padding, beyond the last offset, and at
 * negative positions are skipped. */
typedef struct dsv4_append_args {
  size_t struct_size;         /* sizeof(dsv4_append_args) */
  dsv4_tensor kv;             /* [tokens, streams * head_dim] float32; rows may be strided, 16-byte aligned */
  dsv4_tensor z;              /* like kv, the scores */
  dsv4_tensor request_slots;  /* [requests] int32 */
  dsv4_tensor positions;      /* [requests] int64, position of each request's first token */
  dsv4_tensor tail_ka;        /* [slots, rows >= m, width] float32, changed */
  dsv4_tensor tail_za;        /* like tail_ka, changed */
  dsv4_tensor tail_len;       /* [slots] int32, changed */
  dsv4_tensor slot_positions; /* [slots] int64, changed */
  dsv4_tensor next_kb;        /* like tail_ka, changed; absent with one projection (streams = 1) */
  dsv4_tensor next_zb;        /* like next_kb */
  dsv4_tensor token_offsets;  /* [requests + 1] int32, ascending; absent: one token a request */
  dsv4_tensor indexer_kv;     /* [tokens, streams * (width - head_dim)] float32; absent if width is head_dim */
  dsv4_tensor indexer_z;      /* like indexer_kv */
  dsv4_tensor ape;            /* [m, streams * head_dim] float32; may be absent */
  dsv4_tensor indexer_ape;    /* [m, streams * (width - head_dim)] float32; may be absent */
  int32_t m;                  /* tokens a block, 1 or more */
  int32_t round;              /* 0 or more */
} dsv4_append_args;

DSV4_API dsv4_status dsv4_append(const dsv4_append_args* args, dsv4_stream stream);

/* Quantises the entry and the indexer key of each request whose valid_mask is true, and writes them to the pool. The
 * entry's number is i = (slot_positions[slot] - 1) / m; it lives in slot i mod entries_per_block of the block
 * block_table[request, i / entries_per_block].
 *     inv_scale = max(amax(values) / 448, 2^-126)      entries_fp8 = e4m3(values / inv_scale)      values without rope
 *     indexer_scale = e4m3(amax(16 values) / 6)        indexer_keys_fp4 = e2m1(values / indexer_scale)
 * in float32, to nearest, ties to even, saturated; a value is code times scale. Rotary columns are copied. A group
 * whose scale rounds to 0 has codes 0. An amax leaves NaN out; a NaN value gives E4M3's NaN, or E2M1's 6. A block that
 * is not in the table or not in the pool (-1) is not written. */
typedef struct dsv4_flush_write_csa_args {
  size_t struct_size;           /* sizeof(dsv4_flush_write_csa_args) */
  dsv4_tensor entry;            /* [requests, head_dim] bfloat16, head_dim a multiple of 4, at most 1024 */
  dsv4_tensor indexer_key;      /* [requests, indexer_head_dim] bfloat16, indexer_head_dim a multiple of 16 */
  dsv4_tensor valid_mask;       /* [requests] bool */
  dsv4_tensor request_slots;    /* [requests] int32 */
  dsv4_tensor slot_positions;   /* [slots] int64 */
  dsv4_tensor block_table;      /* [requests, any] int32; rows may be strided */
  dsv4_tensor entries_fp8;      /* [blocks, entries_per_block, head_dim - rope_dim] float8_e4m3fn or uint8, changed */
  dsv4_tensor entries_rope;     /* [blocks, entries_per_block, rope_dim] bfloat16, changed; rope_dim a multiple of 4 */
  dsv4_tensor inv_scale;        /* [blocks, entries_per_block] float32, changed */
  dsv4_tensor indexer_keys_fp4; /* [blocks, entries_per_block, indexer_head_dim / 2] uint8 or float4_e2m1fn_x2, changed;
                                   the even element in the low nibble */
  dsv4_tensor indexer_scale;    /* [blocks, entries_per_block, indexer_head_dim / 16] float8_e4m3fn or uint8, changed */
  int32_t m;                    /* tokens a block, 1 or more */
} dsv4_flush_write_csa_args;

DSV4_API dsv4_status dsv4_flush_write_csa(const dsv4_flush_write_csa_args* args, dsv4_stream stream);

/* As flush_write_csa, without an indexer key. */
typedef struct dsv4_flush_write_hca_args {
  size_t struct_size;         /* sizeof(dsv4_flush_write_hca_args) */
  dsv4_tensor entry;          /* [requests, head_dim] bfloat16, head_dim a multiple of 4, at most 1024 */
  dsv4_tensor valid_mask;     /* [requests] bool */
  dsv4_tensor request_slots;  /* [requests] int32 */
  dsv4_tensor slot_positions; /* [slots] int64 */
  dsv4_tensor block_table;    /* [requests, any] int32; rows may be strided */
  dsv4_tensor entries_fp8;    /* [blocks, entries_per_block, head_dim - rope_dim] float8_e4m3fn or uint8, changed */
  dsv4_tensor entries_rope;   /* [blocks, entries_per_block, rope_dim] bfloat16, changed; rope_dim a multiple of 4 */
  dsv4_tensor inv_scale;      /* [blocks, entries_per_block] float32, changed */
  int32_t m;                  /* tokens a block, 1 or more */
} dsv4_flush_write_hca_args;

DSV4_API dsv4_status dsv4_flush_write_hca(const dsv4_flush_write_hca_args* args, dsv4_stream stream);

/* After a CSA flush, for each request whose valid_mask is true: the b rows of the current block become those of the
 * block before (tail_kb = next_kb, tail_zb = next_zb; with one projection tail_kb = tail_ka, tail_zb = tail_za) and
 * tail_len becomes 0. With clear_rows the rows of the current block become 0; nothing reads them before append has
 * written them, so it may be left out. */
typedef struct dsv4_csa_rotate_state_args {
  size_t struct_size;        /* sizeof(dsv4_csa_rotate_state_args) */
  dsv4_tensor valid_mask;    /* [requests] bool */
  dsv4_tensor request_slots; /* [requests] int32 */
  dsv4_tensor tail_ka;       /* [slots, rows, width] float32, changed; width a multiple of 4, 16-byte aligned */
  dsv4_tensor tail_za;       /* like tail_ka, changed */
  dsv4_tensor tail_kb;       /* like tail_ka, changed */
  dsv4_tensor tail_zb;       /* like tail_ka, changed */
  dsv4_tensor tail_len;      /* [slots] int32, changed */
  dsv4_tensor next_kb;       /* like tail_ka, changed; absent with one projection */
  dsv4_tensor next_zb;       /* like next_kb */
  int32_t clear_rows;        /* 0 or 1 */
} dsv4_csa_rotate_state_args;

DSV4_API dsv4_status dsv4_csa_rotate_state(const dsv4_csa_rotate_state_args* args, dsv4_stream stream);

/* After an HCA flush, for each request whose valid_mask is true: tail_len becomes 0, and with clear_rows the rows of
 * the current block become 0; nothing reads them before append has written them, so it may be left out. */
typedef struct dsv4_hca_reset_state_args {
  size_t struct_size;        /* sizeof(dsv4_hca_reset_state_args) */
  dsv4_tensor valid_mask;    /* [requests] bool */
  dsv4_tensor request_slots; /* [requests] int32 */
  dsv4_tensor tail_ka;       /* [slots, rows, width] float32, changed; width a multiple of 4, 16-byte aligned */
  dsv4_tensor tail_za;       /* like tail_ka, changed */
  dsv4_tensor tail_len;      /* [slots] int32, changed */
  int32_t clear_rows;        /* 0 or 1 */
} dsv4_hca_reset_state_args;

DSV4_API dsv4_status dsv4_hca_reset_state(const dsv4_hca_reset_state_args* args, dsv4_stream stream);

#ifdef __cplusplus
}
#endif
#endif
