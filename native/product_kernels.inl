// The kernels of `product_kernels.h`, compiled once for each instruction set.
//
// Three parts: few rows times codes, in integers; few rows times unquantized weights; many rows, by
// strips of weights that are unpacked to float32.

namespace KERNEL_SET {

constexpr int kStrip = W < 16 ? 16 : 32;      // columns that a strip of float32 weights has
constexpr int kStripVectors = kStrip / W;
constexpr int kDepth = 256;                   // rows of a strip that are unpacked at a time
constexpr int kAhead = 4096;                  // bytes between reading weights and asking for them

// Rows of a block of a product that is kept in registers.
#if defined(KERNEL_PLAIN)
constexpr int kTileRows = 2;
#elif KERNEL_WIDTH == 16
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif

ALWAYS_INLINE int least(int a, int b) { return a < b ? a : b; }

// Formats of unquantized weights.
struct Float {
  typedef float Type;
  ALWAYS_INLINE Floats vector(const float* x) { return load(x); }
  ALWAYS_INLINE float number(float x) { return x; }
};
struct Float16 {
  typedef uint16_t Type;
  ALWAYS_INLINE Floats vector(const uint16_t* x) { return load_float16(x); }
  ALWAYS_INLINE float number(uint16_t x) { return from_float16(x); }
};
struct Bfloat16 {
  typedef uint16_t Type;
  ALWAYS_INLINE Floats vector(const uint16_t* x) { return load_bfloat16(x); }
  ALWAYS_INLINE float number(uint16_t x) { return from_bfloat16(x); }
};

// ---- Few rows times codes --------------------------------------------------------------------
//
// A vector of codes, seen as int16, holds in each lane two codes of 8 bits or four of 4 bits. Shifts
// give as many vectors of signed codes, and activations lie in memory in the order of those.

template <int BITS>
struct Codes {
  static constexpr int kCount = 4 * W * 8 / BITS;  // codes of a vector
  static constexpr int kVectors = 16 / BITS;       // vectors of int16 they become
  // Vectors that are summed in integers: no more than registers hold.
  static constexpr int kTogether = BITS == 8 ? 2 : 1;

