// Attention of several new tokens: blocks of queries with blocks of keys, and a running softmax (Dao et
// al. 2022, FlashAttention).
//
// Keys and values become packed matrices, so both products run at the speed of large ones. Knows
// rows of float32 and of int8.
#pragma once

#include <cmath>
#include <cstring>

#include "kernels.h"
#include "scratch.h"

class AttentionBlock {
 public:
  static constexpr int kTokens = 64, kKeys = 128;

  // Where the queries of some tokens are: those of a head are `stride` apart, its heads `row`.
  struct Queries {
    const float* first;
    size_t stride;
    int tokens, heads, row;  // at most kTokens tokens
  };

  // False if there is no memory.
  AttentionBlock(const Kernels& kernels, const Queries& queries) : kernels_(kernels), queries_(queries) {
    const size_t row = queries.row, rows = static_cast<size_t>(queries.heads) * queries.tokens;
    auto lay_out = [&](auto give) {
      give(scores_, rows * kKeys);
      give(total_, rows * row);
      give(largest_, rows);
      give(weight_, rows);
      give(panel_, panel_size());
      give(wide_, kKeys * row);
    };
    lay_out([&](float*&, size_t size) { scratch_.reserve<float>(size); });
    if (!scratch_.allocate()) return;
    lay_out([&](float*& place, size_t size) { place = scratch_.take<float>(size); });
    for (size_t i = 0; i < rows; i++) {
      largest_[i] = -INFINITY;
      weight_[i] = 0.0f;
    }
  }
  bool ready() const { return wide_ != nullptr; }

  // Attends to `count` keys and values, up to kKeys, which are `stride` apart. A token sees the first seen(token) of them, and
  // mask(head, token, seen, scores) may change their scores.
  template <class Element, class Seen, class Mask>
  void add(const Element* keys, const Element* values, size_t stride, int count, Seen seen, Mask mask) {
    const ProductKernels& product = kernels_.product;
    const LayerKernels& layer = kernels_.layer;
    const int row = queries_.row, tokens = queries_.tokens;
    product.pack_transposed(widen(keys, count), stride, count, row, panel_);
    for (int head = 0; head < queries_.heads; head++) {
      float* scores = scores_ + static_cast<size_t>(head) * tokens * kKeys;
      product.gemm_panel(queries_.first + static_cast<size_t>(head) * row, queries_.stride, tokens, panel_, row, scores,
                         kKeys, count, false);
    }
    product.pack(widen(values, count), stride, row, count, panel_);
    for (int head = 0; head < queries_.heads; head++) {
      for (int token = 0; token < tokens; token++) {
        const size_t at = static_cast<size_t>(head) * tokens + token;
        float* scores = scores_ + at * kKeys;
        int visible = seen(token);
        if (visible > count) visible = count;
        if (visible > 0) {
          mask(head, token, visible, scores);
          float before = largest_[at];
          float added = layer.soften(scores, visible, before, largest_ + at);
          if (largest_[at] != before && !empty_) {
            float factor = weight_[at] > 0.0f ? expf(before - largest_[at]) : 0.0f;
            weight_[at] *= factor;
            layer.scale(total_ + at * row, factor, row);
          }
          weight_[at] += added;
        }
        for (int i = visible > 0 ? visible : 0; i < count; i++) scores[i] = 0.0f;
      }
      const size_t first = static_cast<size_t>(head) * tokens;
      product.gemm_panel(scores_ + first * kKeys, kKeys, tokens, panel_, count, total_ + first * row, row, row, !empty_);
    }
    empty_ = false;
  }

  // Writes the result of a head of a token.
  void finish(int head, int token, float* out) const {
    const size_t at = static_cast<size_t>(head) * queries_.tokens + token, row = queries_.row;
    memcpy(out, total_ + at * row, row * sizeof(float));
    kernels_.layer.scale(out, 1.0f / weight_[at], static_cast<int>(row));
  }
  // The largest score of a head of a token so far.
  float largest(int head, int token) const { return largest_[static_cast<size_t>(head) * queries_.tokens + token]; }

 private:
  size_t panel_size() const {
    const size_t strip = kernels_.product.strip, row = queries_.row;
    const size_t wide = (row + strip - 1) / strip * strip, keys = (kKeys + strip - 1) / strip * strip;
    return keys * row > wide * kKeys ? keys * row : wide * kKeys;
  }
  const float* widen(const float* rows, int) const { return rows; }
  const float* widen(const int8_t* rows, int count) const {
    kernels_.layer.widen_int8(rows, count * queries_.row, wide_);
    return wide_;
  }

  const Kernels& kernels_;
  const Queries queries_;
  Scratch scratch_;
  bool empty_ = true;
  float *scores_ = nullptr, *total_ = nullptr, *largest_ = nullptr, *weight_ = nullptr, *panel_ = nullptr,
        *wide_ = nullptr;
};
