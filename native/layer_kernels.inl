// The kernels of `layer_kernels.h`, compiled once for each instruction set.

namespace KERNEL_SET {

static void rms_norm(const float* x, const float* weight, float epsilon, int count, float* y) {
  Floats squares{};
  int i = 0;
  for (; i + W <= count; i += W) squares += load(x + i) * load(x + i);
  float total = sum(squares);
  for (; i < count; i++) total += x[i] * x[i];
  float scale = 1.0f / __builtin_sqrtf(total / count + epsilon);
  for (i = 0; i + W <= count; i += W) store(y + i, load(x + i) * scale * load(weight + i));
  for (; i < count; i++) y[i] = x[i] * scale * weight[i];
}

static const LayerKernels layer_kernels = {
    rms_norm,
};

}  // namespace KERNEL_SET