  ALWAYS_INLINE void unpack(Shorts codes, Shorts* out) {
    // The top bit of a code minus the zero point is its sign.
    codes ^= static_cast<int16_t>(BITS == 8 ? 0x8080 : 0x8888);
    UNROLLED
    for (int i = 0; i < kVectors; i++) out[i] = (codes << (16 - BITS * (i + 1))) >> (16 - BITS);
  }
};

static size_t padded_inputs(const Matrix& matrix) {
  size_t count = matrix.format == Format::kCodes8 ? Codes<8>::kCount : Codes<4>::kCount;
  size_t inputs = static_cast<size_t>(matrix.blocks) * matrix.block;
  return (inputs + count - 1) / count * count;
}

template <int BITS>
ALWAYS_INLINE void arrange(const int16_t* in, int16_t* out) {
  constexpr int kVectors = Codes<BITS>::kVectors;
  for (int v = 0; v < kVectors; v++)
    for (int i = 0; i < 2 * W; i++) out[v * 2 * W + i] = in[i * kVectors + v];
}

static bool quantize(const Matrix& matrix, const float* x, int16_t* values, float* scale) {
  const int count = matrix.inputs;
  const int padded = static_cast<int>(padded_inputs(matrix));
  // A NaN makes `odd` a NaN, as does an infinity.
  Floats most{}, odd{};
  int i = 0;
  for (; i + W <= count; i += W) {
    Floats v = load(x + i);
    most = larger(absolute(v), most);
    odd += v * 0.0f;
  }
  float largest = 0, rest = sum(odd);
  for (; i < count; i++) {
    largest = __builtin_fabsf(x[i]) > largest ? __builtin_fabsf(x[i]) : largest;
    rest += x[i] * 0.0f;
  }
  float lanes[W];
  store(lanes, most);
  for (i = 0; i < W; i++) largest = lanes[i] > largest ? lanes[i] : largest;
  *scale = 0;
  if (rest != 0.0f || largest < 1e-30f) {
    __builtin_memset(values, 0, padded * sizeof(int16_t));
    return rest == 0.0f && largest == 0.0f;
  }
  // The largest number can be written as 256 a + b with a and b from -128 to 127.
  const float kLargest = 32639.0f;
  *scale = largest / kLargest;
  const float inverse = kLargest / largest;
  const Floats magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to whole numbers
  const int step = matrix.format == Format::kCodes8 ? Codes<8>::kCount : Codes<4>::kCount;
  for (int first = 0; first < padded; first += step) {
    int16_t numbers[Codes<4>::kCount];
    int there = least(step, count - first);
    for (i = 0; i + W <= there; i += W) {
      Ints rounded = (Ints)(load(x + first + i) * inverse + magic);
      *reinterpret_cast<ShortHalfAt*>(numbers + i) = __builtin_convertvector(rounded, ShortHalfAt);
    }
    for (; i < step; i++) {
      float rounded = i < there ? x[first + i] * inverse + 12582912.0f : 12582912.0f;
      uint32_t bits;
      __builtin_memcpy(&bits, &rounded, 4);
      numbers[i] = static_cast<int16_t>(bits);
    }
    if (matrix.format == Format::kCodes8) arrange<8>(numbers, values + first);
    else arrange<4>(numbers, values + first);
  }
  return true;
}

// Products of COLUMNS rows of codes with ROWS rows of activations: sums[column][row]. A sum is
// built in the same order whatever COLUMNS and ROWS are.
template <int BITS, int BLOCK, int COLUMNS, int ROWS>
ALWAYS_INLINE void sum_codes(const uint8_t* codes, size_t row_bytes, const float* scales, int blocks,
                             const int16_t* x, size_t stride, Floats (*sums)[ROWS]) {
  using C = Codes<BITS>;
  // A unit is what is summed in integers: a block, a part of one, or several blocks of one vector.
  constexpr int kPerBlock = BLOCK / C::kCount;  // vectors
  constexpr int kUnit = kPerBlock < 1 ? 1 : kPerBlock < C::kTogether ? kPerBlock : C::kTogether;
  constexpr int kSteps = kPerBlock < 1 ? C::kCount / BLOCK : 1;     // scales of a unit
  constexpr int kUnits = kPerBlock < 1 ? 1 : kPerBlock / kUnit;     // units of a block
  constexpr int kBytes = kUnit * 4 * W, kVectors = kUnit * C::kVectors;
  UNROLLED
  for (int c = 0; c < COLUMNS; c++) {
    UNROLLED
    for (int r = 0; r < ROWS; r++) sums[c][r] = Floats{};
  }
  // Adds unit `at` of column c.
  auto add = [&](int c, const uint8_t* from, const float* steps, size_t at) __attribute__((always_inline)) {
    Shorts signed_codes[kVectors];
    UNROLLED
    for (int u = 0; u < kUnit; u++) C::unpack(load_shorts(from + u * 4 * W), signed_codes + u * C::kVectors);
    const Floats step = spread<kSteps>(steps);
    UNROLLED
    for (int r = 0; r < ROWS; r++) {
      const int16_t* row = x + r * stride + at * kUnit * C::kCount;
      Ints total = multiply_pairs(signed_codes[0], load_shorts(row));
      UNROLLED
      for (int i = 1; i < kVectors; i++) total = add_pairs(total, signed_codes[i], load_shorts(row + i * 2 * W));
      sums[c][r] += to_floats(total) * step;
    }
  };
  const int whole = blocks / kSteps * kUnits;
  for (int i = 0; i < whole; i++) {
    const size_t at = static_cast<size_t>(i);
    // The columns lie one behind the other, and are asked for in that order.
    UNROLLED
    for (int p = 0; p < COLUMNS * kBytes; p += 64) prefetch(codes + kAhead + at * COLUMNS * kBytes + p);
    UNROLLED
    for (int c = 0; c < COLUMNS; c++)
      add(c, codes + c * row_bytes + at * kBytes, scales + static_cast<size_t>(c) * blocks + i / kUnits * kSteps, at);
  }
  if constexpr (kSteps > 1) {
    if (int rest = blocks % kSteps) {
      const size_t at = static_cast<size_t>(whole);
      for (int c = 0; c < COLUMNS; c++) {
        uint8_t last[kBytes] = {};
        float steps[kSteps] = {};
        __builtin_memcpy(last, codes + c * row_bytes + at * kBytes, rest * BLOCK * BITS / 8);
        __builtin_memcpy(steps, scales + static_cast<size_t>(c) * blocks + at * kSteps, rest * sizeof(float));
        add(c, last, steps, at);
      }
    }
  }
}

template <int BITS, int BLOCK>
struct CodesProduct {
  const Matrix& matrix;
  const IntegerRows& rows;
  int first_column, last_column;
  float* out;
  size_t stride;

