// All kernels for one instruction set: neon.
#define KERNEL_SET neon
#define KERNEL_WIDTH 4

#include "kernels.h"
#include "simd.h"
#include "product_kernels.inl"
#include "layer_kernels.inl"

extern const Kernels kNeonKernels;
const Kernels kNeonKernels = {"neon", KERNEL_SET::product_kernels, KERNEL_SET::layer_kernels};
