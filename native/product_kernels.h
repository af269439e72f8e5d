// The kernels of products: see `product.h` for what they are used for.
#pragma once

#include "matrix.h"

constexpr int kFewRows = 8;
constexpr int kDepth = 128;  // inputs that are summed up by themselves

// Rows of activations in int16, and what they are multiplied with.
struct IntegerRows {
  const int16_t* values;  // as `quantize` writes them
  size_t stride;          // from row to row
  const int32_t* offsets;  // of each block, row by row
  const float* scales;    // one a row
  int rows;
};

struct ProductKernels {
  // Columns of a strip: a packed matrix [k, n] is ceil(n / strip) strips [k, strip], one behind the
  // other. Columns beyond n hold zeros.
  int strip;
  // Packs b [k, n], whose rows are `stride` apart.
  void (*pack)(const float* b, size_t stride, int n, int k, float* panel);
  // Packs the transposed matrix of b [n, k].
  void (*pack_transposed)(const float* b, size_t stride, int n, int k, float* panel);
  // c [m, n] = a [m, k] times the packed matrix, or c += that. Each row of c is computed alone.
  void (*gemm_panel)(const float* a, size_t lda, int m, const float* panel, int k, float* c, size_t ldc, int n,
                     bool add);

  // Values of a row that `quantize` writes for this matrix.
  size_t (*padded_inputs)(const Matrix& matrix);
  // Writes a row in int16, in the order in which `multiply_codes` reads it, its scale, and for each
  // block the sum of its numbers times the zero point of codes. False, and a row of zeros, if it has
  // an infinity, a NaN, or only numbers that are all but zero.
  bool (*quantize)(const Matrix& matrix, const float* x, int16_t* values, int32_t* offsets, float* scale);
  // The products below write out[row * stride + column], for columns from the first up to the last,
  // exclusive; the first is a multiple of 32.
  //
  // Rows of integers times codes.
  void (*multiply_codes)(const Matrix& matrix, const IntegerRows& rows, int first_column, int last_column, float* out,
                         size_t stride);
  // Rows times unquantized weights [outputs, inputs].
  void (*multiply_table)(const Matrix& matrix, const float* const* rows, int count, int first_column, int last_column,
                         float* out, size_t stride);
  // Up to kFewRows rows times unquantized weights [inputs, outputs]: the inputs from the first up to
  // the last, without the bias. The sums of every kDepth inputs, added up in order to the bias, are
  // what `multiply_many` gives.
  void (*multiply_few)(const Matrix& matrix, const float* const* rows, int count, int first_input, int last_input,
                       int first_column, int last_column, float* out, size_t stride);
  // Rows that are `row_stride` apart, times unquantized weights [inputs, outputs].
  void (*multiply_many)(const Matrix& matrix, const float* rows, size_t row_stride, int count, int first_column,
                        int last_column, float* out, size_t stride);

  // Writes the inputs from the first up to the last of one row of a transposed matrix: out[0] is the
  // first. `first` is a multiple of 2.
  void (*look_up)(const Matrix& matrix, int64_t index, int first, int last, float* out);
};

