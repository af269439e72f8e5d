// FeedForward: the MLP, then the residual and the norm before the next layer.
#include "activation.h"
#include "operators.h"
#include "processor.h"
#include "residual_product.h"

namespace {

class FeedForward {
 public:
  static constexpr const char* kName = "FeedForward";
  static constexpr Input kInputs[] = {{kFloat},           {kFloat},           {kAnyType},         {kFloat, kOptional},
                                      {kFloat, kOptional}, {kAnyType},         {kFloat, kOptional}, {kFloat, kOptional},
                                      {kFloat, kOptional}, {kFloat},           {kFloat}};
  static constexpr int kOutputs[] = {kFloat, kFloat};

  explicit FeedForward(Attributes& attributes)
      : gate_up_(attributes, "gate_up_"),
        down_(attributes, "down_"),
        epsilon_(attributes.real("epsilon")),
        kernels_(&chosen_kernels()),
        activate_(read_activation(attributes, *kernels_)) {}

  void run(Context& context) const {
    Tensor h = context.input("h", 0, kFloat, {kAny, kAny, kAny});
    int64_t batch = h.dims[0], length = h.dims[1], hidden = h.dims[2];
    Tensor x = context.input("x", 1, kFloat, {batch, length, hidden});
    Matrix gate_up = gate_up_.read(context, "gate_up", 2, 3, 4, hidden, kAny, false);
    if (gate_up.outputs % 2) context.fail("gate_up has %d outputs, which is odd", gate_up.outputs);
    const int inner = gate_up.outputs / 2;
    Matrix down = down_.read(context, "down", 5, 6, 7, inner, hidden, false);
    Tensor routed = context.optional("routed", 8, kFloat, {batch, length, hidden});
    Tensor residual = context.input("residual", 9, kFloat, {hidden});
    Tensor norm = context.input("norm", 10, kFloat, {hidden});
    if (batch * length > INT32_MAX / 2) context.fail("%lld rows are too many", static_cast<long long>(batch * length));
    float* next_h = static_cast<float*>(context.output(0, {batch, length, hidden}));
    float* next_x = static_cast<float*>(context.output(1, {batch, length, hidden}));
    if (context.failed() || batch * length == 0) return;

    const int count = static_cast<int>(batch * length);
    const Rows rows{count};
    const size_t width = gate_up.outputs;
    Product first(*kernels_, gate_up, count);
    ResidualProduct second(*kernels_, down, count);
    Scratch scratch;
    first.reserve(scratch);
    second.reserve(scratch);
    scratch.reserve<float>(count * width);
    if (!scratch.allocate()) return context.fail("no memory");
    first.take(scratch);
    second.take(scratch);
    float* both = scratch.take<float>(count * width);  // gate, then up; activations take the place of the gate

    // Columns of a product begin at multiples of kColumns. If the second half does not, activations
    // are a phase of their own.
    const bool halves = inner % Product::kColumns == 0;
    Tiles tiles(first, count, halves ? inner : gate_up.outputs, halves ? 2 : 1);
    auto set_rows = [&](int chunk) {
      rows.each(chunk, [&](int row) { first.set_row(row, h.as<float>() + row * hidden); });
    };
    auto multiply = [&](int chunk) {
      tiles.multiply(chunk, both, width, [&](int top, int bottom, int left, int right) {
        if (!halves) return;
        for (int row = top; row < bottom; row++) activate(both + row * width, inner, left, right);
      });
    };
    auto activate_rows = [&](int chunk) {
      rows.each(chunk, [&](int row) { activate(both + row * width, inner, 0, inner); });
    };
    auto give = [&](int chunk) {
      rows.each(chunk, [&](int row) { second.set_row(row, both + row * width); });
    };
    Team team;
    team.phase(rows.chunks(), set_rows);
    team.phase(tiles.chunks(), multiply);
    if (!halves) team.phase(rows.chunks(), activate_rows);
    team.phase(rows.chunks(), give);
    second.add_phases(team, {x.as<float>(), residual.as<float>(), norm.as<float>(),
                             routed ? routed.as<float>() : nullptr, next_h, next_x, epsilon_});
    team.run(context);
  }

 private:
  void activate(float* row, int inner, int first, int last) const {
    activate_(row + first, row + inner + first, last - first, row + first);
  }

  MatrixInput gate_up_, down_;
  float epsilon_;
  const Kernels* kernels_;
  Activation activate_;
};

}  // namespace

const OrtCustomOp* feed_forward_operator() {
  static const Operator<FeedForward> op;
  return &op;
}
