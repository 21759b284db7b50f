/* A window onto the one launch function of the library, for tests. Not for production use. */
#ifndef DSV4_TESTING_H
#define DSV4_TESTING_H

#include <dsv4/dsv4.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct dsv4_launch {
  const char* symbol;
  const char* language;
  const char* architecture; /* of the image that runs */
  uint32_t grid[3];
  uint32_t block[3];
  uint32_t cluster[3];
  uint32_t dynamic_shared; /* bytes */
  uint32_t parameter_count;
  const void* const* parameters;   /* parameter_count pointers to the values */
  const uint32_t* parameter_sizes; /* bytes of each */
  dsv4_stream stream;
} dsv4_launch;

/* What a launch returns instead of, or before, running on a device. */
typedef dsv4_status (*dsv4_launch_observer)(const dsv4_launch* launch, void* user);

/* Calls `observer` for every kernel launch of the process until it is called again with NULL and NULL.
 * architecture == NULL: observe, then launch if the observer returned DSV4_OK.
 * architecture given ("sm_100a"): emulate. Nothing touches a driver or a GPU: ops take host tensors, believe to run on
 * a device of that architecture with that many multiprocessors, and the observer's status is the launch's. Without an
 * observer launches succeed and do nothing, so that the host's share of a call can be timed. */
DSV4_API dsv4_status dsv4_observe_launches(const char* architecture, int32_t multiprocessors,
                                           dsv4_launch_observer observer, void* user);

#ifdef __cplusplus
}
#endif
#endif