  ALWAYS_INLINE void set(const CodesProduct& p, int row, int column, float sum) {
    p.out[row * p.stride + column] = sum * p.rows.scales[row];
  }

  // COLUMNS columns from n on.
  template <int COLUMNS, int ROWS>
  static void some(const CodesProduct& p, int n) {
    const size_t bytes = static_cast<size_t>(p.matrix.blocks) * BLOCK * BITS / 8;
    Floats sums[COLUMNS][ROWS];
    sum_codes<BITS, BLOCK, COLUMNS, ROWS>(static_cast<const uint8_t*>(p.matrix.weight) + n * bytes, bytes,
                                          p.matrix.scales + static_cast<size_t>(n) * p.matrix.blocks, p.matrix.blocks,
                                          p.rows.values, p.rows.stride, sums);
    // Four sums at a time, whatever they belong to.
    UNROLLED
    for (int i = 0; i < COLUMNS * ROWS; i += 4) {
      auto at = [&](int j) __attribute__((always_inline)) {
        return j < COLUMNS * ROWS ? sums[j / ROWS][j % ROWS] : Floats{};
      };
      Floats4 total = sum_four(at(i), at(i + 1), at(i + 2), at(i + 3));
      UNROLLED
      for (int j = 0; j < 4; j++)
        if (i + j < COLUMNS * ROWS) set(p, (i + j) % ROWS, n + (i + j) / ROWS, total[j]);
    }
  }

  template <int ROWS>
  static void all_columns(const CodesProduct& p) {
    // One row has too few sums to keep the multipliers busy with one column.
    constexpr int kColumns = ROWS == 1 ? 4 : 1;
    int n = p.first_column;
    for (; n + kColumns <= p.last_column; n += kColumns) some<kColumns, ROWS>(p, n);
    for (; n < p.last_column; n++) some<1, ROWS>(p, n);
  }

