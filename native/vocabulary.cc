// ProjectToVocabulary: the logits of the last positions.
#include "operators.h"
#include "processor.h"
#include "rows.h"
#include "team.h"

namespace {

class ProjectToVocabulary {
 public:
  static constexpr const char* kName = "ProjectToVocabulary";
  static constexpr Input kInputs[] = {{kFloat}, {kInt64}, {kAnyType}, {kFloat, kOptional}, {kFloat, kOptional}};
  static constexpr int kOutputs[] = {kFloat};

  explicit ProjectToVocabulary(Attributes& attributes)
      : weight_(attributes, ""), transposed_(attributes.number("transposed", 0, 1)), kernels_(&chosen_kernels()) {}

  void run(Context& context) const {
    Tensor h = context.input("h", 0, kFloat, {kAny, kAny, kAny});
    Tensor keep = context.input("logits_to_keep", 1, kInt64, {1});
    const int64_t batch = h.dims[0], length = h.dims[1], hidden = h.dims[2];
    const Matrix matrix = weight_.read(context, "weight", 2, 3, 4, hidden, kAny, transposed_);
    if (context.failed()) return;
    int64_t kept = keep.as<int64_t>()[0];
    if (kept < 0) context.fail("logits_to_keep is %lld", static_cast<long long>(kept));
    if (kept == 0 || kept > length) kept = length;
    if (batch * kept > INT32_MAX) context.fail("too many positions");
    float* logits = static_cast<float*>(context.output(0, {batch, kept, matrix.outputs}));
    if (context.failed() || batch * kept == 0) return;

    const int rows = static_cast<int>(batch * kept), last = static_cast<int>(kept);
    Product product(*kernels_, matrix, rows);
    // Many rows have to be equally far apart.
    const bool copied = rows > kFewRows && batch > 1 && kept < length;
    Scratch scratch;
    product.reserve(scratch);
    if (copied) scratch.reserve<float>(rows * hidden);
    if (!scratch.allocate()) return context.fail("no memory for %d rows", rows);
    product.take(scratch);
    float* copies = copied ? scratch.take<float>(rows * hidden) : nullptr;

    const Rows divided{rows};
    Tiles tiles(product, rows, matrix.outputs);
    auto set_rows = [&](int chunk) {
      divided.each(chunk, [&](int row) {
        const float* x = h.as<float>() + ((row / last + 1) * length - last + row % last) * hidden;
        if (copied) x = static_cast<float*>(memcpy(copies + row * hidden, x, hidden * sizeof(float)));
        product.set_row(row, x);
      });
    };
    auto multiply = [&](int chunk) { tiles.multiply(chunk, logits, matrix.outputs); };
    Team team;
    team.phase(divided.chunks(), set_rows);
    team.phase(tiles.chunks(), multiply);
    team.run(context);
  }

 private:
  MatrixInput weight_;
  int transposed_;
  const Kernels* kernels_;
};

}  // namespace

const OrtCustomOp* project_to_vocabulary_operator() {
  static const Operator<ProjectToVocabulary> op;
  return &op;
}
