// Positions: where the new tokens are, and the last channels of their rows.
#include "operators.h"

namespace {

class Positions {
 public:
  static constexpr const char* kName = "Positions";
  static constexpr Input kInputs[] = {{kInt64}, {kInt64}, {kInt64}, {kInt64}, {kFloat}};
  static constexpr int kOutputs[] = {kInt64, kFloat, kInt64, kInt32, kInt32};

  explicit Positions(Attributes&) {}

  void run(Context& context) const {
    Tensor mask = context.input("attention_mask", 0, kInt64, {kAny, kAny});
    int64_t batch = mask.dims[0], total = mask.dims[1];
    Tensor ids = context.input("input_ids", 1, kInt64, {batch, kAny});
    int64_t length = ids.dims[1];
    Tensor past = context.input("past_lengths", 2, kInt64, {kAny});
    context.input("numbers", 3, kInt64, {kAny});
    Tensor table = context.input("rest_table", 4, kFloat, {2, kAny, kAny});
    if (context.failed()) return;
    if (past.dims[0] != batch && past.dims[0] != 1) {
      return context.fail("past_lengths has %lld elements for %lld sequences", static_cast<long long>(past.dims[0]),
                          static_cast<long long>(batch));
    }
    if (length < 1 || length > total || total > INT32_MAX) {
      return context.fail("there are %lld new tokens, and the mask has %lld columns", static_cast<long long>(length),
                          static_cast<long long>(total));
    }
    int64_t heads = table.dims[1], rest = table.dims[2];
    auto* positions = static_cast<int64_t*>(context.output(0, {batch, length}));
    auto* channels = static_cast<float*>(context.output(1, {batch, length, heads, rest}));
    auto* columns = static_cast<int64_t*>(context.output(2, {batch, length}));
    auto* lengths = static_cast<int32_t*>(context.output(3, {batch}));
    auto* total_length = static_cast<int32_t*>(context.output(4, {}));
    if (context.failed()) return;
    *total_length = static_cast<int32_t>(total);
    for (int64_t b = 0; b < batch; b++) {
      const int64_t* row = mask.as<int64_t>() + b * total;
      int64_t first = past.as<int64_t>()[past.dims[0] == 1 ? 0 : b];
      if (first < 0) return context.fail("the past length %lld is negative", static_cast<long long>(first));
      if (first > total - length) first = total - length;
      int64_t before = 0;
      for (int64_t t = 0; t < first; t++) before += row[t];
      for (int64_t s = 0; s < length; s++) {
        int64_t is_token = row[first + s], at = b * length + s;
        if (is_token < 0 || is_token > 1) {
          return context.fail("the mask has the number %lld", static_cast<long long>(is_token));
        }
        positions[at] = before;
        columns[at] = first + s;
        before += is_token;
        memcpy(channels + at * heads * rest, table.as<float>() + is_token * heads * rest, heads * rest * sizeof(float));
      }
      lengths[b] = static_cast<int32_t>(first + length - 1);
    }
  }
};

}  // namespace

const OrtCustomOp* positions_operator() {
  static const Operator<Positions> op;
  return &op;
}
