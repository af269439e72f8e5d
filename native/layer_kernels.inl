// The kernels of `layer_kernels.h`, compiled once for each instruction set.

namespace KERNEL_SET {

// Elements behind the last whole vector, with zeros behind them.
ALWAYS_INLINE Floats load_part(const float* x, int count) {
  float part[W] = {};
  for (int i = 0; i < count; i++) part[i] = x[i];
  return load(part);
}
ALWAYS_INLINE void store_part(float* y, Floats v, int count) {
  float part[W];
  store(part, v);
  for (int i = 0; i < count; i++) y[i] = part[i];
}

// Calls body(i, load, store) for each vector of `count` elements, the last of which may be a part.
struct Whole {
  Floats operator()(const float* x) const { return load(x); }
  void operator()(float* y, Floats v) const { store(y, v); }
};
struct Part {
  int count;
  Floats operator()(const float* x) const { return load_part(x, count); }
  void operator()(float* y, Floats v) const { store_part(y, v, count); }
};
template <class Body>
ALWAYS_INLINE void for_vectors(int count, Body body) {
  int i = 0;
  for (; i + W <= count; i += W) body(i, Whole{});
  if (i < count) body(i, Part{count - i});
}

static void rms_norm(const float* x, const float* weight, float epsilon, int count, float* y) {
  Floats squares{};
  for_vectors(count, [&](int i, auto at) { squares += at(x + i) * at(x + i); });
  float scale = 1.0f / __builtin_sqrtf(sum(squares) / count + epsilon);
  for_vectors(count, [&](int i, auto at) { at(y + i, at(x + i) * scale * at(weight + i)); });
}

static void add_norm(const float* x, const float* residual, const float* routed, const float* weight, float epsilon,
                     int count, float* total, float* h) {
  for_vectors(count, [&](int i, auto at) {
    Floats update = at(total + i);
    if (routed) update += at(routed + i);
    at(total + i, at(residual + i) * at(x + i) + update);
  });
  rms_norm(total, weight, epsilon, count, h);
}

ALWAYS_INLINE Floats silu(Floats x) { return x / (1.0f + exponential(-x)); }
ALWAYS_INLINE Floats relu(Floats x) { return x < 0.0f ? Floats{} : x; }
// x · Phi(x), with the complementary error function as a Chebyshev fit with a relative error below
// 1.2e-7 (Press et al., Numerical Recipes, section 6.2).
ALWAYS_INLINE Floats gelu(Floats x) {
  Floats z = absolute(x) * 0.70710678f;
  Floats t = 1.0f / (1.0f + 0.5f * z);
  Floats p = all(0.17087277f);
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  Floats tail = t * exponential(p - z * z);
  return 0.5f * x * (x < 0.0f ? tail : 2.0f - tail);
}
// 0.5 · (1 + tanh(u)) is 1 / (1 + e^(-2u)).
ALWAYS_INLINE Floats gelu_tanh(Floats x) {
  Floats u = 0.79788456f * (x + 0.044715f * x * x * x);
  return x / (1.0f + exponential(-2.0f * u));
}

template <Floats act(Floats)>
static void activate(const float* gate, const float* up, int count, float* y) {
  for_vectors(count, [&](int i, auto at) { at(y + i, act(at(gate + i)) * at(up + i)); });
}

static void narrow_product(const float* h, const float* weight, const float* bias, int inputs, int columns,
                           float* out) {
  for (int j = 0; j < columns; j += W) {
    int count = columns - j < W ? columns - j : W;
    // A vector may read on into the next row of the weight, as long as it ends within the last.
    size_t end = static_cast<size_t>(inputs) * columns;
    int safe = inputs;
    while (safe > 0 && static_cast<size_t>(safe - 1) * columns + j + W > end) safe--;
    const float* w = weight + j;
    Floats total[4] = {};
    int i = 0;
    for (; i + 4 <= safe; i += 4)
      for (int lane = 0; lane < 4; lane++) total[lane] += h[i + lane] * load(w + static_cast<size_t>(i + lane) * columns);
    for (; i < safe; i++) total[0] += h[i] * load(w + static_cast<size_t>(i) * columns);
    for (; i < inputs; i++) total[0] += h[i] * load_part(w + static_cast<size_t>(i) * columns, count);
    Floats all_rows = (total[0] + total[1]) + (total[2] + total[3]);
    if (bias) all_rows += load_part(bias + j, count);
    store_part(out + j, all_rows, count);
  }
}

// log(1 + x) for x from 0 to 1, as 2 · artanh(x / (2 + x)).
ALWAYS_INLINE Floats log_of_one_plus(Floats x) {
  Floats s = x / (2.0f + x), z = s * s;
  Floats p = all(1.0f / 15);
  p = p * z + 1.0f / 13;
  p = p * z + 1.0f / 11;
  p = p * z + 1.0f / 9;
  p = p * z + 1.0f / 7;
  p = p * z + 1.0f / 5;
  p = p * z + 1.0f / 3;
  return 2.0f * (s + s * z * p);
}

static void gates(const float* pairs, const float* a, const float* limit, bool exp, int count, float* out) {
  for (int i = 0; i < count; i += W) {
    int part = count - i < W ? count - i : W;
    float left[W] = {}, right[W] = {};
    for (int j = 0; j < part; j++) {
      left[j] = pairs[2 * (i + j)];
      right[j] = pairs[2 * (i + j) + 1];
    }
    Floats x = load(left), y = load(right);
    Floats gate = larger(x, y) + log_of_one_plus(exponential(-absolute(x - y)));
    gate *= load_part(a + i, part);
    if (exp) gate = exponential(gate);
    if (limit) {
      Floats most = load_part(limit + i, part);
      gate = gate > most ? most : gate;
    }
    store_part(out + i, gate, part);
  }
}

static void split_gates(const float* gates, const float* per_step, const float* step, int count, float* coarse,
                        float* fine) {
  for (int i = 0; i < count; i++) {
    float gate = gates[i], whole = __builtin_rintf(gate * per_step[i]) * step[i];
    coarse[i] = whole;
    fine[i] = gate - whole;
  }
}

static void rotate(const float* x, const float* norm, float epsilon, int dim, const float* cos, const float* sin,
                   float* y) {
  int half = dim / 2;
  float scale = 1.0f;
  if (norm) {
    Floats squares{};
    for_vectors(dim, [&](int i, auto at) { squares += at(x + i) * at(x + i); });
    scale = 1.0f / __builtin_sqrtf(sum(squares) / dim + epsilon);
  }
  for_vectors(half, [&](int i, auto at) {
    Floats left = at(x + i), right = at(x + half + i), c = at(cos + i), s = at(sin + i);
    if (norm) {
      left = left * scale * at(norm + i);
      right = right * scale * at(norm + half + i);
    }
    at(y + i, left * c - right * s);
    at(y + half + i, right * c + left * s);
  });
  if (dim % 2) y[dim - 1] = norm ? x[dim - 1] * scale * norm[dim - 1] : x[dim - 1];
}

ALWAYS_INLINE Floats widen(const float* x) { return load(x); }
ALWAYS_INLINE Floats widen(const int8_t* x) { return load_bytes(x); }
ALWAYS_INLINE Floats widen_part(const float* x, int count) { return load_part(x, count); }
ALWAYS_INLINE Floats widen_part(const int8_t* x, int count) {
  float part[W] = {};
  for (int i = 0; i < count; i++) part[i] = x[i];
  return load(part);
}

static void to_int8(const float* x, const float* scale, int count, int8_t* out) {
  typedef int8_t Small __attribute__((vector_size(W)));
  for_vectors(count, [&](int i, auto at) {
    Floats v = at(x + i) / at(scale + i);
    v = v < -128.0f ? all(-128.0f) : v;
    v = v > 127.0f ? all(127.0f) : v;
    v = v == v ? v : Floats{};
    // Adding 1.5 * 2^23 rounds to whole numbers.
    Small codes = __builtin_convertvector(__builtin_convertvector((v + 12582912.0f) - 12582912.0f, Ints), Small);
    int part = count - i < W ? count - i : W;
    if (part == W) *reinterpret_cast<SmallAt*>(out + i) = codes;
    else __builtin_memcpy(out + i, &codes, part);
  });
}

static void widen_int8(const int8_t* x, int count, float* out) {
  int i = 0;
  for (; i + W <= count; i += W) store(out + i, widen(x + i));
  for (; i < count; i++) out[i] = x[i];
}

static void scale(float* x, float factor, int count) {
  for_vectors(count, [&](int i, auto at) { at(x + i, at(x + i) * factor); });
}

static void multiply(const float* a, const float* b, int count, float* out) {
  for_vectors(count, [&](int i, auto at) { at(out + i, at(a + i) * at(b + i)); });
}

// The last row % W channels of a row. Where a row fills a vector, they are the end of one that
// begins earlier, with zeros in place of what was read before.
struct Rest {
  int row, count;
  Ints kept;
  explicit Rest(int channels) : row(channels), count(channels % W), kept{} {
    int first = row > W ? W - count : 0, last = row > W ? W : count;
    for (int i = first; i < last; i++) kept[i] = -1;
  }
  template <class T>
  Floats operator()(const T* x) const {
    if (row < W) return widen_part(x, row);
    return (Floats)((Ints)widen(x + row - W) & kept);
  }
};

template <int HEADS, class T>
ALWAYS_INLINE void score_heads(const float* q, const T* keys, int row, int count, float* scores, int stride) {
  const int whole = row / W * W;
  const Rest rest(row);
  for (int t = 0; t < count; t += 4) {
    const T* key[4];
    for (int j = 0; j < 4; j++) key[j] = keys + static_cast<size_t>(t + j < count ? t + j : count - 1) * row;
    // Four keys at a time are read too slowly from memory where they are wide.
    if (sizeof(T) == sizeof(float))
      for (size_t i = 0; i < 4 * row * sizeof(T); i += 64) ask_ahead(reinterpret_cast<const char*>(key[0]) + i);
    Floats total[HEADS][4] = {};
    auto add = [&](const Floats* query, auto read) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        Floats channels = read(key[j]);
#pragma GCC unroll 2
        for (int h = 0; h < HEADS; h++) total[h][j] += query[h] * channels;
      }
    };
    Floats query[HEADS];
    for (int i = 0; i < whole; i += W) {
#pragma GCC unroll 2
      for (int h = 0; h < HEADS; h++) query[h] = load(q + h * row + i);
      add(query, [i](const T* x) { return widen(x + i); });
    }
    if (rest.count) {
      for (int h = 0; h < HEADS; h++) query[h] = rest(q + h * row);
      add(query, rest);
    }
#pragma GCC unroll 2
    for (int h = 0; h < HEADS; h++)
      *reinterpret_cast<Floats4At*>(scores + h * stride + t) = sum_four(total[h][0], total[h][1], total[h][2], total[h][3]);
  }
}

