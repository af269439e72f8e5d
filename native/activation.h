// The activation functions of an MLP or of experts, by the names that a config has for them.
#pragma once

#include "context.h"
#include "kernels.h"

using Activation = void (*)(const float* gate, const float* up, int count, float* y);

// The function that the attribute `activation` names; null, and a failure, if there is none.
inline Activation read_activation(Attributes& attributes, const Kernels& kernels) {
  static constexpr const char* kNames[] = {"silu", "relu", "gelu", "gelu_tanh"};
  char name[16] = "";
  attributes.text("activation", name, sizeof name);
  for (int i = 0; i < 4; i++)
    if (__builtin_strcmp(name, kNames[i]) == 0) return kernels.layer.activations[i];
  attributes.fail("the activation %s is not known", name);
  return nullptr;
}
