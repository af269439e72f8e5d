// All kernels for one instruction set: avx_vnni.
#define KERNEL_SET avx_vnni
#define KERNEL_WIDTH 8

#include "kernels.h"
#include "simd.h"
#include "product_kernels.inl"
#include "layer_kernels.inl"

extern const Kernels kAvxVnniKernels;
const Kernels kAvxVnniKernels = {"avx_vnni", KERNEL_SET::product_kernels, KERNEL_SET::layer_kernels};