  static void run(const CodesProduct& p) {
    switch (p.rows.rows) {
      case 1: return all_columns<1>(p);
      case 2: return all_columns<2>(p);
      case 3: return all_columns<3>(p);
      case 4: return all_columns<4>(p);
      case 5: return all_columns<5>(p);
      case 6: return all_columns<6>(p);
      case 7: return all_columns<7>(p);
      default: return all_columns<8>(p);
    }
  }
};

template <int BITS>
static void multiply_codes_of(const Matrix& matrix, const IntegerRows& rows, int first_column, int last_column,
                              float* out, size_t stride) {
  switch (matrix.block) {
    case 16: return CodesProduct<BITS, 16>::run({matrix, rows, first_column, last_column, out, stride});
    case 32: return CodesProduct<BITS, 32>::run({matrix, rows, first_column, last_column, out, stride});
    case 64: return CodesProduct<BITS, 64>::run({matrix, rows, first_column, last_column, out, stride});
    case 128: return CodesProduct<BITS, 128>::run({matrix, rows, first_column, last_column, out, stride});
    default: return CodesProduct<BITS, 256>::run({matrix, rows, first_column, last_column, out, stride});
  }
}

// Apart from the products: a compiler may join a product and a sum, and not everywhere alike.
static void add_bias(const Matrix& matrix, int rows, int first_column, int last_column, float* out, size_t stride) {
  if (!matrix.bias) return;
  for (int r = 0; r < rows; r++)
    for (int n = first_column; n < last_column; n++) out[r * stride + n] += matrix.bias[n];
}

static void multiply_codes(const Matrix& matrix, const IntegerRows& rows, int first_column, int last_column,
                           float* out, size_t stride) {
  if (matrix.format == Format::kCodes8) multiply_codes_of<8>(matrix, rows, first_column, last_column, out, stride);
  else multiply_codes_of<4>(matrix, rows, first_column, last_column, out, stride);
  add_bias(matrix, rows.rows, first_column, last_column, out, stride);
}

// ---- Few rows times unquantized weights ------------------------------------------------------

// Columns whose sums stay in the first cache.
template <int ROWS>
constexpr int kSlice = 4096 / ROWS / W * W;

// Adds COUNT inputs, from k on, to the sums of `width` columns.
template <class F, int ROWS, int COUNT>
ALWAYS_INLINE void add_inputs(const typename F::Type* weight, size_t pitch, const float* const* rows, int k, int width,
                              float (*sums)[kSlice<ROWS>]) {
  float x[ROWS][COUNT];
  for (int r = 0; r < ROWS; r++)
    for (int i = 0; i < COUNT; i++) x[r][i] = rows[r][k + i];
  auto add = [&](int c) __attribute__((always_inline)) {
    Floats w[COUNT];
    UNROLLED
    for (int i = 0; i < COUNT; i++) w[i] = F::vector(weight + i * pitch + c);
    UNROLLED
    for (int r = 0; r < ROWS; r++) {
      Floats total = load(sums[r] + c);
      UNROLLED
      for (int i = 0; i < COUNT; i++) total += x[r][i] * w[i];
      store(sums[r] + c, total);
    }
  };
  constexpr int kLine = 64 / sizeof(typename F::Type);
  int c = 0;
  for (; c + kLine <= width; c += kLine) {
    UNROLLED
    for (int i = 0; i < COUNT; i++) prefetch(weight + (i + COUNT) * pitch + c);
    UNROLLED
    for (int j = 0; j < kLine; j += W) add(c + j);
  }
  for (; c + W <= width; c += W) add(c);
  for (; c < width; c++)
    for (int r = 0; r < ROWS; r++)
      for (int i = 0; i < COUNT; i++) sums[r][c] += x[r][i] * F::number(weight[i * pitch + c]);
}

// Weights [inputs, outputs]: read in the order of memory, in slices of columns.
template <class F, int ROWS>
static void few_forward(const Matrix& matrix, const float* const* rows, int first_column, int last_column, float* out,
                        size_t stride) {
  constexpr int kTogether = 4;
  const typename F::Type* weight = static_cast<const typename F::Type*>(matrix.weight);
  const size_t pitch = matrix.outputs;
  alignas(64) float sums[ROWS][kSlice<ROWS>];
  for (int first = first_column; first < last_column; first += kSlice<ROWS>) {
    const int width = least(kSlice<ROWS>, last_column - first);
    for (int r = 0; r < ROWS; r++)
      for (int c = 0; c < width; c++) sums[r][c] = matrix.bias ? matrix.bias[first + c] : 0.0f;
    int k = 0;
    for (; k + kTogether <= matrix.inputs; k += kTogether)
      add_inputs<F, ROWS, kTogether>(weight + k * pitch + first, pitch, rows, k, width, sums);
    for (; k < matrix.inputs; k++)
      add_inputs<F, ROWS, 1>(weight + k * pitch + first, pitch, rows, k, width, sums);
    for (int r = 0; r < ROWS; r++) __builtin_memcpy(out + r * stride + first, sums[r], width * sizeof(float));
  }
}

// COLUMNS outputs of weights [outputs, inputs], from n on. A sum is built in the same order whatever
// COLUMNS and ROWS are.
template <class F, int COLUMNS, int ROWS>
static void some_transposed(const Matrix& matrix, const float* const* rows, int n, float* out, size_t stride) {
  constexpr int kLine = 64 / sizeof(typename F::Type);
  const size_t pitch = matrix.inputs;
  const typename F::Type* weight = static_cast<const typename F::Type*>(matrix.weight) + n * pitch;
  Floats sums[COLUMNS][ROWS];
  UNROLLED
  for (int c = 0; c < COLUMNS; c++) {
    UNROLLED
    for (int r = 0; r < ROWS; r++) sums[c][r] = Floats{};
  }
  auto add = [&](int k) __attribute__((always_inline)) {
    UNROLLED
    for (int c = 0; c < COLUMNS; c++) {
      const Floats w = F::vector(weight + c * pitch + k);
      UNROLLED
      for (int r = 0; r < ROWS; r++) sums[c][r] += load(rows[r] + k) * w;
    }
  };
  int k = 0;
  for (; k + kLine <= matrix.inputs; k += kLine) {
    // The columns lie one behind the other, and are asked for in that order.
    UNROLLED
    for (int c = 0; c < COLUMNS; c++)
      prefetch(reinterpret_cast<const char*>(weight + static_cast<size_t>(k) * COLUMNS + c * kLine) + kAhead);
    UNROLLED
    for (int j = 0; j < kLine; j += W) add(k + j);
  }
  for (; k + W <= matrix.inputs; k += W) add(k);
  for (int c = 0; c < COLUMNS; c++) {
    for (int r = 0; r < ROWS; r++) {
      float total = sum_four(sums[c][r], Floats{}, Floats{}, Floats{})[0];
      for (int i = k; i < matrix.inputs; i++) total += rows[r][i] * F::number(weight[c * pitch + i]);
      out[r * stride + n + c] = total;
    }
  }
}

template <class F, int ROWS>
static void few_transposed(const Matrix& matrix, const float* const* rows, int first_column, int last_column,
                           float* out, size_t stride) {
  constexpr int kColumns = ROWS == 1 ? 4 : 1;
  int n = first_column;
  for (; n + kColumns <= last_column; n += kColumns) some_transposed<F, kColumns, ROWS>(matrix, rows, n, out, stride);
  for (; n < last_column; n++) some_transposed<F, 1, ROWS>(matrix, rows, n, out, stride);
  add_bias(matrix, ROWS, first_column, last_column, out, stride);
}

template <class F, int ROWS>
static void few_of(const Matrix& matrix, const float* const* rows, int first_column, int last_column, float* out,
                   size_t stride) {
  if (matrix.transposed) few_transposed<F, ROWS>(matrix, rows, first_column, last_column, out, stride);
  else few_forward<F, ROWS>(matrix, rows, first_column, last_column, out, stride);
}

template <class F>
static void multiply_few_of(const Matrix& matrix, const float* const* rows, int count, int first_column,
                            int last_column, float* out, size_t stride) {
  switch (count) {
    case 1: return few_of<F, 1>(matrix, rows, first_column, last_column, out, stride);
    case 2: return few_of<F, 2>(matrix, rows, first_column, last_column, out, stride);
    case 3: return few_of<F, 3>(matrix, rows, first_column, last_column, out, stride);
    case 4: return few_of<F, 4>(matrix, rows, first_column, last_column, out, stride);
    case 5: return few_of<F, 5>(matrix, rows, first_column, last_column, out, stride);
    case 6: return few_of<F, 6>(matrix, rows, first_column, last_column, out, stride);
    case 7: return few_of<F, 7>(matrix, rows, first_column, last_column, out, stride);
    default: return few_of<F, 8>(matrix, rows, first_column, last_column, out, stride);
  }
}

static void multiply_few(const Matrix& matrix, const float* const* rows, int count, int first_column, int last_column,
                         float* out, size_t stride) {
  switch (matrix.format) {
    case Format::kFloat16:
      return multiply_few_of<Float16>(matrix, rows, count, first_column, last_column, out, stride);
    case Format::kBfloat16:
      return multiply_few_of<Bfloat16>(matrix, rows, count, first_column, last_column, out, stride);
    default: return multiply_few_of<Float>(matrix, rows, count, first_column, last_column, out, stride);
  }
}

// ---- Many rows -------------------------------------------------------------------------------

// c [ROWS, kStrip] = a [ROWS, k] times a strip; c += that with `add`.
template <int ROWS>
static void tile(const float* a, size_t lda, const float* strip, int k, float* c, size_t ldc, bool add) {
  // Every third row has a pointer, since an address can have a factor of 2.
  constexpr int kPointers = (ROWS + 2) / 3;
  const float* at[kPointers];
  UNROLLED
  for (int i = 0; i < kPointers; i++) at[i] = a + 3 * i * lda;
  Floats sums[ROWS][kStripVectors];
  UNROLLED
  for (int r = 0; r < ROWS; r++) {
    UNROLLED
    for (int v = 0; v < kStripVectors; v++) sums[r][v] = Floats{};
  }
  for (int i = 0; i < k; i++) {
    Floats w[kStripVectors];
    UNROLLED
    for (int v = 0; v < kStripVectors; v++) w[v] = load(strip + v * W);
    UNROLLED
    for (int r = 0; r < ROWS; r++) {
      const float x = at[r / 3][r % 3 * lda];
      UNROLLED
      for (int v = 0; v < kStripVectors; v++) sums[r][v] += x * w[v];
    }
    strip += kStrip;
    UNROLLED
    for (int p = 0; p < kPointers; p++) at[p]++;
  }
  UNROLLED
  for (int r = 0; r < ROWS; r++) {
    UNROLLED
    for (int v = 0; v < kStripVectors; v++) {
      float* to = c + r * ldc + v * W;
      store(to, add ? load(to) + sums[r][v] : sums[r][v]);
    }
  }
}

static void tile_of(int rows, const float* a, size_t lda, const float* strip, int k, float* c, size_t ldc, bool add) {
  static constexpr decltype(&tile<1>) kTiles[] = {
      tile<1>, tile<2>,
#if !defined(KERNEL_PLAIN)
      tile<3>, tile<4>, tile<5>, tile<6>,
#if KERNEL_WIDTH == 16
      tile<7>, tile<8>, tile<9>, tile<10>, tile<11>, tile<12>,
#endif
#endif
  };
  static_assert(sizeof kTiles / sizeof *kTiles == kTileRows, "one for each number of rows");
  kTiles[rows - 1](a, lda, strip, k, c, ldc, add);
}

// All rows of a with one strip, of whose columns the first n are wanted.
static void multiply_strip(const float* a, size_t lda, int rows, const float* strip, int k, float* c, size_t ldc,
                           int n, bool add) {
  const int tiles = (rows + kTileRows - 1) / kTileRows;
  for (int i = 0; i < tiles; i++) {
    const int first = static_cast<int>(static_cast<int64_t>(rows) * i / tiles);
    const int count = static_cast<int>(static_cast<int64_t>(rows) * (i + 1) / tiles) - first;
    float* to = c + first * ldc;
    if (n == kStrip) {
      tile_of(count, a + first * lda, lda, strip, k, to, ldc, add);
      continue;
    }
    float part[kTileRows * kStrip];
    tile_of(count, a + first * lda, lda, strip, k, part, kStrip, false);
    for (int r = 0; r < count; r++)
      for (int j = 0; j < n; j++) to[r * ldc + j] = add ? to[r * ldc + j] + part[r * kStrip + j] : part[r * kStrip + j];
  }
}

static void gemm_panel(const float* a, size_t lda, int m, const float* panel, int k, float* c, size_t ldc, int n,
                       bool add) {
  for (int first = 0; first < n; first += kStrip)
    multiply_strip(a, lda, m, panel + static_cast<size_t>(first) * k, k, c + first, ldc, least(kStrip, n - first), add);
}

// Up to kStrip columns of weights [k, ...] to a strip.
template <class F>
static void pack_strip(const typename F::Type* b, size_t stride, int n, int k, float* strip) {
  for (int i = 0; i < k; i++) {
    float* to = strip + static_cast<size_t>(i) * kStrip;
    if (n == kStrip) {
      UNROLLED
      for (int v = 0; v < kStripVectors; v++) store(to + v * W, F::vector(b + i * stride + v * W));
    } else {
      for (int j = 0; j < kStrip; j++) to[j] = j < n ? F::number(b[i * stride + j]) : 0.0f;
    }
  }
}

// Writes four rows of b as four columns.
ALWAYS_INLINE void transpose_four(const float* const* b, int k, float* to) {
  int i = 0;
  for (; i + 4 <= k; i += 4) {
    Floats4 r[4];
    UNROLLED
    for (int j = 0; j < 4; j++) r[j] = *reinterpret_cast<const Floats4At*>(b[j] + i);
    Floats4 s0 = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), s1 = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
    Floats4 t0 = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5), t1 = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
    Floats4 columns[4] = {__builtin_shufflevector(s0, t0, 0, 1, 4, 5), __builtin_shufflevector(s0, t0, 2, 3, 6, 7),
                          __builtin_shufflevector(s1, t1, 0, 1, 4, 5), __builtin_shufflevector(s1, t1, 2, 3, 6, 7)};
    UNROLLED
    for (int j = 0; j < 4; j++) *reinterpret_cast<Floats4At*>(to + (i + j) * kStrip) = columns[j];
  }
  for (; i < k; i++)
    for (int j = 0; j < 4; j++) to[i * kStrip + j] = b[j][i];
}

