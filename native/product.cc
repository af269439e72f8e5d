#include "product.h"

#include <cstdio>

MatrixInput::MatrixInput(Attributes& attributes, const char* prefix) {
  char name[64];
  snprintf(name, sizeof name, "%sbits", prefix);
  bits_ = attributes.number(name, 0, 8);
  snprintf(name, sizeof name, "%sblock_size", prefix);
  block_ = attributes.number(name, 0, 256);
  bool codes = (bits_ == 4 || bits_ == 8) && block_ >= 16 && (block_ & (block_ - 1)) == 0;
  if (!codes && (bits_ || block_)) attributes.fail("%d bits in blocks of %d are not supported", bits_, block_);
}

Matrix MatrixInput::read(Context& context, const char* name, size_t weight, size_t scales, size_t bias, int64_t inputs,
                         int64_t outputs, bool table) const {
  Matrix matrix;
  Tensor given = context.input(name, weight);
  if (context.failed()) return matrix;
  if (bits_) {
    int64_t blocks = (inputs + block_ - 1) / block_;
    context.expect(name, given, {outputs, blocks, block_ * bits_ / 8});
    if (given.type != kUint8) context.fail("input %s has the element type %d, not %d", name, given.type, kUint8);
    outputs = given.dims[0];
    Tensor steps = context.input("scales", scales, kFloat, {outputs, blocks});
    matrix.format = bits_ == 8 ? Format::kCodes8 : Format::kCodes4;
    matrix.transposed = true;
    matrix.block = block_;
    matrix.blocks = static_cast<int>(blocks);
    matrix.scales = steps.as<float>();
  } else {
    if (given.type == kFloat) matrix.format = Format::kFloat;
    else if (given.type == kFloat16) matrix.format = Format::kFloat16;
    else if (given.type == kBfloat16) matrix.format = Format::kBfloat16;
    else context.fail("input %s has the element type %d", name, given.type);
    if (table) context.expect(name, given, {outputs, inputs});
    else context.expect(name, given, {inputs, outputs});
    outputs = given.dims[table ? 0 : 1];
    matrix.transposed = table;
  }
  if (outputs > INT32_MAX || inputs > INT32_MAX) context.fail("input %s is too large", name);
  if (inputs < 1) context.fail("input %s is empty", name);
  matrix.inputs = static_cast<int>(inputs);
  matrix.outputs = static_cast<int>(outputs);
  matrix.weight = given.data;
  if (bias != kNoInput) matrix.bias = context.optional("bias", bias, kFloat, {outputs}).as<float>();
  return matrix;
}

Product::Product(const Kernels& kernels, const Matrix& matrix, int rows)
    : kernels_(kernels.product), matrix_(matrix), rows_(rows) {}

void Product::reserve(Scratch& scratch) const {
  scratch.reserve<const float*>(rows_);
  if (integers()) {
    scratch.reserve<int16_t>(rows_ * kernels_.padded_inputs(matrix_));
    scratch.reserve<int32_t>(static_cast<size_t>(rows_) * matrix_.blocks);
    scratch.reserve<float>(rows_);
    scratch.reserve<bool>(rows_);
  } else if (depth_parts()) {
    scratch.reserve<float>(static_cast<size_t>(depth_parts()) * rows_ * matrix_.outputs);
  }
}

void Product::take(Scratch& scratch) {
  at_ = scratch.take<const float*>(rows_);
  if (integers()) {
    values_ = scratch.take<int16_t>(rows_ * kernels_.padded_inputs(matrix_));
    offsets_ = scratch.take<int32_t>(static_cast<size_t>(rows_) * matrix_.blocks);
    scales_ = scratch.take<float>(rows_);
    usual_ = scratch.take<bool>(rows_);
  } else if (depth_parts()) {
    sums_ = scratch.take<float>(static_cast<size_t>(depth_parts()) * rows_ * matrix_.outputs);
  }
}

void Product::set_row(int row, const float* x) {
  at_[row] = x;
  if (!integers()) return;
  usual_[row] = kernels_.quantize(matrix_, x, values_ + row * kernels_.padded_inputs(matrix_),
                                  offsets_ + static_cast<size_t>(row) * matrix_.blocks, scales_ + row);
}

