// What ends each half of a layer: x' = residual ⊙ x + (values · matrix [+ routed]), and
// h' = rms_norm(x') ⊙ norm.
#pragma once

#include "rows.h"
#include "team.h"

class ResidualProduct {
 public:
  // Where the inputs and outputs are; [rows, H] and [H]. `routed` may be null.
  struct Streams {
    const float *x, *residual, *norm, *routed;
    float *next_h, *next_x;
    float epsilon;
  };

  ResidualProduct(const Kernels& kernels, const Matrix& matrix, int rows)
      : kernels_(kernels), hidden_(matrix.outputs), rows_{rows}, product_(kernels, matrix, rows),
        tiles_(product_, rows, matrix.outputs) {}

  void reserve(Scratch& scratch) const { product_.reserve(scratch); }
  void take(Scratch& scratch) { product_.take(scratch); }
  void set_row(int row, const float* values) { product_.set_row(row, values); }

  // Adds the two phases. This object must live until the team has run.
  void add_phases(Team& team, const Streams& streams) {
    streams_ = streams;
    multiply_.self = finish_.self = this;
    team.phase(tiles_.chunks(), multiply_);
    team.phase(rows_.chunks(), finish_);
  }

 private:
  struct Multiply {
    ResidualProduct* self;
    void operator()(int chunk) const { self->multiply(chunk); }
  };
  struct Finish {
    ResidualProduct* self;
    void operator()(int chunk) const { self->finish(chunk); }
  };

  void multiply(int chunk) {
    tiles_.multiply(chunk, streams_.next_x, hidden_);
  }
  void finish(int chunk) const {
    const Streams& s = streams_;
    rows_.each(chunk, [&](int row) {
      size_t at = static_cast<size_t>(row) * hidden_;
      kernels_.layer.add_norm(s.x + at, s.residual, s.routed ? s.routed + at : nullptr, s.norm, s.epsilon, hidden_,
                              s.next_x + at, s.next_h + at);
    });
  }

  const Kernels& kernels_;
  const int hidden_;
  const Rows rows_;
  Product product_;
  Tiles tiles_;
  Streams streams_{};
  Multiply multiply_{};
  Finish finish_{};
};
