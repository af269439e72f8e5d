// Products of rows of activations with the matrices of a graph, whatever form their weights have.
//
// Rows are multiplied in integers where the weights are codes (docs/native.md, "Numbers"), else in
// float32. A row has the same bits however many rows there are. Nothing is kept between runs.
#pragma once

#include "context.h"
#include "kernels.h"
#include "matrix.h"
#include "scratch.h"

// The attributes of a matrix, and where among the inputs it is.
class MatrixInput {
 public:
  // Attributes `bits` and `block_size`, behind a prefix such as "down_".
  MatrixInput(Attributes& attributes, const char* prefix);

  // Checks the inputs and returns the matrix. A size of kAny fits every size. `bias` is kNoInput
  // for a matrix without one; `table` says that unquantized weights are [outputs, inputs].
  static constexpr size_t kNoInput = SIZE_MAX;
  Matrix read(Context& context, const char* name, size_t weight, size_t scales, size_t bias, int64_t inputs,
              int64_t outputs, bool table) const;

 private:
  int bits_, block_;
};

// One product of a run: rows [rows, inputs] times the matrix, plus its bias.
//
// Use: construct, `reserve`, `take` after the scratch is allocated; then in one phase `set_row` for
// each row, and in a later one `multiply` for parts of rows and columns, in any order.
class Product {
 public:
  Product(const Kernels& kernels, const Matrix& matrix, int rows);
  void reserve(Scratch& scratch) const;
  void take(Scratch& scratch);

  // Gives the product a row of activations, which must stay in memory until the end. May be called
  // for different rows at once. More than kFewRows rows must be equally far apart in memory.
  void set_row(int row, const float* x);

  // A product is divided into parts of rows, of columns and of depth, for threads to have enough to
  // do and each part enough to read. Column ranges begin at multiples of kColumns; `copies` ranges of
  // `columns` columns each may be divided alike, to be multiplied together.
  static constexpr int kColumns = 32;
  static constexpr int kMostColumnParts = 64;
  int row_parts() const;
  int column_parts(int columns, int copies) const;
  int depth_parts() const;  // 0 if the depth is not divided
  // The rows and columns of a part of `count`, which are divided by units of `unit`.
  static void part(int count, int unit, int parts, int index, int* first, int* last);

  // Computes a part of the depth for rows and columns from the first up to the last, exclusive. With
  // no parts of depth, writes the result: out[row * stride + column]; `out` is where row 0 and
  // column 0 are. With them, keeps what `add_up` writes when all of them are there.
  void multiply(int depth, int first_row, int last_row, int first_column, int last_column, float* out,
                size_t stride) const;
  void add_up(int first_row, int last_row, int first_column, int last_column, float* out, size_t stride) const;

 private:
  bool integers() const { return matrix_.scales; }
  void multiply_unusual(int row, int first_column, int last_column, float* out) const;

  const ProductKernels& kernels_;
  const Matrix matrix_;
  const int rows_;
  const float** at_ = nullptr;  // the rows as they were given
  int16_t* values_ = nullptr;   // the rows in integers, with their offsets and scales
  int32_t* offsets_ = nullptr;
  float* scales_ = nullptr;
  bool* usual_ = nullptr;   // whether a row can be written in integers
  float* sums_ = nullptr;   // [depth parts, rows, outputs]
};