template <class T>
static void score(const float* q, int heads, const T* keys, int row, int count, float* scores, int stride) {
  if (heads == 2) score_heads<2>(q, keys, row, count, scores, stride);
  else score_heads<1>(q, keys, row, count, scores, stride);
}

// Vectors of channels that one pass over the keys sums up: as many as there are registers.
#if KERNEL_WIDTH == 16
constexpr int kMixed = 9;
#else
constexpr int kMixed = 6;
#endif

template <int HEADS, int VECTORS, class T>
ALWAYS_INLINE void mix_vectors(const float* weights, int stride, const T* values, int row, int first, int count,
                               float* out, size_t out_stride) {
  // The last vector of a row may begin earlier and compute some channels once more.
  int at[VECTORS];
  for (int j = 0; j < VECTORS; j++) at[j] = first + (j + 1) * W <= row ? first + j * W : row - W;
  const T* last = values + at[VECTORS - 1];
  const T* from = values + first;
  Floats total[HEADS][VECTORS] = {};
  for (int t = 0; t < count; t++, last += row, from += row) {
    Floats weight[HEADS];
#pragma GCC unroll 2
    for (int h = 0; h < HEADS; h++) weight[h] = all(weights[h * stride + t]);
#pragma GCC unroll 9
    for (int j = 0; j < VECTORS; j++) {
      Floats channels = widen(j + 1 < VECTORS ? from + j * W : last);
#pragma GCC unroll 2
      for (int h = 0; h < HEADS; h++) total[h][j] += weight[h] * channels;
    }
  }
  for (int h = 0; h < HEADS; h++)
    for (int j = 0; j < VECTORS; j++) store(out + h * out_stride + at[j], total[h][j]);
}

