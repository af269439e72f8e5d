// The kernels of a layer apart from its products: norms, rotation, gates, activations, attention.
//
// Each computes its elements in the same way wherever they are, so a token's results do not depend
// on its place in a step. NaN and infinity pass through.
#pragma once

#include <cstddef>
#include <cstdint>

// Query heads that attend together: they read a key once.
constexpr int kMostHeads = 2;

struct LayerKernels {
  // y[i] = x[i] / sqrt(mean(x^2) + epsilon) * weight[i]; y may be x.
  void (*rms_norm)(const float* x, const float* weight, float epsilon, int count, float* y);
  // total[i] = residual[i] * x[i] + (total[i] + routed[i]), then h = rms_norm(total). `routed` may
  // be null.
  void (*add_norm)(const float* x, const float* residual, const float* routed, const float* weight, float epsilon,
                   int count, float* total, float* h);
  // y[i] = act(gate[i]) * up[i], in the order silu, relu, gelu, gelu_tanh; y may be `gate`.
  void (*activations[4])(const float* gate, const float* up, int count, float* y);

  // out[j] = bias[j] + sum of h[i] * weight[i * columns + j], for few columns. `bias` may be null.
  void (*narrow_product)(const float* h, const float* weight, const float* bias, int inputs, int columns, float* out);
  // out[i] = A[i] * log(e^a + e^b) of pair i, then exp(out[i]) if `exp`, then at most limit[i] where
  // `limit` is given.
  void (*gates)(const float* pairs, const float* a, const float* limit, bool exp, int count, float* out);
  // coarse[i] = round(gates[i] * per_step[i]) * step[i], fine[i] = gates[i] - coarse[i]. `coarse` may be `gates`.
  void (*split_gates)(const float* gates, const float* per_step, const float* step, int count, float* coarse,
                      float* fine);
  // One head of `dim` channels: rms_norm with `norm`, where it is given, then channels i and i + dim / 2
  // are rotated by cos[i] and sin[i].
  void (*rotate)(const float* x, const float* norm, float epsilon, int dim, const float* cos, const float* sin,
                 float* y);

  // out[i] = clamp(round(x[i] / scale[i]), -128, 127); 0 for NaN.
  void (*to_int8)(const float* x, const float* scale, int count, int8_t* out);
  // out[i] = x[i].
  void (*widen_int8)(const int8_t* x, int count, float* out);
  // out[i] = a[i] * b[i]; out may be a.
  void (*multiply)(const float* a, const float* b, int count, float* out);
  // x[i] *= factor.
  void (*scale)(float* x, float factor, int count);
  // scores[h * stride + t] = query h · key t, for up to kMostHeads queries, which are `row` apart, and `count`
  // keys. Writes up to the next multiple of 4 keys.
  void (*scores)(const float* q, int heads, const float* keys, int row, int count, float* scores, int stride);
  void (*scores_int8)(const float* q, int heads, const int8_t* keys, int row, int count, float* scores, int stride);
  // out[h * out_stride + i] = sum of weights[h * stride + t] * values[t * row + i].
  void (*mix)(const float* weights, int stride, int heads, const float* values, int row, int count, float* out,
              size_t out_stride);
  void (*mix_int8)(const float* weights, int stride, int heads, const int8_t* values, int row, int count, float* out,
                   size_t out_stride);
  // scores[i] = e^(scores[i] - largest), with the largest of `least` and all scores. Returns the sum.
  // Writes up to the next whole vector.
  float (*soften)(float* scores, int count, float least, float* largest);
  // scores[i] += closed where not (keys[i] > bound, or keys[i] == bound and i >= first).
  void (*close_small)(float* scores, const int32_t* keys, int count, int32_t bound, int first, float closed);
  // scores[i] = closed where not stamps[i] <= now.
  void (*close_later)(float* scores, const float* stamps, int count, float now, float closed);
  // Joins parts of a softmax, `stride` apart: each is `row` sums of values, then at `row` the largest score
  // and at row + 1 the sum of the weights.
  void (*join)(const float* parts, size_t stride, int count, int row, float* out);
};
