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
  int32_t m;                   /* tokens per block, 1 or more */
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
  int32_t m;                  /* tokens per block, 1 or more */
} dsv4_hca_compress_tail_args;

DSV4_API dsv4_status dsv4_hca_compress_tail(const dsv4_hca_compress_tail_args* args, dsv4_stream stream);

/* Puts rows of new tokens into the tail buffers. Request r brings tokens [token_offsets[r], token_offsets[r + 1]) of
 * kv, at positions[r] and on; token p of a request belongs to block p / m and row p mod m. One call takes the tokens of
 * one block of each request: block positions[r] / m + round. For up to n tokens per request, append and flush are
 * repeated for round 0 to (n + m - 2) / m. A request that has tokens in the round gets
 *
 *     tail_len[slot] = rows that its block then holds
 *     slot_positions[slot] = position after the last of them
 *
 * A token row is [kv | indexer_kv], with scores [z + ape | indexer_z + indexer_ape]. With two projections each of these
 * has the b columns first, then the a columns; the b rows go to next_kb and next_zb. Padding tokens, tokens beyond the
 * last offset, and tokens at negative positions are skipped. */
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
  dsv4_tensor token_offsets;  /* [requests + 1] int32, ascending; absent: one token per request */
  dsv4_tensor indexer_kv;     /* [tokens, streams * (width - head_dim)] float32; absent if width is head_dim */
  dsv4_tensor indexer_z;      /* like indexer_kv */
  dsv4_tensor ape;            /* [m, streams * head_dim] float32; may be absent */
  dsv4_tensor indexer_ape;    /* [m, streams * (width - head_dim)] float32; may be absent */
  int32_t m;                  /* tokens per block, 1 or more */
  int32_t round;              /* 0 or more */
} dsv4_append_args;

DSV4_API dsv4_status dsv4_append(const dsv4_append_args* args, dsv4_stream stream);

/* Quantises the entry and the indexer key of each request whose valid_mask is true, and writes them to the pool. The
 * entry's number is i = (slot_positions[slot] - 1) / m; it lives in slot i mod entries_per_block of the block
 * block_table[request, i / entries_per_block].
 *     inv_scale = max(amax(values) / 448, 2^-126)      entries_fp8 = e4m3(values / inv_scale)      values without rope
 *     indexer_scale = e4m3(amax(16 values) / 6)        indexer_keys_fp4 = e2m1(values / indexer_scale)
 * in float32, to nearest, ties to even, saturated; a value is code times scale. Rotary columns are copied. A group
 * whose scale rounds to 0 has codes 0. A group that holds a NaN has a scale of NaN, with E4M3's NaN or E2M1's 6 as its
 * codes. A block that is not in the table or not in the pool (-1) is not written. */
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
  int32_t m;                    /* tokens per block, 1 or more */
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
  int32_t m;                  /* tokens per block, 1 or more */
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

/* How pages hold entries. A page has the values of its entries one after another, then their scales one after another,
 * then whatever is left of its bytes, which no op touches. Of the separate layouts, which are those that flush_write_*
 * write, the pages are a tensor of quantised values, and scales and bfloat16 values are tensors of their own. */
typedef enum dsv4_page_layout {
  DSV4_PAGE_BF16 = 0,          /* 512 bfloat16 */
  DSV4_PAGE_INDEXER_BF16 = 1,  /* 128 bfloat16 */
  DSV4_PAGE_FP8_DS_MLA = 2,    /* 448 E4M3 and 64 bfloat16; an E8M0 scale per 64, and a byte of padding */
  DSV4_PAGE_INDEXER_FP8 = 3,   /* 128 E4M3; a float32 scale */
  DSV4_PAGE_INDEXER_MXFP4 = 4, /* 128 E2M1; an E8M0 scale per 32 */
  DSV4_PAGE_V41_FP8 = 5,       /* 512 E4M3; an E8M0 scale per 32 */
  DSV4_PAGE_V41_FP4 = 6,       /* 512 E2M1; an E4M3 scale per 16 */
  DSV4_PAGE_SPLIT = 7,         /* separate: 448 E4M3; a float32 scale; 64 bfloat16 */
  DSV4_PAGE_SPLIT_INDEXER = 8  /* separate: 128 E2M1; an E4M3 scale per 16 */
} dsv4_page_layout;

typedef struct dsv4_page_layout_info {
  size_t struct_size; /* sizeof(dsv4_page_layout_info), set by the caller */
  const char* name;
  int32_t head_dim;       /* channels of an entry */
  int32_t quantized_dims; /* how many of them are quantised, the first ones; the rest is bfloat16 */
  int32_t element;        /* a dsv4_dtype: of the quantised channels */
  int32_t group;          /* channels that share a scale */
  int32_t scale;          /* a dsv4_dtype */
  int32_t value_bytes;    /* of an entry; of a separate layout, of its quantised channels */
  int32_t scale_bytes;    /* of an entry, with padding */
  int32_t page_alignment; /* a page's bytes are rounded up to a multiple of this */
  int32_t separate;       /* 0 or 1: whether scales and bfloat16 values are tensors of their own */
  float amax_floor;       /* lower bound of a group's amax in the engine's own code for this layout */
  int32_t exact_scale;    /* 0 or 1: whether that code leaves float32 scales unrounded; see dsv4_compress_flush_args */
} dsv4_page_layout_info;

DSV4_API dsv4_status dsv4_page_layout_at(int32_t layout, dsv4_page_layout_info* info);