// Up to kStrip rows of weights [..., k] to a strip. At most kDepth of 16 bits.
template <class F>
static void pack_strip_transposed(const typename F::Type* b, size_t stride, int n, int k, float* strip) {
  constexpr bool kConvert = sizeof(typename F::Type) == 2;
  float rows[4][kConvert ? kDepth : 1];
  for (int j = 0; j < kStrip; j += 4) {
    const float* from[4];
    for (int i = 0; i < 4; i++) {
      // Columns that are not there are copies of one, cleared below.
      const typename F::Type* row = b + least(j + i, n - 1) * stride;
      if constexpr (kConvert) {
        int p = 0;
        for (; p + W <= k; p += W) store(rows[i] + p, F::vector(row + p));
        for (; p < k; p++) rows[i][p] = F::number(row[p]);
        from[i] = rows[i];
      } else {
        from[i] = row;
      }
    }
    transpose_four(from, k, strip + j);
  }
  for (int i = 0; i < k; i++)
    for (int j = n; j < kStrip; j++) strip[static_cast<size_t>(i) * kStrip + j] = 0.0f;
}

static void pack(const float* b, size_t stride, int n, int k, float* panel) {
  for (int first = 0; first < n; first += kStrip)
    pack_strip<Float>(b + first, stride, least(kStrip, n - first), k, panel + static_cast<size_t>(first) * k);
}

