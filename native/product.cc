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
  matrix.inputs = static_cast<int>(inputs);
  matrix.outputs = static_cast<int>(outputs);
  matrix.weight = given.data;
  if (bias != kNoInput) matrix.bias = context.optional("bias", bias, kFloat, {outputs}).as<float>();
  return matrix;
}
