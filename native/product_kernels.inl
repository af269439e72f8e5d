// The kernels of `product_kernels.h`, compiled once for each instruction set.
//
// A sum is built in the same order whatever rows and columns are computed beside it, so a row has the
// same bits alone and among others. Three parts: rows times codes, in integers; rows times tables;
// rows times weights [inputs, outputs], which a few rows read once and many rows by packed strips.

namespace KERNEL_SET {

constexpr int kStrip = W < 16 ? 16 : 32;      // columns that a strip of float32 weights has
constexpr int kStripVectors = kStrip / W;

// Rows of a block of a product that is kept in registers.
#if defined(KERNEL_PLAIN)
constexpr int kTileRows = 2;
#elif KERNEL_WIDTH == 16
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif

ALWAYS_INLINE int least(int a, int b) { return a < b ? a : b; }

// Calls function(first, count) for groups of about equal size, of at most MOST of all rows.
template <int MOST, class Function>
ALWAYS_INLINE void in_groups(int rows, Function function) {
  const int groups = (rows + MOST - 1) / MOST;
  for (int i = 0; i < groups; i++) {
    const int first = static_cast<int>(static_cast<int64_t>(rows) * i / groups);
    function(first, static_cast<int>(static_cast<int64_t>(rows) * (i + 1) / groups) - first);
  }
}

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

// Writes k numbers of each of four rows as four columns, in rows `stride` apart.
ALWAYS_INLINE void transpose_four(const float* const* b, int k, float* to, size_t stride) {
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
    for (int j = 0; j < 4; j++) *reinterpret_cast<Floats4At*>(to + (i + j) * stride) = columns[j];
  }
  for (; i < k; i++)
    for (int j = 0; j < 4; j++) to[i * stride + j] = b[j][i];
}

// ---- Rows times codes ------------------------------------------------------------------------
//
// For every output, the blocks are summed up in integers, which is exact, and those sums times their
// scales are added in the order of the blocks. So one or two rows, whose codes are read in the order
// of memory, get the same bits as many rows, for which codes are packed.
//
// A vector of codes, a group, seen as int16, holds in each lane two codes of 8 bits or four of 4
// bits. Shifts give as many vectors of codes, and activations lie in memory in the order of those.
// Codes are multiplied as they are; what their zero point adds to a block is the same for all
// outputs, the offset of the block, and is taken off its sum.

template <int BITS>
struct Codes {
  static constexpr int kCount = 4 * W * 8 / BITS;  // codes of a group
  static constexpr int kVectors = 16 / BITS;       // vectors of int16 they become

  ALWAYS_INLINE void unpack(Shorts codes, Shorts* out) {
    UNROLLED
    for (int i = 0; i < kVectors; i++) {
      out[i] = (Shorts)((UnsignedShorts)codes >> (BITS * i));
      if (i + 1 < kVectors) out[i] &= static_cast<int16_t>((1 << BITS) - 1);
    }
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

static bool quantize(const Matrix& matrix, const float* x, int16_t* values, int32_t* offsets, float* scale) {
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
    __builtin_memset(offsets, 0, matrix.blocks * sizeof(int32_t));
    return rest == 0.0f && largest == 0.0f;
  }
  // With codes up to 255, the sum of a block of 256 is below 2^31.
  const float kLargest = 32639.0f;
  for (i = 0; i < matrix.blocks; i++) offsets[i] = 0;
  *scale = largest / kLargest;
  const float inverse = kLargest / largest;
  const Floats magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to whole numbers
  const int step = matrix.format == Format::kCodes8 ? Codes<8>::kCount : Codes<4>::kCount;
  const int zero = matrix.format == Format::kCodes8 ? 128 : 8;
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
    for (i = 0; i < step; i += 16) {
      int32_t total = 0;
      for (int j = 0; j < 16; j++) total += numbers[i + j];
      if (first + i < matrix.blocks * matrix.block) offsets[(first + i) / matrix.block] += zero * total;
    }
    if (matrix.format == Format::kCodes8) arrange<8>(numbers, values + first);
    else arrange<4>(numbers, values + first);
  }
  return true;
}

