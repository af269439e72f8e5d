// A matrix in the memory of the graph: see "Matrices" in docs/native.md.
#pragma once

#include <cstddef>
#include <cstdint>

enum class Format { kFloat, kFloat16, kBfloat16, kCodes8, kCodes4 };

struct Matrix {
  Format format = Format::kFloat;
  bool transposed = false;  // unquantized weights [outputs, inputs]; codes always are
  int inputs = 0, outputs = 0, block = 0, blocks = 0;
  const void* weight = nullptr;
  const float* scales = nullptr;
  const float* bias = nullptr;  // may be null
};
