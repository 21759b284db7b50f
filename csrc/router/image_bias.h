// The second bias of the gates of vision models.
#pragma once

#include "core/check.h"

namespace dsv4 {

// bias_alt and bias_alt_mask come together.
inline void check_image_bias(Check& check, const dsv4_tensor& bias_alt, const dsv4_tensor& bias_alt_mask,
                             int64_t tokens, int64_t experts) {
  check.optional_tensor("bias_alt", bias_alt, one_of(DSV4_FLOAT32), {experts});
  check.optional_tensor("bias_alt_mask", bias_alt_mask, one_of(DSV4_BOOL), {tokens});
  if (present(bias_alt_mask)) check.tensor("bias_alt", bias_alt, one_of(DSV4_FLOAT32), {experts});
  if (present(bias_alt)) check.tensor("bias_alt_mask", bias_alt_mask, one_of(DSV4_BOOL), {tokens});
}

}  // namespace dsv4
