// Attention of one or a few new tokens: parts of the keys are attended to by different threads, then
// joined.
//
// A part begins at a fixed number of keys, so a token's result does not depend on the other
// sequences of a step or on the number of threads. Knows rows of float32 and of int8.
#pragma once

#include <cmath>

#include "kernels.h"

struct Parts {
  static constexpr int kKeys = 128;  // of a part

  int row;    // channels
  int count;  // parts of the longest sequence

  static int of(int64_t keys) { return static_cast<int>((keys + kKeys - 1) / kKeys); }
  // Floats of a part: sums of values, the largest score, the sum of the weights.
  size_t size() const { return (static_cast<size_t>(row) + 2 + 15) / 16 * 16; }
  // Floats of all parts of one query head of a token.
  size_t stride() const { return count * size(); }
};

inline void score(const LayerKernels& kernels, const float* q, int heads, const float* keys, int row, int count,
                  float* scores, int stride) {
  kernels.scores(q, heads, keys, row, count, scores, stride);
}
inline void score(const LayerKernels& kernels, const float* q, int heads, const int8_t* keys, int row, int count,
                  float* scores, int stride) {
  kernels.scores_int8(q, heads, keys, row, count, scores, stride);
}
inline void mix(const LayerKernels& kernels, const float* weights, int stride, int heads, const float* values, int row,
                int count, float* out, size_t out_stride) {
  kernels.mix(weights, stride, heads, values, row, count, out, out_stride);
}
inline void mix(const LayerKernels& kernels, const float* weights, int stride, int heads, const int8_t* values, int row,
                int count, float* out, size_t out_stride) {
  kernels.mix_int8(weights, stride, heads, values, row, count, out, out_stride);
}

// Lets the `heads` query heads of one key head attend to one part of its keys, of which there are 1
// to kKeys. `out` is the part of the first head. mask(head, scores) may change the scores of a head.
template <class Element, class Mask>
void attend(const LayerKernels& kernels, const Parts& parts, const float* q, int heads, const Element* keys,
            const Element* values, int count, Mask mask, float* out) {
  alignas(64) float scores[kMostHeads * Parts::kKeys];
  for (int first = 0; first < heads; first += kMostHeads) {
    int together = heads - first < kMostHeads ? heads - first : kMostHeads;
    float* part = out + first * parts.stride();
    score(kernels, q + static_cast<size_t>(first) * parts.row, together, keys, parts.row, count, scores, Parts::kKeys);
    for (int i = 0; i < together; i++) {
      float* own = scores + i * Parts::kKeys;
      float* largest = part + i * parts.stride() + parts.row;
      mask(first + i, own);
      largest[1] = kernels.soften(own, count, -INFINITY, largest);
    }
    mix(kernels, scores, Parts::kKeys, together, values, parts.row, count, part, parts.stride());
  }
}
