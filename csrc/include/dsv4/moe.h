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

#ifdef __cplusplus
}
#endif
#endif