static void pack_transposed(const float* b, size_t stride, int n, int k, float* panel) {
  for (int first = 0; first < n; first += kStrip)
    pack_strip_transposed<Float>(b + first * stride, stride, least(kStrip, n - first), k,
                                 panel + static_cast<size_t>(first) * k);
}

template <int PAIR>
ALWAYS_INLINE Bytes16 interleave(Bytes16 a, Bytes16 b) {
  if constexpr (PAIR == 0)
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  else
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

// 16 rows of 16 bytes to 16 columns.
ALWAYS_INLINE void transpose_bytes(Bytes16* r) {
  // Interleaving rows i and i + 8 four times moves every bit of a byte's place once.
  for (int round = 0; round < 4; round++) {
    Bytes16 next[16];
    UNROLLED
    for (int i = 0; i < 8; i++) {
      next[2 * i] = interleave<0>(r[i], r[i + 8]);
      next[2 * i + 1] = interleave<1>(r[i], r[i + 8]);
    }
    UNROLLED
    for (int i = 0; i < 16; i++) r[i] = next[i];
  }
}

// 16 codes of a row, minus their zero point.
template <int BITS>
ALWAYS_INLINE Bytes16 signed_codes(const uint8_t* codes) {
  if constexpr (BITS == 8) {
    Bytes16 v;
    __builtin_memcpy(&v, codes, 16);
    return v ^ 0x80;
  } else {
    uint64_t bytes;
    __builtin_memcpy(&bytes, codes, 8);
    Bytes16 v = (Bytes16)Words2{bytes, 0};
    return interleave<0>(v & 15, (Bytes16)((Words8)v >> 4) & 15) - 8;
  }
}

// Inputs k to k + count of up to kStrip columns to a strip. k is a multiple of the block.
template <int BITS>
static void unpack_strip(const Matrix& matrix, int n, int columns, int k, int count, float* strip) {
  const size_t bytes = static_cast<size_t>(matrix.blocks) * matrix.block * BITS / 8;
  const uint8_t* codes = static_cast<const uint8_t*>(matrix.weight) + n * bytes;
  const float* scales = matrix.scales + static_cast<size_t>(n) * matrix.blocks;
  for (int j = 0; j < kStrip; j += 16) {
    const int there = least(16, columns - j);
    float steps[16] = {};
    for (int i = 0; i < count; i += 16) {
      const int block = (k + i) / matrix.block;
      if ((k + i) % matrix.block == 0)
        for (int c = 0; c < there; c++) steps[c] = scales[static_cast<size_t>(j + c) * matrix.blocks + block];
      Bytes16 r[16];
      if (there == 16) {
        UNROLLED
        for (int c = 0; c < 16; c++) r[c] = signed_codes<BITS>(codes + (j + c) * bytes + (k + i) * BITS / 8);
      } else {
        for (int c = 0; c < 16; c++)
          r[c] = c < there ? signed_codes<BITS>(codes + (j + c) * bytes + (k + i) * BITS / 8) : Bytes16{};
      }
      transpose_bytes(r);
      const int depth = least(16, count - i);
      for (int d = 0; d < depth; d++) {
        int8_t column[16];
        __builtin_memcpy(column, r + d, 16);
        UNROLLED
        for (int v = 0; v < 16; v += W)
          store(strip + static_cast<size_t>(i + d) * kStrip + j + v, load_bytes(column + v) * load(steps + v));
      }
    }
  }
}

template <class F>
static void fill_strip_of(const Matrix& matrix, int n, int columns, int k, int count, float* strip) {
  const typename F::Type* weight = static_cast<const typename F::Type*>(matrix.weight);
  if (matrix.transposed)
    pack_strip_transposed<F>(weight + static_cast<size_t>(n) * matrix.inputs + k, matrix.inputs, columns, count, strip);
  else
    pack_strip<F>(weight + static_cast<size_t>(k) * matrix.outputs + n, matrix.outputs, columns, count, strip);
}

static void fill_strip(const Matrix& matrix, int n, int columns, int k, int count, float* strip) {
  switch (matrix.format) {
    case Format::kFloat: return fill_strip_of<Float>(matrix, n, columns, k, count, strip);
    case Format::kFloat16: return fill_strip_of<Float16>(matrix, n, columns, k, count, strip);
    case Format::kBfloat16: return fill_strip_of<Bfloat16>(matrix, n, columns, k, count, strip);
    case Format::kCodes8: return unpack_strip<8>(matrix, n, columns, k, count, strip);
    case Format::kCodes4: return unpack_strip<4>(matrix, n, columns, k, count, strip);
  }
}

static void multiply_many(const Matrix& matrix, const float* rows, size_t row_stride, int count, int first_column,
                          int last_column, float* out, size_t stride) {
  alignas(64) float strip[kDepth * kStrip];
  for (int n = first_column; n < last_column; n += kStrip) {
    const int columns = least(kStrip, last_column - n);
    if (matrix.bias)
      for (int r = 0; r < count; r++)
        __builtin_memcpy(out + r * stride + n, matrix.bias + n, columns * sizeof(float));
    for (int k = 0; k < matrix.inputs; k += kDepth) {
      const int depth = least(kDepth, matrix.inputs - k);
      fill_strip(matrix, n, columns, k, depth, strip);
      multiply_strip(rows + k, row_stride, count, strip, depth, out + n, stride, columns, matrix.bias || k > 0);
    }
  }
}

// ---- Tables ----------------------------------------------------------------------------------

template <class F>
static void look_up_of(const Matrix& matrix, int64_t index, int first, int last, float* out) {
  const typename F::Type* row = static_cast<const typename F::Type*>(matrix.weight) + index * matrix.inputs;
  int i = first;
  for (; i + W <= last; i += W) store(out + (i - first), F::vector(row + i));
  for (; i < last; i++) out[i - first] = F::number(row[i]);
}

template <int BITS>
static void look_up_codes(const Matrix& matrix, int64_t index, int first, int last, float* out) {
  const size_t bytes = static_cast<size_t>(matrix.blocks) * matrix.block * BITS / 8;
  const uint8_t* codes = static_cast<const uint8_t*>(matrix.weight) + index * bytes;
  const float* scales = matrix.scales + index * matrix.blocks;
  for (int i = first; i < last;) {
    const float step = scales[i / matrix.block];
    const int end = least(last, (i / matrix.block + 1) * matrix.block);
    for (; i + 16 <= end; i += 16) {
      int8_t values[16];
      Bytes16 v = signed_codes<BITS>(codes + i * BITS / 8);
      __builtin_memcpy(values, &v, 16);
      UNROLLED
      for (int j = 0; j < 16; j += W) store(out + (i - first) + j, load_bytes(values + j) * step);
    }
    for (; i < end; i++) {
      int code = BITS == 8 ? codes[i] - 128 : (codes[i / 2] >> (i % 2 * 4) & 15) - 8;
      out[i - first] = code * step;
    }
  }
}

static void look_up(const Matrix& matrix, int64_t index, int first, int last, float* out) {
  switch (matrix.format) {
    case Format::kFloat: return look_up_of<Float>(matrix, index, first, last, out);
    case Format::kFloat16: return look_up_of<Float16>(matrix, index, first, last, out);
    case Format::kBfloat16: return look_up_of<Bfloat16>(matrix, index, first, last, out);
    case Format::kCodes8: return look_up_codes<8>(matrix, index, first, last, out);
    case Format::kCodes4: return look_up_codes<4>(matrix, index, first, last, out);
  }
}

static const ProductKernels product_kernels = {
    kStrip,        pack,         pack_transposed, gemm_panel, padded_inputs, quantize, multiply_codes,
    multiply_few,  multiply_many, look_up,
};

}  // namespace KERNEL_SET
