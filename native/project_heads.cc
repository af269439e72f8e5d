// ProjectHeads: queries, keys and values of the new tokens as rows of the state.
#include "operators.h"
#include "processor.h"
#include "rows.h"
#include "team.h"

namespace {

class ProjectHeads {
 public:
  static constexpr const char* kName = "ProjectHeads";
  static constexpr Input kInputs[] = {{kFloat},  {kAnyType},          {kFloat, kOptional}, {kFloat, kOptional}, {kFloat},
                                      {kFloat, kOptional}, {kFloat}, {kFloat, kOptional}, {kFloat},  {kInt64},
                                      {kFloat},  {kFloat}, {kFloat, kOptional}, {kFloat, kOptional}, {kFloat, kOptional}};
  static constexpr int kOutputs[] = {kFloat, kFloat, kFloat};

  explicit ProjectHeads(Attributes& attributes)
      : matrix_(attributes, ""),
        heads_(attributes.number("heads", 1, 4096)),
        kv_heads_(attributes.number("kv_heads", 1, 4096)),
        dim_(attributes.number("head_dim", 1, 65536)),
        gates_(attributes.number("gates", 1, 4096)),
        row_(attributes.number("row", 1, 65536)),
        exp_(attributes.number("exp_gates", 0, 1)),
        epsilon_(attributes.real("epsilon")),
        kernels_(&chosen_kernels()) {}

  void run(Context& context) const {
    const int all = heads_ + kv_heads_, half = dim_ / 2;
    Tensor h = context.input("h", 0, kFloat, {kAny, kAny, kAny});
    const int64_t batch = h.dims[0], length = h.dims[1], hidden = h.dims[2];
    Matrix matrix = matrix_.read(context, "weight", 1, 2, 3, hidden, all * dim_ + kv_heads_ * row_, false);
    Tensor gate_weight = context.input("gate_weight", 4, kFloat, {hidden, 2 * all * gates_});
    Tensor gate_bias = context.optional("gate_bias", 5, kFloat, {2 * all * gates_});
    Tensor a = context.input("A", 6, kFloat, {all, gates_});
    Tensor norm = context.optional("qk_norm", 7, kFloat, {all, dim_});
    Tensor rest = context.input("rest", 8, kFloat, {batch, length, all, kAny});
    Tensor positions = context.input("positions", 9, kInt64, {batch, length});
    Tensor cos = context.input("cos", 10, kFloat, {kAny, half});
    Tensor sin = context.input("sin", 11, kFloat, {cos.dims[0], half});
    Tensor limit = context.optional("gate_limit", 12, kFloat, {batch, length, all, gates_});
    Tensor per_step = context.optional("gate_per_step", 13, kFloat, {all, gates_});
    Tensor step = context.optional("gate_step", 14, kFloat, {all, gates_});
    if (!per_step != !step) context.fail("gate_step and gate_per_step belong together");
    const int channels = step ? 2 * gates_ : gates_;
    const int64_t others = rest.dims[3];
    if (dim_ + channels + others != row_) {
      context.fail("a row of %d channels does not hold %d, %d for gates and %lld others", row_, dim_, channels,
                   static_cast<long long>(others));
    }
    if (batch * length > INT32_MAX / 2) context.fail("%lld rows are too many", static_cast<long long>(batch * length));
    float* q = static_cast<float*>(context.output(0, {batch, length, heads_ * row_}));
    float* k = static_cast<float*>(context.output(1, {batch, length, kv_heads_ * row_}));
    float* v = static_cast<float*>(context.output(2, {batch, length, kv_heads_ * row_}));
    const int count = static_cast<int>(batch * length);
    for (int i = 0; i < count && !context.failed(); i++) {
      int64_t position = positions.as<int64_t>()[i];
      if (position < 0 || position >= cos.dims[0]) {
        context.fail("the position %lld is not in the rotary tables", static_cast<long long>(position));
      }
    }
    if (context.failed() || count == 0) return;

    const LayerKernels& kernels = kernels_->layer;
    const Rows rows{count};
    const int pairs = all * gates_;
    const size_t width = matrix.outputs;
    Product product(*kernels_, matrix, count);
    Scratch scratch;
    product.reserve(scratch);
    scratch.reserve<float>(count * width);
    scratch.reserve<float>(static_cast<size_t>(count) * pairs * 2);
    if (!scratch.allocate()) return context.fail("no memory");
    product.take(scratch);
    float* projected = scratch.take<float>(count * width);
    float* gates = scratch.take<float>(static_cast<size_t>(count) * pairs * 2);

    Tiles tiles(product, count, matrix.outputs);
    auto set_rows = [&](int chunk) {
      rows.each(chunk, [&](int row) { product.set_row(row, h.as<float>() + row * hidden); });
    };
    // The products of the gates are chunks beside those of the large one.
    auto multiply = [&](int chunk) {
      if (chunk < tiles.chunks()) return tiles.multiply(chunk, projected, width);
      rows.each(chunk - tiles.chunks(), [&](int row) {
        float* out = gates + static_cast<size_t>(row) * pairs * 2;
        kernels.narrow_product(h.as<float>() + row * hidden, gate_weight.as<float>(),
                               gate_bias ? gate_bias.as<float>() : nullptr, static_cast<int>(hidden), 2 * pairs, out);
        kernels.gates(out, a.as<float>(), limit ? limit.as<float>() + static_cast<size_t>(row) * pairs : nullptr, exp_,
                      pairs, out);
        // In place of the second half of what the pairs took: the fine parts.
        if (step) kernels.split_gates(out, per_step.as<float>(), step.as<float>(), pairs, out, out + pairs);
      });
    };
    auto make_rows = [&](int chunk) {
      rows.each(chunk, [&](int row) {
        const float* in = projected + row * width;
        const float* gate = gates + static_cast<size_t>(row) * pairs * 2;
        const size_t angle = positions.as<int64_t>()[row] * half;
        for (int head = 0; head < all; head++, in += dim_, gate += gates_) {
          float* out = head < heads_ ? q + (static_cast<size_t>(row) * heads_ + head) * row_
                                     : k + (static_cast<size_t>(row) * kv_heads_ + head - heads_) * row_;
          kernels.rotate(in, norm ? norm.as<float>() + head * dim_ : nullptr, epsilon_, dim_, cos.as<float>() + angle,
                         sin.as<float>() + angle, out);
          memcpy(out + dim_, gate, gates_ * sizeof(float));
          if (step) memcpy(out + dim_ + gates_, gate + pairs, gates_ * sizeof(float));
          memcpy(out + dim_ + channels, rest.as<float>() + (static_cast<size_t>(row) * all + head) * others,
                 others * sizeof(float));
        }
        memcpy(v + static_cast<size_t>(row) * kv_heads_ * row_, in, static_cast<size_t>(kv_heads_) * row_ * sizeof(float));
      });
    };
    Team team;
    team.phase(rows.chunks(), set_rows);
    team.phase(tiles.chunks() + rows.chunks(), multiply);
    team.phase(rows.chunks(), make_rows);
    team.run(context);
  }

 private:
  MatrixInput matrix_;
  int heads_, kv_heads_, dim_, gates_, row_;
  bool exp_;
  float epsilon_;
  const Kernels* kernels_;
};

}  // namespace

const OrtCustomOp* project_heads_operator() {
  static const Operator<ProjectHeads> op;
  return &op;
}
