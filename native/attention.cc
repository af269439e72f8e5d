// Attention, Int8Attention: extend a growing state, attend to it, and end the first half of a layer.
#include <atomic>

#include "attention_attributes.h"
#include "attention_blocks.h"
#include "attention_parts.h"
#include "operators.h"
#include "residual_product.h"
#include "selection.h"

namespace {

// The inputs, in the numbers of which the operators differ.
struct Inputs {
  Tensor q, k, v, past_key, past_value, lengths, total_length, key_scale, value_scale, x, residual, norm;
  Matrix output;
};

// What the two operators have in common. Element is that of the state: float or int8_t.
template <class Element>
class GrowingAttention : AttentionAttributes {
 public:
  static constexpr bool kInt8State = sizeof(Element) == 1;

  explicit GrowingAttention(Attributes& attributes) : AttentionAttributes(attributes) {
    if (kInt8State && window) attributes.fail("a window of %d keys needs gates in float32", window);
  }

 protected:
  // Reads the inputs that both have: the first five, lengths and total length from `lengths`, and
  // those of the output from `x` on.
  Inputs read(Context& context, size_t lengths, size_t x) const {
    constexpr int kElement = kInt8State ? kInt8 : kFloat;
    Inputs in;
    in.past_key = context.input("past_key", 3, kElement, {kAny, kv_heads, kAny, kAny});
    const int64_t batch = in.past_key.dims[0], rows = in.past_key.dims[2], row = in.past_key.dims[3];
    in.past_value = context.input("past_value", 4, kElement, {batch, kv_heads, rows, row});
    in.q = context.input("q", 0, kFloat, {batch, kAny, heads * row});
    const int64_t length = in.q.dims[1];
    in.k = context.input("k", 1, kFloat, {batch, length, kv_heads * row});
    in.v = context.input("v", 2, kFloat, {batch, length, kv_heads * row});
    in.lengths = context.input("lengths", lengths, kInt32, {batch});
    in.total_length = context.input("total_length", lengths + 1, kInt32, {});
    in.x = context.input("x", x, kFloat, {batch, length, kAny});
    const int64_t hidden = in.x.dims[2];
    in.output = matrix.read(context, "output", x + 1, x + 2, x + 3, heads * row, hidden, false);
    in.residual = context.input("residual", x + 4, kFloat, {hidden});
    in.norm = context.input("norm", x + 5, kFloat, {hidden});
    return in;
  }

  void run(Context& context, const Inputs& in) const {
    if (context.failed()) return;
    const int64_t batch = in.q.dims[0], past = in.past_key.dims[2];
    if (in.q.dims[1] < 1 || in.q.dims[1] > INT32_MAX / 2 || batch * in.q.dims[1] > INT32_MAX / 2) {
      return context.fail("%lld new tokens", static_cast<long long>(in.q.dims[1]));
    }
    const int length = static_cast<int>(in.q.dims[1]), row = static_cast<int>(in.past_key.dims[3]);
    const int64_t total = *in.total_length.as<int32_t>();
    if (row < dim + gates + (window ? 1 : 0)) return context.fail("a row of %d channels is too short", row);
    if (total < length || total > past + length || past > INT32_MAX / 2) {
      return context.fail("the total length is %lld, with %lld rows and %d new tokens", static_cast<long long>(total),
                          static_cast<long long>(past), length);
    }
    const int64_t room = past > total ? past : total;
    int longest = 0;  // number of keys that the last token of the longest sequence sees
    for (int64_t b = 0; b < batch; b++) {
      int64_t last = in.lengths.as<int32_t>()[b];
      if (last + 1 < length || last + 1 - length > past || last >= room) {
        return context.fail("the length %lld is not possible, with %lld rows and %d new tokens",
                            static_cast<long long>(last), static_cast<long long>(past), length);
      }
      if (last + 1 > longest) longest = static_cast<int>(last + 1);
    }
    const int64_t hidden = in.x.dims[2];
    Step step{*this, in, length, row, longest, past, room};
    float* next_h = static_cast<float*>(context.output(0, {batch, length, hidden}));
    float* next_x = static_cast<float*>(context.output(1, {batch, length, hidden}));
    step.keys = static_cast<Element*>(context.output(2, {batch, kv_heads, room, row}));
    step.values = static_cast<Element*>(context.output(3, {batch, kv_heads, room, row}));
    if (context.failed() || batch == 0) return;
    step.run(context, next_h, next_x);
  }