// Where the codes and scales of some columns are. Columns from `there` on are copies of the last one.
struct Columns {
  const uint8_t* codes;
  const float* scales;
  size_t bytes, blocks;  // of a column
  int there;

  Columns(const Matrix& matrix, int bits, int first, int last)
      : bytes(static_cast<size_t>(matrix.blocks) * matrix.block * bits / 8), blocks(matrix.blocks), there(last - first) {
    codes = static_cast<const uint8_t*>(matrix.weight) + first * bytes;
    scales = matrix.scales + first * blocks;
  }
  const uint8_t* codes_of(int column) const { return codes + least(column, there - 1) * bytes; }
  const float* scales_of(int column) const { return scales + least(column, there - 1) * blocks; }
};

// Group `at` of a column, of which the last one may be shorter than a vector: zeros follow.
ALWAYS_INLINE Shorts load_group(const uint8_t* codes, size_t at, size_t bytes) {
  constexpr size_t kBytes = 4 * W;
  if ((at + 1) * kBytes <= bytes) return load_shorts(codes + at * kBytes);
  uint8_t last[kBytes] = {};
  __builtin_memcpy(last, codes + at * kBytes, bytes - at * kBytes);
  return load_shorts(last);
}

// ROWS rows times W columns, for one or two rows.
template <int BITS, int BLOCK, int ROWS>
struct FewProduct {
  using C = Codes<BITS>;
  // A unit is one block, or the blocks of one group where those are smaller.
  static constexpr int kGroups = BLOCK > C::kCount ? BLOCK / C::kCount : 1;
  static constexpr int kBlocks = BLOCK < C::kCount ? C::kCount / BLOCK : 1;
  static constexpr int kUnits = 32;                            // whose sums are kept at a time
  static constexpr int kPartCodes = C::kCount / kQuads;        // in 128 bits
  static constexpr int kHalves = BLOCK < kPartCodes ? 2 : 1;   // blocks in 128 bits
  static_assert(BLOCK * 2 >= kPartCodes, "at most two blocks in 128 bits");

  // Sums of a unit: numbers that belong to column c of four are those at c of each 128 bits.
  struct Sums {
    Ints of[ROWS][kHalves];
  };

  // What is kept of units: their sums, by unit and four columns, and scales, by block and column.
  struct Kept {
    Sums sums[kUnits][kQuads];
    float scales[kUnits * kBlocks][W];
  };

