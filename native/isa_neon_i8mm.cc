// All kernels for one instruction set: neon_i8mm.
#define KERNEL_SET neon_i8mm
#define KERNEL_WIDTH 4

#include "kernels.h"
#include "simd.h"
#include "product_kernels.inl"
#include "layer_kernels.inl"

extern const Kernels kNeonI8mmKernels;
const Kernels kNeonI8mmKernels = {"neon_i8mm", KERNEL_SET::product_kernels, KERNEL_SET::layer_kernels};