 private:
  // One run of the operator.
  struct Step {
    const GrowingAttention& op;
    const Inputs& in;
    int length, row, longest;
    int64_t past, room;
    Element *keys = nullptr, *values = nullptr;  // the present

    const LayerKernels& kernels = op.kernels->layer;
    const int64_t batch = in.q.dims[0];
    const int group = op.heads / op.kv_heads;
    const float* queries = nullptr;   // [B, S, Hq * row]; for int8, times the scale of the keys
    float* scaled = nullptr;          // where those are written
    int32_t* gates = nullptr;         // [B, Hkv, G, longest], in the order of the gates
    Largest* kept = nullptr;          // [B, S, Hkv, G]; null if all keys stay

    // The rows of a key head in the present, from the row `first` on.
    size_t rows_of(int64_t b, int head, int64_t first) const { return ((b * op.kv_heads + head) * room + first) * row; }
    int keys_of(int64_t b) const { return in.lengths.as<int32_t>()[b] + 1; }
    // Number of keys that a token sees.
    int seen(int64_t b, int token) const { return keys_of(b) - length + token + 1; }

    void run(Context& context, float* next_h, float* next_x) {
      const int count = static_cast<int>(batch * length);
      const int key_heads = static_cast<int>(batch * op.kv_heads);
      const Rows rows{count};
      const Parts parts{row, Parts::of(longest)};
      const size_t width = static_cast<size_t>(op.heads) * row;
      // Several tokens share the work on keys and values. How many there are changes no bits.
      const bool several = length > 1;
      const bool selects = op.window > 0 && longest > op.window;
      const int gate_heads = key_heads * op.gates;
      ResidualProduct product(*op.kernels, in.output, count);
      Scratch scratch;
      auto lay_out = [&](auto give) {
        scaled = give(scaled, kInt8State ? count * width : 0);
        gates = give(gates, selects ? static_cast<size_t>(gate_heads) * longest : 0);
        kept = give(kept, selects ? static_cast<size_t>(gate_heads) * length : 0);
      };
      lay_out([&](auto* none, size_t size) {
        scratch.reserve<std::remove_pointer_t<decltype(none)>>(size);
        return none;
      });
      product.reserve(scratch);
      scratch.reserve<float>(count * width);
      scratch.reserve<float>(several ? 0 : static_cast<size_t>(count) * op.heads * parts.stride());
      if (!scratch.allocate()) return context.fail("no memory");
      lay_out([&](auto* none, size_t size) { return scratch.take<std::remove_pointer_t<decltype(none)>>(size); });
      if (!selects) kept = nullptr;
      product.take(scratch);
      float* attended = scratch.take<float>(count * width);
      float* part = scratch.take<float>(several ? 0 : static_cast<size_t>(count) * op.heads * parts.stride());
      queries = kInt8State ? scaled : in.q.as<float>();

      // With the past in place, there is little to do for few rows.
      const bool in_place = keys == in.past_key.data && values == in.past_value.data;
      const int slices = (length + AttentionBlock::kTokens - 1) / AttentionBlock::kTokens;
      const int extending = in_place && count <= kFewRows ? 1 : key_heads * slices;
      auto extend = [&](int chunk) {
        for (int i = chunk; i < key_heads * slices; i += extending) {
          int head = i / slices;
          extend_head(head / op.kv_heads, head % op.kv_heads, i % slices, slices);
        }
      };
      auto read_gates = [&](int chunk) {
        int head = chunk / parts.count, first = chunk % parts.count * Parts::kKeys;
        read_gates_of(head / op.kv_heads, head % op.kv_heads, first, first + Parts::kKeys);
      };
      auto select = [&](int chunk) {
        rows.each(chunk, [&](int token) {
          for (int head = 0; head < op.kv_heads * op.gates; head++) select_for(token / length, token % length, head);
        });
      };
      auto attend_part = [&](int chunk) {
        int index = chunk % parts.count, head = chunk / parts.count;
        attend_to(head / op.kv_heads, head % op.kv_heads, index, parts, part);
      };
      auto join = [&](int chunk) {
        rows.each(chunk, [&](int token) {
          float* out = attended + token * width;
          const int own = Parts::of(seen(token / length, token % length));
          for (int head = 0; head < op.heads; head++) {
            const float* first = part + (static_cast<size_t>(token) * op.heads + head) * parts.stride();
            kernels.join(first, parts.size(), own, row, out + static_cast<size_t>(head) * row);
            scale_values(head, out + static_cast<size_t>(head) * row);
          }
          product.set_row(token, out);
        });
      };
      // The last tokens see most keys, so they come first.
      std::atomic<bool> failed{false};
      auto attend_block = [&](int chunk) {
        int head = chunk % key_heads, slice = slices - 1 - chunk / key_heads;
        if (!attend_all(head / op.kv_heads, head % op.kv_heads, slice * AttentionBlock::kTokens, attended))
          failed.store(true, std::memory_order_relaxed);
      };
      auto give_rows = [&](int chunk) {
        rows.each(chunk, [&](int token) { product.set_row(token, attended + token * width); });
      };
      Team team;
      team.phase(extending, extend);
      if (selects) {
        team.phase(key_heads * parts.count, read_gates);
        team.phase(rows.chunks(), select);
      }
      if (several) {
        team.phase(key_heads * slices, attend_block);
        team.phase(rows.chunks(), give_rows);
      } else {
        team.phase(key_heads * parts.count, attend_part);
        team.phase(rows.chunks(), join);
      }
      product.add_phases(team, {in.x.as<float>(), in.residual.as<float>(),
                                in.norm.as<float>(), nullptr, next_h, next_x, op.epsilon});
      team.run(context);
      if (failed.load()) context.fail("no memory");
    }