  // Units `first` to `last` of four columns.
  static void add_units(const Columns& columns, int quad, const IntegerRows& rows, int first, int last, Kept* kept) {
    constexpr int kScales = kBlocks < 4 ? 4 : kBlocks;  // that are read at a time, which is fast among the codes only
    const uint8_t* codes[4];
    const float* scales[4];
    UNROLLED
    for (int c = 0; c < 4; c++) {
      codes[c] = columns.codes_of(4 * quad + c);
      scales[c] = columns.scales_of(4 * quad + c) + first * kBlocks;
    }
    for (int unit = first; unit < last; unit++) {
      const int block = (unit - first) * kBlocks;
      if (block % kScales == 0) {
        const float* from[4] = {scales[0] + block, scales[1] + block, scales[2] + block, scales[3] + block};
        transpose_four(from, least(kScales, static_cast<int>(columns.blocks) - first * kBlocks - block),
                       kept->scales[block] + 4 * quad, W);
      }
      // The columns lie one behind the other, and are asked for in that order.
      UNROLLED
      for (int i = 0; i < 4 * kGroups * 4 * W; i += 64)
        ask_ahead(codes[0] + static_cast<size_t>(unit) * 4 * kGroups * 4 * W + i);
      Ints total[ROWS][4];
      UNROLLED
      for (int c = 0; c < 4; c++) {
        UNROLLED
        for (int g = 0; g < kGroups; g++) {
          const size_t at = static_cast<size_t>(unit) * kGroups + g;
          Shorts numbers[C::kVectors];
          // Only where blocks are smaller than a group can the last group be incomplete.
          C::unpack(kBlocks > 1 ? load_group(codes[c], at, columns.bytes) : load_shorts(codes[c] + at * 4 * W),
                    numbers);
          UNROLLED
          for (int r = 0; r < ROWS; r++) {
            const int16_t* row = rows.values + r * rows.stride + at * C::kCount;
            UNROLLED
            for (int i = 0; i < C::kVectors; i++) {
              const Shorts x = load_shorts(row + i * 2 * W);
              total[r][c] = g + i ? add_pairs(total[r][c], numbers[i], x) : multiply_pairs(numbers[i], x);
            }
          }
        }
      }
      UNROLLED
      for (int r = 0; r < ROWS; r++) {
        Ints* sums = kept->sums[unit - first][quad].of[r];
        if constexpr (kHalves == 1) {
          sums[0] = sum_quads(total[r]);
        } else {
          transpose_quads(total[r]);
          sums[0] = total[r][0] + total[r][1];
          sums[1] = total[r][2] + total[r][3];
        }
      }
    }
  }

  static void run(const Matrix& matrix, const IntegerRows& rows, int first_column, int last_column, float* out,
                  size_t stride) {
    const int units = (matrix.blocks + kBlocks - 1) / kBlocks;
    ask_first(Columns(matrix, BITS, first_column, last_column).codes);
    for (int n = first_column; n < last_column; n += W) {
      const Columns columns(matrix, BITS, n, last_column);
      Floats totals[ROWS];
      UNROLLED
      for (int r = 0; r < ROWS; r++) totals[r] = Floats{};
      for (int first = 0; first < units; first += kUnits) {
        const int count = least(kUnits, units - first);
        Kept kept;
        for (int quad = 0; quad < kQuads; quad++) add_units(columns, quad, rows, first, first + count, &kept);
        for (int unit = 0; unit < count; unit++) {
          Ints blocks[ROWS][kBlocks];
          UNROLLED
          for (int r = 0; r < ROWS; r++) {
            UNROLLED
            for (int half = 0; half < kHalves; half++) {
              Ints parts[kQuads];
              UNROLLED
              for (int q = 0; q < kQuads; q++) parts[q] = kept.sums[unit][q].of[r][half];
              transpose_parts(parts);
              // Parts that belong to one block are its sum.
              constexpr int kTogether = kQuads * kHalves / kBlocks;
              UNROLLED
              for (int b = 0; b < kBlocks / kHalves; b++) {
                Ints sum = parts[b * kTogether];
                UNROLLED
                for (int i = 1; i < kTogether; i++) sum += parts[b * kTogether + i];
                blocks[r][b * kHalves + half] = sum;
              }
            }
          }
          UNROLLED
          for (int b = 0; b < kBlocks; b++) {
            const int block = (first + unit) * kBlocks + b;
            if (block >= matrix.blocks) break;
            const Floats scale = load(kept.scales[unit * kBlocks + b]);
            UNROLLED
            for (int r = 0; r < ROWS; r++)
              totals[r] += to_floats(blocks[r][b] - rows.offsets[r * matrix.blocks + block]) * scale;
          }
        }
      }
      UNROLLED
      for (int r = 0; r < ROWS; r++) {
        const Floats total = totals[r] * rows.scales[r];
        float* to = out + r * stride + n;
        if (columns.there >= W) {
          store(to, total);
        } else {
          float some[W];
          store(some, total);
          __builtin_memcpy(to, some, columns.there * sizeof(float));
        }
      }
    }
  }
};

