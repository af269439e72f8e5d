// Products of rows of activations with the matrices of a graph, whatever form their weights have.
//
// Up to kFewRows rows are multiplied in integers where the weights are codes (docs/native.md,
// "Numbers"), or by reading 16- or 32-bit weights once; for more rows, tiles of the weights are
// unpacked to float32. Nothing is repacked or kept between runs.
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
  // out[row * stride + column] for the rows and columns from the first up to the last, exclusive.
  // `out` is where row 0 and column 0 are. Column ranges begin at multiples of kColumns.
  void multiply(int first_row, int last_row, int first_column, int last_column, float* out, size_t stride) const;

  static constexpr int kColumns = 32;
  // Into how many parts of about equal size to divide the columns, so that threads have enough to
  // do and each part enough to read; and the columns of one part. `columns` may be fewer than the
  // outputs, such as one half of a matrix whose halves are multiplied together.
  int parts(int columns) const;
  static void part(int columns, int parts, int index, int* first, int* last);
  // The same for the rows: 1 for few rows.
  int row_parts() const;

 private:
  // Whether rows are multiplied in integers.
  bool integers() const { return rows_ <= kFewRows && matrix_.scales; }

  const ProductKernels& kernels_;
  const Matrix matrix_;
  const int rows_;
  const float** at_ = nullptr;  // the rows as they were given
  int16_t* values_ = nullptr;   // the rows in integers, with their scales
  float* scales_ = nullptr;
  bool* plain_ = nullptr;  // whether a row can be written in integers
};
