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
  if (!integers()) return;
  scratch.reserve<int16_t>(rows_ * kernels_.padded_inputs(matrix_));
  scratch.reserve<float>(rows_);
  scratch.reserve<bool>(rows_);
}

void Product::take(Scratch& scratch) {
  at_ = scratch.take<const float*>(rows_);
  if (!integers()) return;
  values_ = scratch.take<int16_t>(rows_ * kernels_.padded_inputs(matrix_));
  scales_ = scratch.take<float>(rows_);
  plain_ = scratch.take<bool>(rows_);
}

void Product::set_row(int row, const float* x) {
  at_[row] = x;
  if (!integers()) return;
  plain_[row] = kernels_.quantize(matrix_, x, values_ + row * kernels_.padded_inputs(matrix_), scales_ + row);
}

void Product::multiply(int first_row, int last_row, int first_column, int last_column, float* out,
                       size_t stride) const {
  const int count = last_row - first_row;
  if (count <= 0 || first_column >= last_column) return;
  float* to = out + first_row * stride;
  if (rows_ > kFewRows) {
    kernels_.multiply_many(matrix_, at_[first_row], at_[1] - at_[0], count, first_column, last_column, to, stride);
  } else if (integers()) {
    const size_t padded = kernels_.padded_inputs(matrix_);
    IntegerRows rows = {values_ + first_row * padded, padded, scales_ + first_row, count};
    kernels_.multiply_codes(matrix_, rows, first_column, last_column, to, stride);
    for (int row = first_row; row < last_row; row++) {
      if (plain_[row]) continue;
      kernels_.multiply_many(matrix_, at_[row], 0, 1, first_column, last_column, out + row * stride, stride);
    }
  } else {
    kernels_.multiply_few(matrix_, at_ + first_row, count, first_column, last_column, to, stride);
  }
}

int Product::parts(int columns) const {
  // What is worth a part: 128 KB of weights to read, or as long a time of computing.
  constexpr int64_t kWorth = 1 << 17;
  const int bits = matrix_.format == Format::kCodes4   ? 4
                   : matrix_.format == Format::kCodes8 ? 8
                   : matrix_.format == Format::kFloat  ? 32
                                                       : 16;
  const int64_t weights = static_cast<int64_t>(columns) * matrix_.inputs;
  const int64_t reading = weights * bits / 8, computing = weights * (rows_ + 1) / 2;
  int64_t most = 64;
  if (rows_ > kFewRows) {
    // Each part unpacks its own weights, so it should not be narrow.
    most = 16;
  } else if (!matrix_.transposed) {
    // Memory is slow where a part reads less than 1 KB of each row of weights. An even number of
    // few parts, since an odd one would leave one of two threads idle.
    most = static_cast<int64_t>(columns) * bits / 8 / 1024;
    if (most > 2) most -= most % 2;
  }
  int64_t parts = (reading > computing ? reading : computing) / kWorth;
  const int64_t units = (columns + kColumns - 1) / kColumns;
  if (parts > most) parts = most;
  if (parts > units) parts = units;
  return parts < 1 ? 1 : static_cast<int>(parts);
}

void Product::part(int columns, int parts, int index, int* first, int* last) {
  const int64_t units = (columns + kColumns - 1) / kColumns;
  *first = static_cast<int>(units * index / parts) * kColumns;
  *last = static_cast<int>(units * (index + 1) / parts) * kColumns;
  if (*last > columns) *last = columns;
}

int Product::row_parts() const {
  // As many rows as the second cache holds beside the weights.
  constexpr int kRows = 256;
  return rows_ <= kFewRows ? 1 : (rows_ + kRows - 1) / kRows;
}
