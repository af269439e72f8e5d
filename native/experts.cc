// Experts: the routed experts of a mixture, each of one neuron. Of n² experts, expert (a, b) has the
// score row_a + column_b. A token's `experts_per_token` best ones are found among the best rows and
// columns, and only their rows of the two tables are read.
#include <cmath>

#include "activation.h"
#include "operators.h"
#include "processor.h"
#include "rows.h"
#include "selection.h"
#include "team.h"

namespace {

constexpr int kGroup = 8;  // experts of a chunk, and of a sum that is completed before it is added

class Experts {
 public:
  static constexpr const char* kName = "Experts";
  static constexpr Input kInputs[] = {{kFloat},   {kFloat},           {kFloat, kOptional}, {kAnyType},
                                      {kFloat, kOptional}, {kAnyType}, {kFloat, kOptional}};
  static constexpr int kOutputs[] = {kFloat};

  explicit Experts(Attributes& attributes)
      : table_(attributes, ""),
        wanted_(attributes.number("experts_per_token", 1, kMostExperts)),
        normalize_(attributes.number("normalize", 0, 1)),
        kernels_(&chosen_kernels()),
        activate_(read_activation(attributes, *kernels_)) {}

  void run(Context& context) const {
    Tensor h = context.input("h", 0, kFloat, {kAny, kAny, kAny});
    const int64_t batch = h.dims[0], length = h.dims[1], hidden = h.dims[2];
    Tensor router = context.input("router", 1, kFloat, {hidden, kAny});
    if (router.dims[1] % 2 || router.dims[1] > 2 * kMostSide)
      context.fail("the router has %lld outputs", static_cast<long long>(router.dims[1]));
    const int side = static_cast<int>(router.dims[1] / 2);
    const int64_t experts = static_cast<int64_t>(side) * side;
    Tensor bias = context.optional("router_bias", 2, kFloat, {2 * side});
    const Matrix down = table_.read(context, "down", 3, 4, MatrixInput::kNoInput, hidden, experts, true);
    const Matrix up = table_.read(context, "up", 5, 6, MatrixInput::kNoInput, hidden, experts, true);
    if (wanted_ > experts) context.fail("%d of %lld experts are wanted", wanted_, static_cast<long long>(experts));
    if (batch * length > INT32_MAX / 2) context.fail("%lld rows are too many", static_cast<long long>(batch * length));
    float* out = static_cast<float*>(context.output(0, {batch, length, hidden}));
    if (context.failed() || batch * length == 0) return;

    const int count = static_cast<int>(batch * length), groups = (wanted_ + kGroup - 1) / kGroup;
    Matrix scores_matrix;
    scores_matrix.inputs = static_cast<int>(hidden);
    scores_matrix.outputs = 2 * side;
    scores_matrix.weight = router.data;
    scores_matrix.bias = bias.as<float>();
    Product product(*kernels_, scores_matrix, count);
    const Rows rows{count};
    const size_t width = hidden;
    const Candidates candidates(side, wanted_);
    Scratch scratch;
    product.reserve(scratch);
    scratch.reserve<float>(count * size_t(2 * side));
    scratch.reserve<int>(count * size_t(wanted_));
    scratch.reserve<float>(count * size_t(wanted_));
    scratch.reserve<float>(count * size_t(groups) * width);
    scratch.reserve<float>(count * size_t(groups) * width);
    scratch.reserve<int32_t>(count * candidates.numbers());
    if (!scratch.allocate()) return context.fail("no memory for %d rows", count);
    product.take(scratch);
    float* scores = scratch.take<float>(count * size_t(2 * side));
    int* chosen = scratch.take<int>(count * size_t(wanted_));
    float* weights = scratch.take<float>(count * size_t(wanted_));
    float* looked_up = scratch.take<float>(count * size_t(groups) * width);
    float* sums = scratch.take<float>(count * size_t(groups) * width);
    int32_t* numbers = scratch.take<int32_t>(count * candidates.numbers());

    Tiles tiles(product, count, 2 * side);
    auto set_rows = [&](int chunk) {
      rows.each(chunk, [&](int row) { product.set_row(row, h.as<float>() + row * width); });
    };
    auto route = [&](int chunk) { tiles.multiply(chunk, scores, 2 * side); };
    auto choose = [&](int chunk) {
      rows.each(chunk, [&](int row) {
        const size_t at = row * size_t(wanted_);
        candidates.choose(scores + row * size_t(2 * side), numbers + row * candidates.numbers(), chosen + at,
                          weights + at);
        weigh(weights + at);
      });
    };
    auto compute = [&](int chunk) {
      const int row = chunk / groups, first = chunk % groups * kGroup;
      const int last = first + kGroup < wanted_ ? first + kGroup : wanted_;
      const int* experts_of_row = chosen + row * size_t(wanted_);
      float* read = looked_up + chunk * width;
      float neurons[kGroup];
      for (int i = first; i < last; i++) {
        kernels_->product.look_up(down, experts_of_row[i], 0, down.inputs, read);
        neurons[i - first] = dot(h.as<float>() + row * width, read, width);
      }
      activate_(neurons, weights + row * size_t(wanted_) + first, last - first, neurons);
      float* sum = sums + chunk * width;
      memset(sum, 0, width * sizeof(float));
      for (int i = first; i < last; i++) {
        kernels_->product.look_up(up, experts_of_row[i], 0, up.inputs, read);
        const float neuron = neurons[i - first];
        for (size_t c = 0; c < width; c++) sum[c] += neuron * read[c];
      }
    };
    auto combine = [&](int chunk) {
      rows.each(chunk, [&](int row) {
        float* total = out + row * width;
        const float* part = sums + row * size_t(groups) * width;
        memcpy(total, part, width * sizeof(float));
        for (int g = 1; g < groups; g++)
          for (size_t c = 0; c < width; c++) total[c] += part[g * width + c];
      });
    };
    Team team;
    team.phase(rows.chunks(), set_rows);
    team.phase(tiles.chunks(), route);
    team.phase(rows.chunks(), choose);
    team.phase(count * groups, compute);
    team.phase(rows.chunks(), combine);
    team.run(context);
  }

