/* A CUDA driver that says how it is and does nothing: for what happens where the driver is old or sees no device.
 *
 * STUB_INIT: what cuInit returns. STUB_VERSION: the driver's CUDA version, 13000 for 13.0. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static int setting(const char* name, int otherwise) {
  const char* value = getenv(name);
  return value ? atoi(value) : otherwise;
}

int cuInit(unsigned flags) {
  (void)flags;
  return setting("STUB_INIT", 0);
}

int cuDriverGetVersion(int* version) {
  *version = setting("STUB_VERSION", 13000);
  return 0;
}

static int not_supported(void) { return 801; }

int cuGetProcAddress_v2(const char* symbol, void** function, int version, uint64_t flags, int* status) {
  static const struct {
    const char* name;
    void* function;
  } known[] = {
      {"cuInit", (void*)&cuInit},
      {"cuDriverGetVersion", (void*)&cuDriverGetVersion},
      {"cuGetProcAddress", (void*)&cuGetProcAddress_v2},
  };
  (void)version;
  (void)flags;
  *function = (void*)&not_supported;
  for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); ++i)
    if (strcmp(symbol, known[i].name) == 0) *function = known[i].function;
  if (status) *status = 0;
  return 0;
}
