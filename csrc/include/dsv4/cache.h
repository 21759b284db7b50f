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

#ifdef __cplusplus
}
#endif
#endif