template <int HEADS, int VECTORS, class T>
ALWAYS_INLINE void mix_rest(int vectors, const float* weights, int stride, const T* values, int row, int first,
                            int count, float* out, size_t out_stride) {
  if constexpr (VECTORS > 0) {
    if (vectors == VECTORS) mix_vectors<HEADS, VECTORS>(weights, stride, values, row, first, count, out, out_stride);
    else mix_rest<HEADS, VECTORS - 1>(vectors, weights, stride, values, row, first, count, out, out_stride);
  }
}

template <int HEADS, class T>
ALWAYS_INLINE void mix_heads(const float* weights, int stride, const T* values, int row, int count, float* out,
                             size_t out_stride) {
  if (row < W) {
    for (int h = 0; h < HEADS; h++) {
      Floats total{};
      for (int t = 0; t < count; t++)
        total += all(weights[h * stride + t]) * widen_part(values + static_cast<size_t>(t) * row, row);
      store_part(out + h * out_stride, total, row);
    }
    return;
  }
  int vectors = (row + W - 1) / W, first = 0;
  for (; vectors > kMixed; vectors -= kMixed, first += kMixed * W)
    mix_vectors<HEADS, kMixed>(weights, stride, values, row, first, count, out, out_stride);
  mix_rest<HEADS, kMixed>(vectors, weights, stride, values, row, first, count, out, out_stride);
}