    // Does one of `slices` equal parts of this: writes the new rows of a key head behind the old ones, which are
    // copied if the present is another memory, and scales its queries.
    void extend_head(int64_t b, int head, int slice, int slices) {
      const int64_t before = keys_of(b) - length;
      const int64_t first = before * slice / slices, last = before * (slice + 1) / slices;
      const size_t from = ((b * op.kv_heads + head) * past + first) * row, to = rows_of(b, head, first);
      const size_t bytes = (last - first) * row * sizeof(Element);
      if (keys != in.past_key.data) memcpy(keys + to, in.past_key.as<Element>() + from, bytes);
      if (values != in.past_value.data) memcpy(values + to, in.past_value.as<Element>() + from, bytes);
      const int end = static_cast<int>(static_cast<int64_t>(length) * (slice + 1) / slices);
      for (int s = static_cast<int>(static_cast<int64_t>(length) * slice / slices); s < end; s++) {
        const size_t at = ((b * length + s) * op.kv_heads + head) * row, behind = rows_of(b, head, before + s);
        store(in.k.as<float>() + at, in.key_scale, head, keys + behind);
        store(in.v.as<float>() + at, in.value_scale, head, values + behind);
        if (!kInt8State) continue;
        const float* scale = in.key_scale.as<float>() + static_cast<size_t>(head) * row;
        for (int i = 0; i < group; i++) {
          const size_t query = ((b * length + s) * op.heads + head * group + i) * row;
          kernels.multiply(in.q.as<float>() + query, scale, row, scaled + query);
        }
      }
    }
    void store(const float* x, const Tensor&, int, float* out) const { memcpy(out, x, row * sizeof(float)); }
    void store(const float* x, const Tensor& scale, int head, int8_t* out) const {
      kernels.to_int8(x, scale.as<float>() + static_cast<size_t>(head) * row, row, out);
    }

    void read_gates_of(int64_t b, int head, int first, int last) const {
      if (last > keys_of(b)) last = keys_of(b);
      for (int t = first; t < last; t++) {
        const Element* channels = keys + rows_of(b, head, t) + op.dim;
        for (int i = 0; i < op.gates; i++) {
          gates[((b * op.kv_heads + head) * op.gates + i) * longest + t] =
              ordered(static_cast<float>(channels[i]) + static_cast<float>(channels[op.gates]));
        }
      }
    }

    void select_for(int64_t b, int token, int head) const {
      const int all = op.kv_heads * op.gates;
      kept[(b * length + token) * all + head] =
          select_largest(gates + (b * all + head) * longest, seen(b, token), op.window);
    }

    // Lets all tokens of a sequence attend to one part of the keys of one head.
    void attend_to(int64_t b, int head, int index, const Parts& parts, float* part) const {
      const int first = index * Parts::kKeys;
      const size_t at = rows_of(b, head, first);
      for (int s = 0; s < length; s++) {
        int count = seen(b, s) - first;
        if (count <= 0) continue;
        if (count > Parts::kKeys) count = Parts::kKeys;
        const size_t query = (b * length + s) * op.heads + head * group;
        auto mask = [&](int i, float* scores) { close_lost(b, s, head, i, first, count, scores); };
        attend(kernels, parts, queries + query * row, group, keys + at, values + at, count, mask,
               part + query * parts.stride() + index * parts.size());
      }
    }

