/* dsv4-kernels: the C interface that every engine and every binding calls.
 *
 * Each op is one function
 *
 *     dsv4_status dsv4_<op>(const dsv4_<op>_args* args, dsv4_stream stream);
 *
 * declared in the header of its family. An op checks its arguments, enqueues its kernels on `stream` and returns. It
 * allocates nothing, never synchronises and never blocks, so it can be captured in a CUDA graph and called from several
 * threads. The caller allocates outputs and workspace; dsv4_workspace() lends a workspace. Data on the device that is
 * out of range (a token id, an expert id) never makes a kernel read or write out of bounds; each op's comment says what
 * the row then holds.
 *
 * Needs no CUDA header. The library loads on machines without a driver; ops then return DSV4_ERROR_NO_DRIVER.
 */
#ifndef DSV4_DSV4_H
#define DSV4_DSV4_H

#include <stddef.h>
#include <stdint.h>

#define DSV4_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* The same type as cudaStream_t and CUstream. NULL is the legacy default stream. */
typedef struct CUstream_st* dsv4_stream;

typedef enum dsv4_status {
  DSV4_OK = 0,
  DSV4_ERROR_INVALID_ARGUMENT = 1, /* an argument that the op cannot take; dsv4_last_error() names it */
  DSV4_ERROR_HOST_TENSOR = 2,      /* arguments are valid but live in host memory: the op runs on CUDA tensors */
  DSV4_ERROR_NO_DRIVER = 3,        /* no CUDA driver, none new enough, or no device */
  DSV4_ERROR_NO_IMAGE = 4,         /* the library holds no compiled image for this device */
  DSV4_ERROR_CUDA = 5              /* a CUDA call failed; dsv4_last_error() has CUDA's error text */
} dsv4_status;

typedef enum dsv4_dtype {
  DSV4_ABSENT = 0, /* a zeroed dsv4_tensor: an optional argument that is not given */
  DSV4_BOOL = 1,
  DSV4_UINT8 = 2,
  DSV4_INT8 = 3,
  DSV4_INT32 = 4,
  DSV4_INT64 = 5,
  DSV4_FLOAT16 = 6,
  DSV4_BFLOAT16 = 7,
  DSV4_FLOAT32 = 8,
  DSV4_FLOAT64 = 9,
  DSV4_FLOAT8_E4M3FN = 10,
  DSV4_FLOAT8_E8M0FNU = 11,
  DSV4_FLOAT4_E2M1FN_X2 = 12, /* two codes per byte, low nibble first; shapes count bytes */
  DSV4_UNSUPPORTED = 13       /* a dtype of the caller's framework that no op takes */
} dsv4_dtype;

#define DSV4_MAX_RANK 4
#define DSV4_MAX_TOP_K 32 /* experts per token */
#define DSV4_HOST (-1)    /* dsv4_tensor.device of host memory */

/* A view of memory that the caller owns. Shapes and strides count elements. */
typedef struct dsv4_tensor {
  void* data;
  int32_t dtype;    /* a dsv4_dtype */
  int32_t device;   /* CUDA device ordinal, or DSV4_HOST */
  int32_t rank;     /* 0 for a scalar */
  int32_t reserved; /* 0 */
  int64_t shape[DSV4_MAX_RANK];
  int64_t stride[DSV4_MAX_RANK];
} dsv4_tensor;

/* "major.minor.patch" of the library. */
DSV4_API const char* dsv4_version(void);

/* The text of the last error on this thread: "op: argument: expected ..., got ...". Never NULL; valid until the next
 * failing call on the same thread. */
DSV4_API const char* dsv4_last_error(void);

/* "int32", "bfloat16", ... as used in error texts. */
DSV4_API const char* dsv4_dtype_name(int32_t dtype);

/* Loads every kernel for a device (an ordinal, or -1 for the current one), so that no later call pays for it. Optional:
 * an op loads what it needs at its first call, also while its stream is being captured. */
DSV4_API dsv4_status dsv4_preload(int32_t device);

/* DSV4_OK if every op can run on the device (ordinal, or -1 for the current one); else the status that ops would
 * return, with the reason in dsv4_last_error(). */
DSV4_API dsv4_status dsv4_device_status(int32_t device);

/* Streams of a device that dsv4_workspace() keeps memory for: more than torch's pool has of one priority, 32. */
#define DSV4_WORKSPACE_STREAMS 64

/* Workspace for one call of an op on `stream`, for a caller that has none of its own: fills `out` with a uint8 tensor
 * of at least `size` zeroed bytes that the library owns. Ops leave a workspace zeroed, so that it can be lent again.
 *
 * Outside of a capture the memory is the stream's, the same at every call for as long as fewer than
 * DSV4_WORKSPACE_STREAMS other streams call this after it. While the stream is being captured it is that graph's alone
 * (of the graph's streams, each has its own), until the graph and its executables are destroyed: replays may run beside
 * other calls. Two executables of one graph share it and must not run at the same time.
 *
 * Ops allocate nothing. This function does, where a stream or a graph needs memory that the library does not have yet,
 * and then waits for that memory to be zeroed, on a stream of its own: nothing is added to `stream` or its graph. The
 * memory of destroyed graphs goes to later ones; it is not returned to the device. */
DSV4_API dsv4_status dsv4_workspace(int32_t device, dsv4_stream stream, size_t size, dsv4_tensor* out);

/* What dsv4_workspace() holds on a device. */
typedef struct dsv4_workspace_report {
  size_t struct_size;   /* sizeof(dsv4_workspace_report), set by the caller */
  size_t stream_blocks; /* that belong to streams */
  size_t graph_blocks;  /* that belong to captured graphs */
  size_t free_blocks;   /* that destroyed graphs gave back */
  size_t bytes;         /* of all of these */
} dsv4_workspace_report;

DSV4_API dsv4_status dsv4_workspace_usage(int32_t device, dsv4_workspace_report* report);

/* One compiled image of one kernel. All strings live as long as the library. */
typedef struct dsv4_image {
  size_t struct_size;       /* sizeof(dsv4_image), set by the caller */
  const char* op;           /* the op that launches it: the stem of its source file */
  const char* symbol;       /* kernel name inside the image */
  const char* language;     /* "cuda", "triton" or "cute" */
  const char* architecture; /* "sm_90a", ... exactly what it was assembled for */
  const char* sha256;       /* of the image's bytes, in hex */
} dsv4_image;

DSV4_API size_t dsv4_image_count(void);
DSV4_API dsv4_status dsv4_image_at(size_t index, dsv4_image* image);

#ifdef __cplusplus
}
#endif
#endif
