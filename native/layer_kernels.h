// The kernels of a layer apart from its products: norms, rotation, gates, activations, attention.
#pragma once

#include <cstddef>
#include <cstdint>

struct LayerKernels {
  // y[i] = x[i] / sqrt(mean(x^2) + epsilon) * weight[i]; y may be x.
  void (*rms_norm)(const float* x, const float* weight, float epsilon, int count, float* y);
};