// ---- More rows times codes: packed -----------------------------------------------------------

constexpr int kPackedColumns = 2 * W;  // of a strip
constexpr int kPackedDepth = 1024;     // codes of each that are packed at a time, at most
// Rows of a product that is kept in registers.
constexpr int kPackedRows = KERNEL_WIDTH == 8 ? 4 : 8;

// Codes and scales of a part of a strip. Codes are in the order of rows of activations: two
// neighbours of each column are one number of 32 bits.
struct Packed {
  Shorts codes[kPackedDepth / 2][2];
  float scales[kPackedDepth / 16][2][W];
};

// Packs `groups` groups from `group` on, and the scales of `blocks` blocks from `block` on.
// `next` is where the part that is packed next begins, in its first column.
template <int BITS>
static void pack_codes(const Columns& columns, size_t group, size_t groups, int block, int blocks,
                       const uint8_t* next, Packed* packed) {
  using C = Codes<BITS>;
  for (int half = 0; half < 2; half++) {
    const int column = half * W;
    for (size_t at = 0; at < groups; at++) {
      Ints lines[W];
      UNROLLED
      for (int c = 0; c < W; c++) {
        prefetch_far(next + (column + c) * columns.bytes + at * 4 * W);
        lines[c] = (Ints)load_group(columns.codes_of(column + c), group + at, columns.bytes);
      }
      UNROLLED
      for (int q = 0; q < kQuads; q++) transpose_quads(lines + 4 * q);
      UNROLLED
      for (int i = 0; i < 4; i++) {
        Ints parts[kQuads];
        UNROLLED
        for (int q = 0; q < kQuads; q++) parts[q] = lines[4 * q + i];
        transpose_parts(parts);
        UNROLLED
        for (int q = 0; q < kQuads; q++) {
          Shorts numbers[C::kVectors];
          C::unpack((Shorts)parts[q], numbers);
          UNROLLED
          for (int v = 0; v < C::kVectors; v++)
            packed->codes[(at * C::kVectors + v) * W + 4 * q + i][half] = numbers[v];
        }
      }
    }
    for (int c = 0; c < W; c += 4) {
      const float* from[4];
      for (int i = 0; i < 4; i++) from[i] = columns.scales_of(column + c + i) + block;
      transpose_four(from, blocks, packed->scales[0][half] + c, kPackedColumns);
    }
  }
}

// How the numbers of a block lie in a group: `runs` runs of `length` numbers of 32 bits, the first
// of which are W apart.
struct BlockLayout {
  int runs, length, per_group;

  BlockLayout(int bits, int block) {
    const int group = 32 * W / bits;
    per_group = block < group ? group / block : 1;
    runs = block < group ? 16 / bits : 1;
    length = block < group ? W / per_group : block / 2;
  }
  size_t begin(int block) const {
    return per_group == 1 ? static_cast<size_t>(block) * length
                          : static_cast<size_t>(block / per_group) * runs * W + block % per_group * length;
  }
};

