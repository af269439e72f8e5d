// The kernels that each instruction set has: one table for products, one for all else in a layer.
//
// The tables are declared in `product_kernels.h` and `layer_kernels.h`. Their functions are written
// once, in the files of the same names that end in .inl, on the vectors of `simd.h`; each file
// `isa_*.cc` compiles them for one instruction set.
#pragma once

#include "layer_kernels.h"
#include "product_kernels.h"

struct Kernels {
  const char* name;  // of the instruction set
  ProductKernels product;
  LayerKernels layer;
};
