// Every image in the library, of every language; images.cpp is generated from the sidecars after the kernels are built.
#pragma once

#include <dsv4/dsv4.h>

namespace dsv4 {

extern const dsv4_image images[];
extern const size_t image_count;

}  // namespace dsv4