    // Closes the keys that are not in the window of a query head: of `count` keys from `first` on.
    void close_lost(int64_t b, int token, int head, int i, int first, int count, float* scores) const {
      if (!kept) return;
      const int gate = i * op.gates / group;
      const Largest& own = kept[((b * length + token) * op.kv_heads + head) * op.gates + gate];
      const int32_t* numbers = gates + ((b * op.kv_heads + head) * op.gates + gate) * longest + first;
      kernels.close_small(scores, numbers, count, own.bound, own.first - first, op.closed);
    }

    // Lets a block of tokens from `token` on attend to all their keys of one head. False if there is no memory.
    bool attend_all(int64_t b, int head, int token, float* attended) const {
      const size_t width = static_cast<size_t>(op.heads) * row;
      const int tokens = length - token < AttentionBlock::kTokens ? length - token : AttentionBlock::kTokens;
      const size_t query = (b * length + token) * width + static_cast<size_t>(head) * group * row;
      AttentionBlock block(*op.kernels, {queries + query, width, tokens, group, row});
      if (!block.ready()) return false;
      const int all = seen(b, token + tokens - 1);
      for (int first = 0; first < all; first += AttentionBlock::kKeys) {
        const size_t at = rows_of(b, head, first);
        block.add(
            keys + at, values + at, row, all - first < AttentionBlock::kKeys ? all - first : AttentionBlock::kKeys,
            [&](int i) { return seen(b, token + i) - first; },
            [&](int i, int s, int count, float* scores) { close_lost(b, token + s, head, i, first, count, scores); });
      }
      for (int s = 0; s < tokens; s++)
        for (int i = 0; i < group; i++) {
          float* out = attended + query + s * width + static_cast<size_t>(i) * row;
          block.finish(i, s, out);
          scale_values(head * group + i, out);
        }
      return true;
    }

    // Of an int8 state, the values that were summed up are codes.
    void scale_values(int head, float* out) const {
      if (!kInt8State) return;
      kernels.multiply(out, in.value_scale.as<float>() + static_cast<size_t>(head / group) * row, row, out);
    }
  };
};

class Attention : GrowingAttention<float> {
 public:
  static constexpr const char* kName = "Attention";
  static constexpr Input kInputs[] = {{kFloat}, {kFloat}, {kFloat}, {kFloat},   {kFloat},
                                      {kInt64}, {kInt32}, {kInt32}, {kFloat},   {kAnyType},
                                      {kFloat, kOptional}, {kFloat, kOptional}, {kFloat}, {kFloat}};
  static constexpr int kOutputs[] = {kFloat, kFloat, kFloat, kFloat};

  explicit Attention(Attributes& attributes) : GrowingAttention(attributes) {}

  void run(Context& context) const {
    Inputs in = read(context, 6, 8);
    // The body needs the columns; here they follow from the lengths.
    context.input("columns", 5, kInt64, {in.q.dims[0], in.q.dims[1]});
    GrowingAttention::run(context, in);
  }
};

class Int8Attention : GrowingAttention<int8_t> {
 public:
  static constexpr const char* kName = "Int8Attention";
  static constexpr Input kInputs[] = {{kFloat}, {kFloat}, {kFloat}, {kInt8},    {kInt8},
                                      {kInt32}, {kInt32}, {kFloat}, {kFloat},   {kFloat},
                                      {kAnyType}, {kFloat, kOptional}, {kFloat, kOptional}, {kFloat}, {kFloat}};
  static constexpr int kOutputs[] = {kFloat, kFloat, kInt8, kInt8};

  explicit Int8Attention(Attributes& attributes) : GrowingAttention(attributes) {}

  void run(Context& context) const {
    Inputs in = read(context, 5, 9);
    const int64_t heads = in.past_key.dims[1], row = in.past_key.dims[3];
    in.key_scale = context.input("key_scale", 7, kFloat, {1, heads, 1, row});
    in.value_scale = context.input("value_scale", 8, kFloat, {1, heads, 1, row});
    GrowingAttention::run(context, in);
  }
};

}  // namespace

const OrtCustomOp* attention_operator() {
  static const Operator<Attention> op;
  return &op;
}

const OrtCustomOp* int8_attention_operator() {
  static const Operator<Int8Attention> op;
  return &op;
}
