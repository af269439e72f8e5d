// How the rows of a step are divided among threads, where each row is a unit of work.
#pragma once

#include <atomic>

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
// columns and of its depth.
class Tiles {
 public:
  // `copies` ranges of `columns` columns, one behind the other, are multiplied together.
  Tiles(const Product& product, int rows, int columns, int copies = 1)
      : product_(product), rows_(rows), columns_(columns), copies_(copies), row_parts_(product.row_parts()),
        column_parts_(product.column_parts(columns, copies)), depth_parts_(product.depth_parts()) {}

  int chunks() const { return row_parts_ * column_parts_ * (depth_parts_ ? depth_parts_ : 1); }
  // Does a chunk, and calls done(first_row, last_row, first_column, last_column) for what is in `out`
  // thereby, in each copy. Parts of the same columns follow each other, so that weights are found in
  // the cache.
  template <class Done>
  void multiply(int chunk, float* out, size_t stride, Done done) {
    // Only products of few rows, which are one part, are divided in depth.
    const int depth = depth_parts_ ? chunk % depth_parts_ : 0;
    if (depth_parts_) chunk /= depth_parts_;
    const int column = chunk / row_parts_;
    int top, bottom, left, right;
    Product::part(rows_, 1, row_parts_, chunk % row_parts_, &top, &bottom);
    Product::part(columns_, Product::kColumns, column_parts_, column, &left, &right);
    if (top >= bottom || left >= right) return;
    for (int i = 0; i < copies_; i++)
      product_.multiply(depth, top, bottom, i * columns_ + left, i * columns_ + right, out, stride);
    if (depth_parts_) {
      if (complete_[column].fetch_add(1, std::memory_order_acq_rel) + 1 < depth_parts_) return;
      for (int i = 0; i < copies_; i++)
        product_.add_up(top, bottom, i * columns_ + left, i * columns_ + right, out, stride);
    }
    done(top, bottom, left, right);
  }
  void multiply(int chunk, float* out, size_t stride) {
    multiply(chunk, out, stride, [](int, int, int, int) {});
  }

 private:
  const Product& product_;
  const int rows_, columns_, copies_, row_parts_, column_parts_, depth_parts_;
  std::atomic<int> complete_[Product::kMostColumnParts] = {};  // parts of depth that are done, by columns
};
