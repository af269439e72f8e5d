// All kernels for one instruction set: scalar.
#define KERNEL_SET scalar
#define KERNEL_WIDTH 4
#define KERNEL_PLAIN

#include "kernels.h"
#include "simd.h"
#include "product_kernels.inl"
#include "layer_kernels.inl"

extern const Kernels kScalarKernels;
const Kernels kScalarKernels = {"scalar", KERNEL_SET::product_kernels, KERNEL_SET::layer_kernels};
