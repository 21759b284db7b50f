#include "core/dtype.h"

extern "C" const char* dsv4_dtype_name(int32_t dtype) {
  switch (dtype) {
    case DSV4_ABSENT: return "none";
    case DSV4_BOOL: return "bool";
    case DSV4_UINT8: return "uint8";
    case DSV4_INT8: return "int8";
    case DSV4_INT32: return "int32";
    case DSV4_INT64: return "int64";
    case DSV4_FLOAT16: return "float16";
    case DSV4_BFLOAT16: return "bfloat16";
    case DSV4_FLOAT32: return "float32";
    case DSV4_FLOAT64: return "float64";
    case DSV4_FLOAT8_E4M3FN: return "float8_e4m3fn";
    case DSV4_FLOAT8_E8M0FNU: return "float8_e8m0fnu";
    case DSV4_FLOAT4_E2M1FN_X2: return "float4_e2m1fn_x2";
    default: return "an unsupported dtype";
  }
}
