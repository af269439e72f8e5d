// All kernels for one instruction set: avx512_vnni.
#define KERNEL_SET avx512_vnni
#define KERNEL_WIDTH 16

#include "kernels.h"
#include "simd.h"
#include "product_kernels.inl"
#include "layer_kernels.inl"

extern const Kernels kAvx512VnniKernels;
const Kernels kAvx512VnniKernels = {"avx512_vnni", KERNEL_SET::product_kernels, KERNEL_SET::layer_kernels};
