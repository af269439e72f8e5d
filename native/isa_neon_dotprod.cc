// All kernels for one instruction set: neon_dotprod.
#define KERNEL_SET neon_dotprod
#define KERNEL_WIDTH 4

#include "kernels.h"
#include "simd.h"
#include "product_kernels.inl"
#include "layer_kernels.inl"

extern const Kernels kNeonDotprodKernels;
const Kernels kNeonDotprodKernels = {"neon_dotprod", KERNEL_SET::product_kernels, KERNEL_SET::layer_kernels};