 private:
  static constexpr int kMostExperts = 1024, kMostSide = 4096;

  // Finds the best experts of a token from the scores of rows and columns.
  struct Candidates {
    int side, wanted, kept;

    Candidates(int side, int wanted) : side(side), wanted(wanted), kept(wanted < side ? wanted : side) {}

    // Numbers of scratch that a token needs.
    size_t numbers() const { return 2 * side + 2 * kept + 2 * size_t(kept) * kept; }

    // Writes the experts with the largest scores, the best first, and their scores; of equal scores
    // that of the lower row, then of the lower column.
    void choose(const float* scores, int32_t* scratch, int* chosen, float* best) const {
      int32_t* order = scratch;
      int* lines = scratch + 2 * side;  // rows, then columns
      for (int half = 0; half < 2; half++) {
        for (int i = 0; i < side; i++) order[i] = ordered(scores[half * side + i]);
        first_in_order(lines + half * kept, kept, side,
                       [&](int a, int b) { return order[a] != order[b] ? order[a] > order[b] : a < b; });
      }
      int32_t* sums = lines + 2 * kept;
      int* places = sums + kept * kept;
      for (int i = 0; i < kept * kept; i++) sums[i] = ordered(sum(scores, lines, i));
      first_in_order(places, wanted, kept * kept,
                     [&](int a, int b) { return sums[a] != sums[b] ? sums[a] > sums[b] : a < b; });
      for (int i = 0; i < wanted; i++) {
        chosen[i] = lines[places[i] / kept] * side + lines[kept + places[i] % kept];
        best[i] = sum(scores, lines, places[i]);
      }
    }

    float sum(const float* scores, const int* lines, int place) const {
      return scores[lines[place / kept]] + scores[side + lines[kept + place % kept]];
    }
  };

  // The softmax of the scores, the largest of which comes first.
  void weigh(float* scores) const {
    float largest;
    // Writes whole vectors, but no row behind the scores of this token may change.
    float padded[kMostExperts + 16];
    memcpy(padded, scores, wanted_ * sizeof(float));
    float total = kernels_->layer.soften(padded, wanted_, -INFINITY, &largest);
    float normed = 0;
    for (int i = 0; i < wanted_; i++) normed += scores[i] = padded[i] / total;
    if (normalize_)
      for (int i = 0; i < wanted_; i++) scores[i] /= normed;
  }

  static float dot(const float* a, const float* b, size_t count) {
    // As many sums as a vector of any instruction set has elements.
    float sums[16] = {};
    size_t i = 0;
    for (; i + 16 <= count; i += 16)
      for (int j = 0; j < 16; j++) sums[j] += a[i + j] * b[i + j];
    float total = 0;
    for (; i < count; i++) total += a[i] * b[i];
    for (int j = 0; j < 16; j++) total += sums[j];
    return total;
  }

  MatrixInput table_;
  int wanted_, normalize_;
  const Kernels* kernels_;
  Activation activate_;
};

}  // namespace

const OrtCustomOp* experts_operator() {
  static const Operator<Experts> op;
  return &op;
}
