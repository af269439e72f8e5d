// The kernels of `product_kernels.h`, compiled once for each instruction set.

namespace KERNEL_SET {

static const ProductKernels product_kernels = {
    W,
};

}  // namespace KERNEL_SET
