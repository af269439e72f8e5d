// All kernels for one instruction set: avx2.
#define KERNEL_SET avx2
#define KERNEL_WIDTH 8

#include "kernels.h"
#include "simd.h"
#include "product_kernels.inl"
#include "layer_kernels.inl"

extern const Kernels kAvx2Kernels;
const Kernels kAvx2Kernels = {"avx2", KERNEL_SET::product_kernels, KERNEL_SET::layer_kernels};
