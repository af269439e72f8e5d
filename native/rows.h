// How the rows of a step are divided among threads, where each row is a unit of work.
#pragma once

#include "product.h"

// Few rows are one chunk, so that nobody has to be woken for them.
struct Rows {
  static constexpr int kChunk = 4;
  int count;

  int chunks() const { return count <= kFewRows ? 1 : (count + kChunk - 1) / kChunk; }
  // Calls function(row) for the rows of a chunk.
  template <class Function>
  void each(int chunk, Function function) const {
    int first = count <= kFewRows ? 0 : chunk * kChunk;
    int last = count <= kFewRows || first + kChunk > count ? count : first + kChunk;
    for (int row = first; row < last; row++) function(row);
  }
};

// The parts of a product, as chunks of a phase: every part of its rows with every part of its
// columns.
class Tiles {
 public:
  Tiles(const Product& product, int rows, int columns)
      : rows_(rows), columns_(columns), row_parts_(product.row_parts()), column_parts_(product.parts(columns)) {}

  int chunks() const { return row_parts_ * column_parts_; }
  // Calls function(first_row, last_row, first_column, last_column). Parts of the same columns
  // follow each other, so that weights are found in the cache.
  template <class Function>
  void each(int chunk, Function function) const {
    int top = 0, bottom = rows_, left, right;
    if (row_parts_ > 1) Product::part(rows_, row_parts_, chunk % row_parts_, &top, &bottom);
    Product::part(columns_, column_parts_, chunk / row_parts_, &left, &right);
    if (top < bottom && left < right) function(top, bottom, left, right);
  }

 private:
  int rows_, columns_, row_parts_, column_parts_;
};
