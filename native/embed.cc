// Embed: the embedding of the new tokens, and the norm before the first layer.
#include "operators.h"
#include "processor.h"
#include "product.h"

namespace {

class Embed {
 public:
  static constexpr const char* kName = "Embed";
  static constexpr Input kInputs[] = {{kInt64}, {kAnyType}, {kFloat, kOptional}, {kFloat}};
  static constexpr int kOutputs[] = {kFloat, kFloat};

  explicit Embed(Attributes& attributes)
      : table_(attributes, ""), epsilon_(attributes.real("epsilon")), kernels_(&chosen_kernels()) {}

  void run(Context& context) const {
    Tensor ids = context.input("input_ids", 0, kInt64, {kAny, kAny});
    Tensor norm = context.input("norm", 3, kFloat, {kAny});
    int64_t hidden = norm.dims[0];
    Matrix table = table_.read(context, "table", 1, 2, MatrixInput::kNoInput, hidden, kAny, true);
    int64_t rows = ids.dims[0] * ids.dims[1];
    float* h = static_cast<float*>(context.output(0, {ids.dims[0], ids.dims[1], hidden}));
    float* x = static_cast<float*>(context.output(1, {ids.dims[0], ids.dims[1], hidden}));
    for (int64_t i = 0; i < rows && !context.failed(); i++) {
      int64_t id = ids.as<int64_t>()[i];
      // As Gather does, which counts negative numbers from the end.
      if (id < 0) id += table.outputs;
      if (id < 0 || id >= table.outputs) context.fail("the id %lld is not in the table", static_cast<long long>(id));
    }
    if (context.failed()) return;
    for (int64_t i = 0; i < rows; i++) {
      int64_t id = ids.as<int64_t>()[i];
      kernels_->product.look_up(table, id < 0 ? id + table.outputs : id, 0, table.inputs, x + i * hidden);
      kernels_->layer.rms_norm(x + i * hidden, norm.as<float>(), epsilon_, static_cast<int>(hidden), h + i * hidden);
    }
  }

 private:
  MatrixInput table_;
  float epsilon_;
  const Kernels* kernels_;
};

}  // namespace

const OrtCustomOp* embed_operator() {
  static const Operator<Embed> op;
  return &op;
}