// ROWS rows times a part of a strip of `blocks` blocks; sums go on from those in `sums` if `more`.
template <int ROWS>
static void packed_tile(const Packed& packed, const BlockLayout& layout, int blocks, const int16_t* rows, size_t stride,
                        const int32_t* offsets, size_t offsets_stride, float* sums, size_t sums_stride, bool more) {
  // Every third row has a pointer, since an address can have a factor of 2.
  constexpr int kPointers = (ROWS + 2) / 3;
  for (int b = 0; b < blocks; b++) {
    Ints block[ROWS][2];
    UNROLLED
    for (int r = 0; r < ROWS; r++) block[r][0] = block[r][1] = Ints{} - offsets[r * offsets_stride + b];
    const size_t begin = layout.begin(b);
    for (int run = 0; run < layout.runs; run++) {
      const Shorts(*codes)[2] = packed.codes + begin + run * W;
      const int16_t* x[kPointers];
      UNROLLED
      for (int p = 0; p < kPointers; p++) x[p] = rows + 3 * p * stride + 2 * (begin + run * W);
      for (int i = 0; i < layout.length; i++) {
        const Shorts first = codes[i][0], second = codes[i][1];
        UNROLLED
        for (int r = 0; r < ROWS; r++) {
          int32_t two;
          __builtin_memcpy(&two, x[r / 3] + r % 3 * stride, sizeof two);
          const Shorts both = (Shorts)(two - Ints{});
          block[r][0] = add_pairs(block[r][0], first, both);
          block[r][1] = add_pairs(block[r][1], second, both);
        }
        UNROLLED
        for (int p = 0; p < kPointers; p++) x[p] += 2;
      }
    }
    // The sums stay in memory: there are not registers enough for both.
    UNROLLED
    for (int r = 0; r < ROWS; r++) {
      UNROLLED
      for (int half = 0; half < 2; half++) {
        float* to = sums + r * sums_stride + half * W;
        const Floats before = more || b ? load(to) : Floats{};
        store(to, before + to_floats(block[r][half]) * load(packed.scales[b][half]));
      }
    }
  }
}

template <int BITS>
static void multiply_packed(const Matrix& matrix, const IntegerRows& rows, int first_column, int last_column,
                            float* out, size_t stride) {
  static constexpr decltype(&packed_tile<1>) kTiles[] = {packed_tile<1>, packed_tile<2>, packed_tile<3>, packed_tile<4>,
#if KERNEL_WIDTH != 8
                                                         packed_tile<5>, packed_tile<6>, packed_tile<7>, packed_tile<8>,
#endif
  };
  static_assert(sizeof kTiles / sizeof *kTiles == kPackedRows, "one for each number of rows");
  constexpr int kGroup = Codes<BITS>::kCount;
  const BlockLayout layout(BITS, matrix.block);
  // Parts of about equal size, of whole groups and of whole blocks of any size.
  constexpr int kWhole = 256;
  static_assert(kWhole % kGroup == 0 && kPackedDepth % kWhole == 0, "whole groups");
  const int units = (matrix.blocks * matrix.block + kWhole - 1) / kWhole, most = kPackedDepth / kWhole;
  const int parts = (units + most - 1) / most, depth = (units + parts - 1) / parts * kWhole;
  for (int n = first_column; n < last_column; n += kPackedColumns) {
    const Columns columns(matrix, BITS, n, last_column);
    const int there = least(columns.there, kPackedColumns);
    for (int block = 0; block < matrix.blocks; block += depth / matrix.block) {
      Packed packed;
      const int input = block * matrix.block, blocks = least(depth / matrix.block, matrix.blocks - block);
      const int groups = (blocks * matrix.block + kGroup - 1) / kGroup;
      const bool last = block + blocks == matrix.blocks;
      const uint8_t* next = columns.codes + (last ? kPackedColumns * columns.bytes : (input + depth) * BITS / 8);
      pack_codes<BITS>(columns, input / kGroup, groups, block, blocks, next, &packed);
      in_groups<kPackedRows>(rows.rows, [&](int first, int count) {
        float* to = out + first * stride + n;
        float some[kPackedRows * kPackedColumns];
        const bool whole = there == kPackedColumns;
        if (!whole && block)
          for (int r = 0; r < count; r++)
            __builtin_memcpy(some + r * kPackedColumns, to + r * stride, there * sizeof(float));
        kTiles[count - 1](packed, layout, blocks, rows.values + first * rows.stride + input, rows.stride,
                          rows.offsets + static_cast<size_t>(first) * matrix.blocks + block, matrix.blocks,
                          whole ? to : some, whole ? stride : kPackedColumns, block > 0);
        if (!whole)
          for (int r = 0; r < count; r++)
            __builtin_memcpy(to + r * stride, some + r * kPackedColumns, there * sizeof(float));
        if (last)
          for (int r = 0; r < count; r++)
            for (int i = 0; i < there; i++) to[r * stride + i] *= rows.scales[first + r];
      });
    }
  }
}