void Product::multiply(int depth, int first_row, int last_row, int first_column, int last_column, float* out,
                       size_t stride) const {
  const int count = last_row - first_row;
  float* to = out + first_row * stride;
  if (integers()) {
    const size_t padded = kernels_.padded_inputs(matrix_);
    IntegerRows rows = {values_ + first_row * padded, padded, offsets_ + static_cast<size_t>(first_row) * matrix_.blocks,
                        scales_ + first_row, count};
    kernels_.multiply_codes(matrix_, rows, first_column, last_column, to, stride);
    for (int row = first_row; row < last_row; row++)
      if (!usual_[row]) multiply_unusual(row, first_column, last_column, out + row * stride);
  } else if (matrix_.transposed) {
    kernels_.multiply_table(matrix_, at_ + first_row, count, first_column, last_column, to, stride);
  } else if (rows_ > kFewRows) {
    kernels_.multiply_many(matrix_, at_[first_row], at_[1] - at_[0], count, first_column, last_column, to, stride);
  } else {
    const int first = depth * kDepth, last = first + kDepth;
    const size_t width = matrix_.outputs;
    kernels_.multiply_few(matrix_, at_ + first_row, count, first, last < matrix_.inputs ? last : matrix_.inputs,
                          first_column, last_column, sums_ + (static_cast<size_t>(depth) * rows_ + first_row) * width,
                          width);
  }
}

void Product::add_up(int first_row, int last_row, int first_column, int last_column, float* out, size_t stride) const {
  const size_t width = matrix_.outputs;
  for (int row = first_row; row < last_row; row++) {
    float* to = out + row * stride;
    const float* from = sums_ + row * width;
    for (int n = first_column; n < last_column; n++) to[n] = matrix_.bias ? matrix_.bias[n] + from[n] : from[n];
    for (int depth = 1; depth < depth_parts(); depth++) {
      from += rows_ * width;
      for (int n = first_column; n < last_column; n++) to[n] += from[n];
    }
  }
}

// A row of numbers that integers cannot hold, such as infinities.
void Product::multiply_unusual(int row, int first_column, int last_column, float* out) const {
  constexpr int kAtOnce = 256;
  const float* x = at_[row];
  for (int n = first_column; n < last_column; n++) {
    float total = 0;
    for (int k = 0; k < matrix_.inputs; k += kAtOnce) {
      float weights[kAtOnce];
      const int end = k + kAtOnce < matrix_.inputs ? k + kAtOnce : matrix_.inputs;
      kernels_.look_up(matrix_, n, k, end, weights);
      for (int i = k; i < end; i++) total += x[i] * weights[i - k];
    }
    out[n] = matrix_.bias ? total + matrix_.bias[n] : total;
  }
}

int Product::row_parts() const {
  // As many rows as the second cache holds beside the weights.
  constexpr int kRows = 256;
  return rows_ <= kFewRows ? 1 : (rows_ + kRows - 1) / kRows;
}

int Product::depth_parts() const {
  // Weights [inputs, outputs] are read fastest in whole rows. Even one part has its sums added up, as
  // the bias is added then.
  return matrix_.transposed || rows_ > kFewRows ? 0 : (matrix_.inputs + kDepth - 1) / kDepth;
}

int Product::column_parts(int columns, int copies) const {
  // What is worth a part: 64 KB of weights to read, or as long a time of computing.
  constexpr int64_t kWorth = 1 << 16;
  const int bits = matrix_.format == Format::kCodes4   ? 4
                   : matrix_.format == Format::kCodes8 ? 8
                   : matrix_.format == Format::kFloat  ? 32
                                                       : 16;
  const int64_t weights = static_cast<int64_t>(columns) * copies * matrix_.inputs;
  const int64_t reading = weights * bits / 8, computing = weights * (rows_ + 1) / 2;
  int64_t parts = (reading > computing ? reading : computing) / kWorth;
  int64_t most = kMostColumnParts;
  // Each part of many rows packs its own weights, so it should not be narrow.
  if (rows_ > kFewRows) most = 16;
  if (depth_parts()) {
    parts /= depth_parts();
    // Memory is slow where little is read of each row.
    most = static_cast<int64_t>(columns) * bits / 8 / 4096;
    if (most > kMostColumnParts) most = kMostColumnParts;
  }
  const int64_t units = (columns + kColumns - 1) / kColumns;
  if (parts > most) parts = most;
  if (parts > units) parts = units;
  return parts < 1 ? 1 : static_cast<int>(parts);
}

void Product::part(int count, int unit, int parts, int index, int* first, int* last) {
  const int64_t units = (static_cast<int64_t>(count) + unit - 1) / unit;
  *first = static_cast<int>(units * index / parts) * unit;
  *last = static_cast<int>(units * (index + 1) / parts) * unit;
  if (*last > count) *last = count;
}