template <class T>
static void mix(const float* weights, int stride, int heads, const T* values, int row, int count, float* out,
                size_t out_stride) {
  if (heads == 2) mix_heads<2>(weights, stride, values, row, count, out, out_stride);
  else mix_heads<1>(weights, stride, values, row, count, out, out_stride);
}

static float soften(float* scores, int count, float least, float* largest) {
  int end = (count + W - 1) / W * W;
  for (int i = count; i < end; i++) scores[i] = -__builtin_inff();
  Floats most = all(least);
  for (int i = 0; i < end; i += W) most = larger(most, load(scores + i));
  float lanes[W];
  store(lanes, most);
  float top = least;
  for (int i = 0; i < W; i++) top = top > lanes[i] ? top : lanes[i];
  // If all are -inf, their weights are 0.
  float base = top == -__builtin_inff() ? 0.0f : top;
  Floats total{};
  for (int i = 0; i < end; i += W) {
    Floats weight = exponential(load(scores + i) - base);
    store(scores + i, weight);
    total += weight;
  }
  *largest = top;
  return sum(total);
}

static void close_small(float* scores, const int32_t* keys, int count, int32_t bound, int first, float closed) {
  for (int i = 0; i < count; i++) {
    bool kept = (keys[i] > bound) | ((keys[i] == bound) & (i >= first));
    scores[i] += kept ? 0.0f : closed;
  }
}

static void close_later(float* scores, const float* stamps, int count, float now, float closed) {
  for (int i = 0; i < count; i++) scores[i] = stamps[i] <= now ? scores[i] : closed;
}

static void join(const float* parts, size_t stride, int count, int row, float* out) {
  float top = parts[row];
  for (int p = 1; p < count; p++) top = top > parts[p * stride + row] ? top : parts[p * stride + row];
  if (top == -__builtin_inff()) top = 0.0f;
  float total = 0.0f;
  for (int p = 0; p < count; p++) {
    const float* part = parts + p * stride;
    float weight = exponential(all(part[row] - top))[0];
    total += weight * part[row + 1];
    for_vectors(row, [&](int i, auto at) {
      Floats before = p ? at(out + i) : Floats{};
      at(out + i, before + weight * at(part + i));
    });
  }
  for_vectors(row, [&](int i, auto at) { at(out + i, at(out + i) / total); });
}

static const LayerKernels layer_kernels = {
    rms_norm,
    add_norm,
    {activate<silu>, activate<relu>, activate<gelu>, activate<gelu_tanh>},
    narrow_product,
    gates,
    split_gates,
    rotate,
    to_int8,
    widen_int8,
    multiply,
    scale,
    score<float>,
    score<int8_t>,
    mix<float>,
    mix<int8_t>,
    soften,
    close_small,
    close_later,
    join,
};

}  // namespace KERNEL_SET
