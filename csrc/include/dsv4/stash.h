/* Paged stash of activations: a number of rows that only the device knows, in pages that the device allocates.
 *
 * A pool is [pages, page_size, hidden]; the free ones among its pages are a circular list of int64 ids on the device,
 * beside its head and tail, which only grow:
 *
 *     free pages = tail - head
 *     take the s-th page:     list[(head + s) mod capacity]
 *     give the s-th page back: list[(tail + s) mod capacity] = id
 *
 * A list starts as 0, 1, ..., pages - 1 with head 0 and tail = capacity = pages. There are two pools, each with its
 * list: index 0 of head, tail and capacity is the CUDA pool, index 1 the host pool, in pinned memory. Row t of what was
 * stashed lies in page page_record[t div page_size], at its row t mod page_size. Both ops work on bytes, so any dtype
 * will do.
 *
 * Pages and data that are 16-byte aligned, with rows or pages of a multiple of 16 bytes, are copied by 16-byte
 * accesses, everything else byte by byte.
 *
 * Data on the device that contradicts itself never makes an op read or write out of bounds:
 *   - num_tokens outside [0, rows] acts as the nearest end;
 *   - paged_stash_copy takes no page from a list whose capacity is outside [1, pages], whose head is negative or above
 *     its tail, or that holds more than its capacity;
 *   - paged_stash_pop does nothing, and leaves the tails, if the capacity is outside [1, pages] or below the number of
 *     pages to give back, if the tail is negative, or if spilled_to_host is set and there is no host pool;
 *   - a page id outside the pool is recorded and given back as it is, but the rows of that page are not moved. */
#ifndef DSV4_STASH_H
#define DSV4_STASH_H

#include <dsv4/dsv4.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Stashes the first num_tokens rows of src: takes ceil(num_tokens / page_size) pages, records them, copies the rows.
 *   overflow set already: nothing is touched; new heads are the old ones.
 *   no tokens: likewise.
 *   all pages fit into the CUDA pool: its head advances; spilled_to_host = 0.
 *   else all fit into the host pool: its head advances; spilled_to_host = host_spill_global = 1.
 *   else: overflow = spilled_to_host = 1 and nothing is copied or recorded; new heads are the old ones.
 * Both flags that other copies share, overflow and host_spill_global, are only ever set. */
typedef struct dsv4_paged_stash_copy_args {
  size_t struct_size;             /* sizeof(dsv4_paged_stash_copy_args) */
  dsv4_tensor src;                /* [rows, hidden], any dtype */
  dsv4_tensor cuda_dst;           /* [pages, page_size, hidden], page_size 1 to 65536 */
  dsv4_tensor host_dst;           /* [host pages, page_size, hidden] in pinned host memory; may be absent */
  dsv4_tensor num_tokens;         /* one int64, rank 0 or 1 */
  dsv4_tensor free_list_cuda;     /* [pages] int64 */
  dsv4_tensor free_list_host;     /* [host pages] int64 on the device; absent if host_dst is */
  dsv4_tensor free_list_head;     /* [2] int64 */
  dsv4_tensor free_list_tail;     /* [2] int64 */
  dsv4_tensor free_list_capacity; /* [2] int64 */
  dsv4_tensor page_record;        /* [at least ceil(rows / page_size)] int64 */
  dsv4_tensor overflow;           /* one int64, as the next two: 0 or 1 */
  dsv4_tensor host_spill_global;
  dsv4_tensor spilled_to_host;
  dsv4_tensor new_free_list_head; /* [2] int64; absent: free_list_head is updated in place */
  dsv4_tensor high_water; /* [2] int64; may be absent; raised to the pages in use: capacity - (tail - new head) */
  dsv4_tensor workspace;  /* dsv4_paged_stash_workspace_size() bytes of uint8, zero; zero again afterwards */
} dsv4_paged_stash_copy_args;

DSV4_API dsv4_status dsv4_paged_stash_copy(const dsv4_paged_stash_copy_args* args, dsv4_stream stream);

/* The inverse: copies the first num_tokens rows out of the pages of page_record, from the host pool if spilled_to_host
 * is set, and gives the pages back. overflow set: nothing is touched, new tails are the old ones; the step must be run
 * again. Rows of dst beyond num_tokens are left alone, or zeroed if zero_rest. */
typedef struct dsv4_paged_stash_pop_args {
  size_t struct_size;             /* sizeof(dsv4_paged_stash_pop_args) */
  dsv4_tensor cuda_src;           /* [pages, page_size, hidden], page_size 1 to 65536, any dtype */
  dsv4_tensor host_src;           /* [host pages, page_size, hidden] in pinned host memory; may be absent */
  dsv4_tensor dst;                /* [rows, hidden] */
  dsv4_tensor num_tokens;         /* one int64, rank 0 or 1 */
  dsv4_tensor page_record;        /* [at least ceil(rows / page_size)] int64 */
  dsv4_tensor spilled_to_host;    /* one int64 */
  dsv4_tensor overflow;           /* one int64 */
  dsv4_tensor free_list_cuda;     /* [pages] int64 */
  dsv4_tensor free_list_host;     /* [host pages] int64 on the device; absent if host_src is */
  dsv4_tensor free_list_tail;     /* [2] int64 */
  dsv4_tensor free_list_capacity; /* [2] int64 */
  dsv4_tensor new_free_list_tail; /* [2] int64; absent: free_list_tail is updated in place */
  dsv4_tensor workspace;          /* dsv4_paged_stash_workspace_size() bytes of uint8, zero; zero again afterwards */
  int32_t zero_rest;              /* 0 or 1 */
} dsv4_paged_stash_pop_args;

DSV4_API dsv4_status dsv4_paged_stash_pop(const dsv4_paged_stash_pop_args* args, dsv4_stream stream);

/* Bytes of workspace that either op needs. Calls that may run at the same time need one each. */
DSV4_API size_t dsv4_paged_stash_workspace_size(void);

#ifdef __cplusplus
}
#endif
#endif
