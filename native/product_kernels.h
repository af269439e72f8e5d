// The kernels of products: see `product.h` for what they are used for.
#pragma once

#include <cstddef>
#include <cstdint>

struct ProductKernels {
  int width;  // floats of a vector
};