template <int BITS, int ROWS>
static void multiply_few_codes(const Matrix& matrix, const IntegerRows& rows, int first_column, int last_column,
                               float* out, size_t stride) {
  auto run = [&](auto function) { function(matrix, rows, first_column, last_column, out, stride); };
  switch (matrix.block) {
    case 16: return run(FewProduct<BITS, 16, ROWS>::run);
    case 32: return run(FewProduct<BITS, 32, ROWS>::run);
    case 64: return run(FewProduct<BITS, 64, ROWS>::run);
    case 128: return run(FewProduct<BITS, 128, ROWS>::run);
    default: return run(FewProduct<BITS, 256, ROWS>::run);
  }
}

template <int BITS>
static void multiply_codes_of(const Matrix& matrix, const IntegerRows& rows, int first_column, int last_column,
                              float* out, size_t stride) {
  auto run = [&](auto function) { function(matrix, rows, first_column, last_column, out, stride); };
  switch (rows.rows) {
    case 1: return run(multiply_few_codes<BITS, 1>);
    case 2: return run(multiply_few_codes<BITS, 2>);
    default: return run(multiply_packed<BITS>);
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

// ---- Rows times tables -----------------------------------------------------------------------

// COLUMNS outputs of a table, from n on.
template <class F, int COLUMNS, int ROWS>
static void some_outputs(const Matrix& matrix, const float* const* rows, int n, float* out, size_t stride) {
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
    Floats x[ROWS];
    UNROLLED
    for (int r = 0; r < ROWS; r++) x[r] = load(rows[r] + k);
    UNROLLED
    for (int c = 0; c < COLUMNS; c++) {
      const Floats w = F::vector(weight + c * pitch + k);
      UNROLLED
      for (int r = 0; r < ROWS; r++) sums[c][r] += x[r] * w;
    }
  };
  int k = 0;
  for (; k + kLine <= matrix.inputs; k += kLine) {
    // The columns lie one behind the other, and are asked for in that order.
    UNROLLED
    for (int c = 0; c < COLUMNS; c++)
      ask_ahead(weight + static_cast<size_t>(k) * COLUMNS + c * kLine);
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
static void outputs_of(const Matrix& matrix, const float* const* rows, int first_column, int last_column, float* out,
                       size_t stride) {
  constexpr int kColumns = 4;
  int n = first_column;
  for (; n + kColumns <= last_column; n += kColumns) some_outputs<F, kColumns, ROWS>(matrix, rows, n, out, stride);
  for (; n < last_column; n++) some_outputs<F, 1, ROWS>(matrix, rows, n, out, stride);
}

// As many rows as registers hold the sums of, with those of four columns.
constexpr int kTableRows = KERNEL_WIDTH == 8 ? 2 : 4;

template <class F>
static void multiply_table_of(const Matrix& matrix, const float* const* rows, int count, int first_column,
                              int last_column, float* out, size_t stride) {
  const int slice = count <= kTableRows ? last_column - first_column : 32;
  ask_first(static_cast<const typename F::Type*>(matrix.weight) + static_cast<size_t>(first_column) * matrix.inputs);
  for (int n = first_column; n < last_column; n += slice) {
    const int end = least(n + slice, last_column);
    in_groups<kTableRows>(count, [&](int first, int some) {
      float* to = out + first * stride;
      switch (some) {
        case 1: return outputs_of<F, 1>(matrix, rows + first, n, end, to, stride);
        case 2: return outputs_of<F, 2>(matrix, rows + first, n, end, to, stride);
        case 3: return outputs_of<F, 3>(matrix, rows + first, n, end, to, stride);
        default: return outputs_of<F, 4>(matrix, rows + first, n, end, to, stride);
      }
    });
  }
  add_bias(matrix, count, first_column, last_column, out, stride);
}

static void multiply_table(const Matrix& matrix, const float* const* rows, int count, int first_column,
                           int last_column, float* out, size_t stride) {
  switch (matrix.format) {
    case Format::kFloat16:
      return multiply_table_of<Float16>(matrix, rows, count, first_column, last_column, out, stride);
    case Format::kBfloat16:
      return multiply_table_of<Bfloat16>(matrix, rows, count, first_column, last_column, out, stride);
    default: return multiply_table_of<Float>(matrix, rows, count, first_column, last_column, out, stride);
  }
}

// ---- Few rows times weights [inputs, outputs] ------------------------------------------------

// Columns whose sums stay in the first cache.
template <int ROWS>
constexpr int kSlice = 4096 / ROWS / W * W;

// Adds COUNT inputs to the sums of `width` columns. `ahead` is how far in front to ask for weights.
template <class F, int ROWS, int COUNT>
ALWAYS_INLINE void add_inputs(const typename F::Type* weight, size_t pitch, size_t ahead, const float* const* rows,
                              int k, int width, float (*sums)[kSlice<ROWS>]) {
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
    for (int i = 0; i < COUNT; i++) {
      prefetch(weight + (i + COUNT) * pitch + c);
      prefetch_far(weight + i * pitch + ahead + c);
    }
    UNROLLED
    for (int j = 0; j < kLine; j += W) add(c + j);
  }
  for (; c + W <= width; c += W) add(c);
  for (; c < width; c++)
    for (int r = 0; r < ROWS; r++)
      for (int i = 0; i < COUNT; i++) sums[r][c] += x[r][i] * F::number(weight[i * pitch + c]);
}

template <class F, int ROWS>
static void few_of(const Matrix& matrix, const float* const* rows, int first_input, int last_input, int first_column,
                   int last_column, float* out, size_t stride) {
  constexpr int kTogether = 4;
  const typename F::Type* weight = static_cast<const typename F::Type*>(matrix.weight);
  const size_t pitch = matrix.outputs;
  const size_t ahead = (kFar / (pitch * sizeof(typename F::Type)) + 2 * kTogether) * pitch;
  // What comes before that: enough rows for kFar bytes.
  const int bytes = (last_column - first_column) * sizeof(typename F::Type);
  for (int k = first_input; k < last_input && (k - first_input) * bytes < kFar; k++)
    for (int i = 0; i < bytes; i += 64)
      prefetch_far(reinterpret_cast<const char*>(weight + k * pitch + first_column) + i);
  alignas(64) float sums[ROWS][kSlice<ROWS>];
  for (int first = first_column; first < last_column; first += kSlice<ROWS>) {
    const int width = least(kSlice<ROWS>, last_column - first);
    for (int r = 0; r < ROWS; r++) __builtin_memset(sums[r], 0, width * sizeof(float));
    int k = first_input;
    for (; k + kTogether <= last_input; k += kTogether)
      add_inputs<F, ROWS, kTogether>(weight + k * pitch + first, pitch, ahead, rows, k, width, sums);
    for (; k < last_input; k++)
      add_inputs<F, ROWS, 1>(weight + k * pitch + first, pitch, ahead, rows, k, width, sums);
    for (int r = 0; r < ROWS; r++) __builtin_memcpy(out + r * stride + first, sums[r], width * sizeof(float));
  }
}

template <class F>
static void multiply_few_of(const Matrix& matrix, const float* const* rows, int count, int first_input, int last_input,
                            int first_column, int last_column, float* out, size_t stride) {
  static constexpr decltype(&few_of<F, 1>) kCounts[kFewRows] = {few_of<F, 1>, few_of<F, 2>, few_of<F, 3>, few_of<F, 4>,
                                                                few_of<F, 5>, few_of<F, 6>, few_of<F, 7>, few_of<F, 8>};
  kCounts[count - 1](matrix, rows, first_input, last_input, first_column, last_column, out, stride);
}

static void multiply_few(const Matrix& matrix, const float* const* rows, int count, int first_input, int last_input,
                         int first_column, int last_column, float* out, size_t stride) {
  auto run = [&](auto function) {
    function(matrix, rows, count, first_input, last_input, first_column, last_column, out, stride);
  };
  switch (matrix.format) {
    case Format::kFloat16: return run(multiply_few_of<Float16>);
    case Format::kBfloat16: return run(multiply_few_of<Bfloat16>);
    default: return run(multiply_few_of<Float>);
  }
}

// ---- Many rows times weights [inputs, outputs] -----------------------------------------------

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
  in_groups<kTileRows>(rows, [&](int first, int count) {
    float* to = c + first * ldc;
    if (n == kStrip) return tile_of(count, a + first * lda, lda, strip, k, to, ldc, add);
    float part[kTileRows * kStrip];
    tile_of(count, a + first * lda, lda, strip, k, part, kStrip, false);
    for (int r = 0; r < count; r++)
      for (int j = 0; j < n; j++) to[r * ldc + j] = add ? to[r * ldc + j] + part[r * kStrip + j] : part[r * kStrip + j];
  });
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

// Up to kStrip rows of b [..., k] to a strip.
static void pack_strip_transposed(const float* b, size_t stride, int n, int k, float* strip) {
  for (int j = 0; j < kStrip; j += 4) {
    const float* from[4];
    // Columns that are not there are copies of one, cleared below.
    for (int i = 0; i < 4; i++) from[i] = b + least(j + i, n - 1) * stride;
    transpose_four(from, k, strip + j, kStrip);
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
    pack_strip_transposed(b + first * stride, stride, least(kStrip, n - first), k,
                                 panel + static_cast<size_t>(first) * k);
}

template <class F>
static void multiply_many_of(const Matrix& matrix, const float* rows, size_t row_stride, int count, int first_column,
                             int last_column, float* out, size_t stride) {
  alignas(64) float strip[kDepth * kStrip];
  for (int n = first_column; n < last_column; n += kStrip) {
    const int columns = least(kStrip, last_column - n);
    if (matrix.bias)
      for (int r = 0; r < count; r++)
        __builtin_memcpy(out + r * stride + n, matrix.bias + n, columns * sizeof(float));
    for (int k = 0; k < matrix.inputs; k += kDepth) {
      const int depth = least(kDepth, matrix.inputs - k);
      pack_strip<F>(static_cast<const typename F::Type*>(matrix.weight) + static_cast<size_t>(k) * matrix.outputs + n,
                    matrix.outputs, columns, depth, strip);
      multiply_strip(rows + k, row_stride, count, strip, depth, out + n, stride, columns, matrix.bias || k > 0);
    }
  }
}

static void multiply_many(const Matrix& matrix, const float* rows, size_t row_stride, int count, int first_column,
                          int last_column, float* out, size_t stride) {
  auto run = [&](auto function) {
    function(matrix, rows, row_stride, count, first_column, last_column, out, stride);
  };
  switch (matrix.format) {
    case Format::kFloat16: return run(multiply_many_of<Float16>);
    case Format::kBfloat16: return run(multiply_many_of<Bfloat16>);
    default: return run(multiply_many_of<Float>);
  }
}

// ---- Tables ----------------------------------------------------------------------------------

ALWAYS_INLINE Bytes16 interleave(Bytes16 a, Bytes16 b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
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
    return interleave(v & 15, (Bytes16)((Words8)v >> 4) & 15) - 8;
  }
}

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
    kStrip,         pack,           pack_transposed, gemm_panel,    padded_inputs, quantize,
    multiply_codes, multiply_table, multiply_few,    multiply_many, look_up,
};

}  // namespace KERNEL_SET