/* Bytes of a page of `entries` entries; 0 if the layout or the number is invalid. */
DSV4_API size_t dsv4_page_bytes(int32_t layout, int64_t entries);

/* From token rows to quantised entries in pages in one launch, for decode, prefill, and both in one call.
 *
 * Request r brings the tokens query_starts[r] to query_starts[r + 1], at the positions from start_positions[r] on. A
 * token's row is its kv and its score, to which ape[position % ratio] is added. Block i of a request are the positions
 * i * ratio to (i + 1) * ratio - 1; it is compressed in the call that brings the last of them:
 *     entry[c] = sum over rows of softmax(score)[c] * kv[c]
 * over the block's rows or, with overlap, over columns [0, d) of the rows of the block before and columns [d, 2d) of
 * its own, of width 2d. A score of -inf has weight 0; a channel whose scores are all -inf is 0. Then: RMS norm,
 * rotation of neighbouring pairs of the last 64 channels by cos_sin[i * ratio], Hadamard rotation if
 * `hadamard` is 1, quantisation.
 *
 * The state holds rows by position, so that a position may be written again (a rejected draft) and earlier calls may
 * have brought any part of a block: the row of position p is row p % rows of page state_table[r, p / rows % columns].
 * With one column that is a ring buffer per request. Rows times columns must be at least the rows of a block (of two
 * with overlap) plus the number of tokens that may be rejected.
 *
 * Nothing is written for: a token outside every request; a request whose start is negative or whose positions exceed
 * INT32_MAX; a row whose state page is out of range. No entry is written when its slot is negative or out of range,
 * when it would need a row of such a state page, or when i * ratio is not in cos_sin. Requests of one call do not share
 * state pages or slots. */
typedef struct dsv4_compress_flush_args {
  size_t struct_size;       /* sizeof(dsv4_compress_flush_args) */
  dsv4_tensor kv;           /* [tokens, width] float32 or bfloat16, rows may be strided; width d, or 2d with overlap */
  dsv4_tensor score;        /* like kv; may be absent where a block is one row */
  dsv4_tensor ape;          /* [ratio, width] float32; may be absent */
  dsv4_tensor query_starts; /* [requests + 1] int32 or int64, ascending */
  dsv4_tensor start_positions; /* [requests] int32 or int64 */
  dsv4_tensor state;           /* [state pages, rows, 2, width] float32, written: kv and score, with ape */
  dsv4_tensor state_table;     /* [requests, columns] int32 */
  dsv4_tensor norm_weight;     /* [d] float32 or bfloat16 */
  dsv4_tensor cos_sin;         /* [positions, 64] float32: 32 cosines, then 32 sines */
  dsv4_tensor pages;           /* [pages, >= dsv4_page_bytes] uint8, written; rows may be strided. Of a separate layout
                                  [pages, entries_per_page, value_bytes] uint8 or its element type */
  dsv4_tensor scales;          /* of a separate layout alone, written: [pages, entries_per_page] float32 (split) or
                                  [pages, entries_per_page, 8] E4M3 or uint8 (split_indexer) */
  dsv4_tensor rope;            /* of split alone, written: [pages, entries_per_page, 64] bfloat16 */
  dsv4_tensor block_table;     /* [requests, blocks] int32: entry i is in page block_table[r, i / entries_per_page] */
  dsv4_tensor slot_mapping;    /* [tokens] int32 or int64: page * entries_per_page + slot of the entry that the token
                                  completes. One of block_table and slot_mapping is given */
  int32_t ratio;               /* 1, 2, 4 or 128 */
  int32_t overlap;             /* 0 or 1 */
  int32_t layout;              /* a dsv4_page_layout; decides d */
  int32_t entries_per_page;
  int32_t hadamard;             /* 0 or 1; d = 128: the rotation of all channels, times 128^-1/2 */
  int32_t round_once;           /* 0: to bfloat16 after each step, as the models' code; 1: only before quantisation */
  float epsilon;                /* of the norm */
  float amax_floor;             /* a group's scale is max(max(amax, amax_floor) / largest code, scale_floor), */
  float scale_floor;            /* rounded up to a power of two, or to the nearest E4M3 for v41_fp4 */
  int32_t fp4_ties_toward_zero; /* 0: to the even code, as hardware; 1: toward zero, as engines that use thresholds */
  int32_t exact_scale;          /* 1: a float32 scale (indexer_fp8, split) is not rounded up to a power of two */
} dsv4_compress_flush_args;

DSV4_API dsv4_status dsv4_compress_flush(const dsv4_compress_flush_args* args, dsv4_stream stream);

/* Entries of pages as float32: value * scale. slots counts entries of all pages: page * entries_per_page + slot. A row
 * whose slot is out of range is NaN. */
typedef struct dsv4_unpack_entries_args {
  size_t struct_size; /* sizeof(dsv4_unpack_entries_args) */
  dsv4_tensor pages;  /* pages, scales and rope as of dsv4_compress_flush_args */
  dsv4_tensor scales;
  dsv4_tensor rope;
  dsv4_tensor slots; /* [entries] int32 or int64 */
  dsv4_tensor out;   /* [entries, head_dim of the layout] float32 */
  int32_t layout;    /* a dsv4_page_layout */
  int32_t entries_per_page;
} dsv4_unpack_entries_args;

DSV4_API dsv4_status dsv4_unpack_entries(const dsv4_unpack_entries_args* args, dsv4_stream stream);

#ifdef __cplusplus
}
#endif
#endif
