// The attributes that all operators of attention have.
#pragma once

#include "processor.h"
#include "product.h"

struct AttentionAttributes {
  explicit AttentionAttributes(Attributes& attributes)
      : heads(attributes.number("heads", 1, 4096)),
        kv_heads(attributes.number("kv_heads", 1, 4096)),
        dim(attributes.number("head_dim", 1, 65536)),
        gates(attributes.number("gates", 1, 4096)),
        window(attributes.number("window", 0, INT32_MAX)),
        closed(attributes.real("closed")),
        matrix(attributes, "output_"),
        epsilon(attributes.real("epsilon")),
        kernels(&chosen_kernels()) {
    if (attributes.status()) return;
    if (heads % kv_heads || heads / kv_heads % gates) {
      attributes.fail("%d heads, %d key heads and %d gates do not fit", heads, kv_heads, gates);
    }
  }

  const int heads, kv_heads, dim, gates, window;
  const float closed;
  const MatrixInput matrix;
  const float epsilon;
  const Kernels* const kernels;
};
