// WindowAttention: decide which keys keep a row of a window state, attend, and end the first half of a
// layer. See doge_onnx/export/window_attention.py.
#include <atomic>

#include "attention_attributes.h"
#include "attention_blocks.h"
#include "attention_parts.h"
#include "operators.h"
#include "residual_product.h"
#include "selection.h"

namespace {

struct Inputs {
  Tensor q, k, v, past_key, past_value, positions, x, residual, norm;
  Matrix output;
  double lift;
};

// One run of the operator.
class Step {
 public:
  Step(const AttentionAttributes& op, const Inputs& in, float* keys, float* values)
      : op_(op), in_(in), kernels_(op.kernels->layer), length_(static_cast<int>(in.q.dims[1])),
        rows_(static_cast<int>(in.past_key.dims[2])), row_(static_cast<int>(in.past_key.dims[3])),
        group_(op.heads / op.kv_heads), width_(static_cast<size_t>(op.heads) * row_), keys_(keys), values_(values) {}

  void run(Context& context, float* next_h, float* next_x) {
    const int64_t batch = in_.q.dims[0];
    const int count = static_cast<int>(batch * length_), key_heads = static_cast<int>(batch * op_.kv_heads);
    const int row_parts = Parts::of(rows_);
    // One new token attends to each part of the rows while that is ranked, but for its row of the lowest rank. Those
    // rows and the new key follow when it is known which of them goes.
    const bool single = length_ == 1;
    const int others = single ? row_parts + 1 : length_;
    // Those of the rows, then those of the keys that follow.
    const Parts parts{row_, row_parts + Parts::of(others)};
    const Rows rows{count};
    const bool prompt = length_ > kFewRows && closes();
    const size_t state = static_cast<size_t>(key_heads) * rows_, fresh = static_cast<size_t>(key_heads) * length_;
    ResidualProduct product(*op_.kernels, in_.output, count);
    float *attended = nullptr, *part = nullptr;
    Scratch scratch;
    auto lay_out = [&](auto give) {
      give(ranks_, state);
      give(stamps_, state);
      give(lowest_, static_cast<size_t>(key_heads) * row_parts);
      give(slots_, fresh);
      give(order_, fresh);
      give(lost_key_, fresh * row_);
      give(lost_value_, fresh * row_);
      give(lost_stamps_, fresh);
      give(lost_ranks_, fresh);
      give(new_ranks_, fresh);
      give(keeps_, fresh * length_);
      give(by_rank_, fresh);
      give(open_, static_cast<size_t>(key_heads));
      give(lost_of_, fresh);
      give(other_key_, single ? static_cast<size_t>(key_heads) * others * row_ : 0);
      give(other_value_, single ? static_cast<size_t>(key_heads) * others * row_ : 0);
      give(listed_, prompt ? static_cast<size_t>(key_heads) : 0);
      give(list_, prompt ? state : 0);
      give(list_stamps_, prompt ? state : 0);
      give(attended, count * width_);
      give(part, prompt ? 0 : static_cast<size_t>(count) * op_.heads * parts.stride());
    };
    lay_out([&](auto*& place, size_t size) { scratch.reserve<std::remove_reference_t<decltype(*place)>>(size); });
    product.reserve(scratch);
    if (!scratch.allocate()) return context.fail("no memory");
    lay_out([&](auto*& place, size_t size) { place = scratch.take<std::remove_reference_t<decltype(*place)>>(size); });
    product.take(scratch);

    std::atomic<bool> failed{false};
    auto rank = [&](int chunk) {
      const int head = chunk / row_parts, index = chunk % row_parts;
      copy_rows(head, index);
      if (single) attend_to_rows(head, 0, index, true, parts, part_of(part, head, 0, parts));
      else rank_rows(head, index);
    };
    // Little work is not worth waking others for.
    const int replacing = key_heads <= 4 && count <= kFewRows ? 1 : key_heads;
    auto replace = [&](int chunk) {
      for (int head = chunk; head < key_heads; head += replacing) {
        choose(head, row_parts);
        if (single) gather_others(head, row_parts);
        overwrite(head);
        sort_lost(head);
        if (prompt) make_list(head);
        else for (int token = 0; token < length_; token++) keep_lost(head, token, length_);
        if (single) attend_to_others(head, row_parts, parts, part_of(part, head, 0, parts));
      }
    };
    auto attend_part = [&](int chunk) {
      const int head = chunk / parts.count, index = chunk % parts.count;
      for (int s = 0; s < length_; s++) attend_to(head, s, index, parts, part_of(part, head, s, parts));
    };
    auto join = [&](int chunk) {
      rows.each(chunk, [&](int token) {
        float* out = attended + token * width_;
        for (int head = 0; head < op_.heads; head++) {
          kernels_.join(part + (static_cast<size_t>(token) * op_.heads + head) * parts.stride(), parts.size(),
                        parts.count, row_, out + static_cast<size_t>(head) * row_);
        }
        product.set_row(token, out);
      });
    };
    const int slices = (length_ + AttentionBlock::kTokens - 1) / AttentionBlock::kTokens;
    auto attend_block = [&](int chunk) {
      int head = chunk % key_heads, slice = slices - 1 - chunk / key_heads;
      if (!attend_all(head, slice * AttentionBlock::kTokens, parts, attended))
        failed.store(true, std::memory_order_relaxed);
    };
    auto give_rows = [&](int chunk) {
      rows.each(chunk, [&](int token) { product.set_row(token, attended + token * width_); });
    };
    Team team;
    team.phase(key_heads * row_parts, rank);
    team.phase(replacing, replace);
    if (prompt) {
      team.phase(key_heads * slices, attend_block);
      team.phase(rows.chunks(), give_rows);
    } else {
      if (!single) team.phase(key_heads * parts.count, attend_part);
      team.phase(rows.chunks(), join);
    }
    product.add_phases(team, {in_.x.as<float>(), in_.residual.as<float>(), in_.norm.as<float>(), nullptr, next_h,
                              next_x, op_.epsilon});
    team.run(context);
    if (failed.load()) context.fail("no memory");
  }

 private:
  // In all that follows, `head` counts the key heads of all sequences.

  // Whether a closed key weighs nothing beside any other, as queries have a one for the gate.
  bool closes() const { return op_.closed < -1e20f; }
  size_t at(int head, int index) const { return (static_cast<size_t>(head) * rows_ + index) * row_; }
  // A new key or value, and the query heads of a token that read a key head.
  size_t new_at(int head, int token) const {
    const size_t b = head / op_.kv_heads;
    return ((b * length_ + token) * op_.kv_heads + head % op_.kv_heads) * row_;
  }
  size_t query_at(int head, int token) const {
    const size_t b = head / op_.kv_heads;
    return ((b * length_ + token) * op_.heads + static_cast<size_t>(head % op_.kv_heads) * group_) * row_;
  }
  float* part_of(float* part, int head, int token, const Parts& parts) const {
    return part + query_at(head, token) / row_ * parts.stride();
  }
  float now(int head, int token) const {
    return static_cast<float>(in_.positions.as<int64_t>()[head / op_.kv_heads * length_ + token] + 1);
  }

  // Of a gate, which the position follows.
  double rank_of(const float* gate) const {
    double rank = gate[0] * in_.lift + 32.0;
    return rank + __builtin_fabs(rank) * (gate[1] * 0x1p-52);
  }
  // NaN is above all, as for TopK.
  static double ordered(double rank) { return rank == rank ? rank : HUGE_VAL; }

  // Copies a part of the rows if the present is another memory than the past.
  void copy_rows(int head, int index) const {
    const int first = index * Parts::kKeys, last = first + Parts::kKeys < rows_ ? first + Parts::kKeys : rows_;
    const size_t from = at(head, first), bytes = static_cast<size_t>(last - first) * row_ * sizeof(float);
    if (keys_ != in_.past_key.data) memcpy(keys_ + from, in_.past_key.as<float>() + from, bytes);
    if (values_ != in_.past_value.data) memcpy(values_ + from, in_.past_value.as<float>() + from, bytes);
  }

  // Ranks a part of the rows, and finds the lowest.
  void rank_rows(int head, int index) const {
    const int first = index * Parts::kKeys, last = first + Parts::kKeys < rows_ ? first + Parts::kKeys : rows_;
    double* ranks = ranks_ + static_cast<size_t>(head) * rows_;
    float* stamps = stamps_ + static_cast<size_t>(head) * rows_;
    const float* gate = keys_ + at(head, first) + op_.dim;
    int lowest = first;
    double least = HUGE_VAL;
    for (int r = first; r < last; r++, gate += row_) {
      ranks[r] = rank_of(gate);
      stamps[r] = gate[1];
      if (!(ranks[r] < least)) continue;
      least = ranks[r];
      lowest = r;
    }
    lowest_[static_cast<size_t>(head) * Parts::of(rows_) + index] = lowest;
  }

  // Chooses the rows of the lowest rank, and puts the new keys in order, the highest rank first.
  void choose(int head, int row_parts) {
    const double* ranks = ranks_ + static_cast<size_t>(head) * rows_;
    double* fresh = new_ranks_ + static_cast<size_t>(head) * length_;
    int* slots = slots_ + static_cast<size_t>(head) * length_;
    for (int s = 0; s < length_; s++) fresh[s] = rank_of(in_.k.as<float>() + new_at(head, s) + op_.dim);
    auto lower = [&](int a, int b) {
      const double x = ordered(ranks[a]), y = ordered(ranks[b]);
      return x < y || (x == y && a < b);
    };
    auto higher = [&](int a, int b) {
      const double x = ordered(fresh[a]), y = ordered(fresh[b]);
      return x > y || (x == y && a < b);
    };
    first_in_order(order_ + static_cast<size_t>(head) * length_, length_, length_, higher);
    if (length_ > 1) return first_in_order(slots, length_, rows_, lower);
    const int* lowest = lowest_ + static_cast<size_t>(head) * row_parts;
    slots[0] = lowest[0];
    for (int i = 1; i < row_parts; i++)
      if (lower(lowest[i], slots[0])) slots[0] = lowest[i];
  }

  // Pairs each new key with a row. The larger gets it; the other is kept for this step.
  void overwrite(int head) {
    const size_t first = static_cast<size_t>(head) * length_, bytes = row_ * sizeof(float);
    for (int i = 0; i < length_; i++) {
      const int slot = slots_[first + i], token = order_[first + i];
      const double old_rank = ranks_[static_cast<size_t>(head) * rows_ + slot], new_rank = new_ranks_[first + token];
      float *key = keys_ + at(head, slot), *value = values_ + at(head, slot);
      float *lost_key = lost_key_ + (first + i) * row_, *lost_value = lost_value_ + (first + i) * row_;
      const float *new_key = in_.k.as<float>() + new_at(head, token), *new_value = in_.v.as<float>() + new_at(head, token);
      const bool enters = new_rank > old_rank;
      memcpy(lost_key, enters ? key : new_key, bytes);
      memcpy(lost_value, enters ? value : new_value, bytes);
      lost_ranks_[first + i] = enters ? old_rank : new_rank;
      lost_stamps_[first + i] = lost_key[op_.dim + 1];
      if (!enters) {
        // The row is not overwritten.
        slots_[first + i] = -1;
        continue;
      }
      memcpy(key, new_key, bytes);
      memcpy(value, new_value, bytes);
      stamps_[static_cast<size_t>(head) * rows_ + slot] = key[op_.dim + 1];
      ranks_[static_cast<size_t>(head) * rows_ + slot] = kTaken;
    }
  }

  // Puts the keys without a row in order, the highest rank first, and counts those that are not closed.
  void sort_lost(int head) {
    const size_t fresh = static_cast<size_t>(head) * length_;
    const double* ranks = lost_ranks_ + fresh;
    first_in_order(by_rank_ + fresh, length_, length_, [&](int a, int b) {
      const double x = ordered(ranks[a]), y = ordered(ranks[b]);
      return x > y || (x == y && a < b);
    });
    int& open = open_[head] = 0;
    while (open < length_ && is_open(lost_key_ + (fresh + by_rank_[fresh + open]) * row_)) open++;
  }

  // Which keys without a row are among those of the window for a token: keeps_[head, token, key], for the first
  // `count` of them in order.
  void keep_lost(int head, int token, int count) const {
    const size_t fresh = static_cast<size_t>(head) * length_;
    const float *stamps = stamps_ + static_cast<size_t>(head) * rows_, *lost = lost_stamps_ + fresh;
    const double* ranks = lost_ranks_ + fresh;
    const int* by_rank = by_rank_ + fresh;
    const float time = now(head, token);
    uint8_t* keeps = keeps_ + (fresh + token) * length_;
    if (count == 0) return;
    int before = 0;  // visible keys of a higher rank
    for (int r = 0; r < rows_; r++) before += stamps[r] <= time;
    for (int i = 0; i < count;) {
      const double rank = ranks[by_rank[i]];
      const int higher = before;
      do {
        const bool sees = lost[by_rank[i]] <= time;
        keeps[by_rank[i++]] = sees && higher < op_.window;
        before += sees;
      } while (i < count && ranks[by_rank[i]] == rank);
    }
  }
  // NaN is open.
  bool is_open(const float* key) const { return !(key[op_.dim] <= op_.closed / 2); }

  // Attention of one token to one part of the rows of a head. If `ranks`, the rows are ranked, too, when they are
  // in the cache, and the lowest weighs nothing.
  void attend_to_rows(int head, int token, int index, bool ranks, const Parts& parts, float* part) const {
    const int first = index * Parts::kKeys, count = rows_ - first < Parts::kKeys ? rows_ - first : Parts::kKeys;
    const float* stamps = stamps_ + static_cast<size_t>(head) * rows_ + first;
    const float time = now(head, token);
    auto mask = [&](int i, float* scores) {
      if (ranks && i == 0) rank_rows(head, index);
      kernels_.close_later(scores, stamps, count, time, op_.closed);
      if (ranks) scores[lowest_[static_cast<size_t>(head) * Parts::of(rows_) + index] - first] = -INFINITY;
    };
    attend(kernels_, parts, in_.q.as<float>() + query_at(head, token), group_, keys_ + at(head, first),
           values_ + at(head, first), count, mask, part + index * parts.size());
  }

  // The same for a part of the rows, or behind those, of the keys without a row.
  void attend_to(int head, int token, int index, const Parts& parts, float* part) const {
    const int row_parts = Parts::of(rows_);
    if (index < row_parts) return attend_to_rows(head, token, index, false, parts, part);
    const int first = (index - row_parts) * Parts::kKeys;
    const int count = length_ - first < Parts::kKeys ? length_ - first : Parts::kKeys;
    const size_t fresh = static_cast<size_t>(head) * length_;
    const uint8_t* keeps = keeps_ + (fresh + token) * length_ + first;
    auto mask = [&](int, float* scores) {
      for (int t = 0; t < count; t++) scores[t] = keeps[t] ? scores[t] : op_.closed;
    };
    attend(kernels_, parts, in_.q.as<float>() + query_at(head, token), group_, lost_key_ + (fresh + first) * row_,
           lost_value_ + (fresh + first) * row_, count, mask, part + index * parts.size());
  }

  // For one new token: copies the row of the lowest rank of each part, and the new key.
  void gather_others(int head, int row_parts) const {
    const size_t bytes = row_ * sizeof(float);
    for (int i = 0; i <= row_parts; i++) {
      const size_t to = (static_cast<size_t>(head) * (row_parts + 1) + i) * row_;
      const int row = i < row_parts ? lowest_[static_cast<size_t>(head) * row_parts + i] : 0;
      memcpy(other_key_ + to, i < row_parts ? keys_ + at(head, row) : in_.k.as<float>() + new_at(head, 0), bytes);
      memcpy(other_value_ + to, i < row_parts ? values_ + at(head, row) : in_.v.as<float>() + new_at(head, 0), bytes);
    }
  }
  // Lets the token attend to these, of which one has no row.
  void attend_to_others(int head, int row_parts, const Parts& parts, float* part) const {
    const int slot = slots_[head], *lowest = lowest_ + static_cast<size_t>(head) * row_parts;
    const float time = now(head, 0);
    for (int first = 0; first <= row_parts; first += Parts::kKeys) {
      const int count = row_parts + 1 - first < Parts::kKeys ? row_parts + 1 - first : Parts::kKeys;
      const size_t from = (static_cast<size_t>(head) * (row_parts + 1) + first) * row_;
      const float* keys = other_key_ + from;
      auto mask = [&](int, float* scores) {
        for (int t = 0; t < count; t++) {
          const int row = first + t < row_parts ? lowest[first + t] : -1;
          const bool sees = row == slot ? keeps_[head] : keys[static_cast<size_t>(t) * row_ + op_.dim + 1] <= time;
          scores[t] = sees ? scores[t] : op_.closed;
        }
      };
      attend(kernels_, parts, in_.q.as<float>() + query_at(head, 0), group_, keys, other_value_ + from, count, mask,
             part + (row_parts + first / Parts::kKeys) * parts.size());
    }
  }

  // Lists the keys of the past that are not closed: the numbers of rows, and -1 - i for the key i without a row.
  void make_list(int head) {
    const size_t fresh = static_cast<size_t>(head) * length_, state = static_cast<size_t>(head) * rows_;
    int count = 0;
    auto add = [&](const float* key, int number) {
      if (!is_open(key)) return;
      list_[state + count] = number;
      list_stamps_[state + count++] = key[op_.dim + 1];
    };
    for (int r = 0; r < rows_; r++)
      if (ranks_[state + r] != kTaken) add(keys_ + at(head, r), r);
    for (int i = 0; i < length_; i++) {
      const float* lost = lost_key_ + (fresh + i) * row_;
      const bool enters = slots_[fresh + i] >= 0;
      lost_of_[fresh + order_[fresh + i]] = enters || !is_open(lost) ? -1 : i;
      if (enters) add(lost, -1 - i);
    }
    listed_[head] = count;
  }

  // Lets a block of tokens from `token` on attend to the keys of one head: first those of the past, then those
  // of this step. False if there is no memory.
  bool attend_all(int head, int token, const Parts& parts, float* attended) const {
    constexpr int kKeys = AttentionBlock::kKeys;
    const int tokens = length_ - token < AttentionBlock::kTokens ? length_ - token : AttentionBlock::kTokens;
    const size_t fresh = static_cast<size_t>(head) * length_, state = static_cast<size_t>(head) * rows_;
    const size_t query = query_at(head, token), wide = static_cast<size_t>(kKeys) * row_;
    AttentionBlock block(*op_.kernels, {in_.q.as<float>() + query, width_, tokens, group_, row_});
    Scratch scratch;
    scratch.reserve<float>(wide);
    scratch.reserve<float>(wide);
    scratch.reserve<float>(parts.stride() * group_);
    if (!block.ready() || !scratch.allocate()) return false;
    for (int i = 0; i < tokens; i++) keep_lost(head, token + i, open_[head]);
    float *keys = scratch.take<float>(wide), *values = scratch.take<float>(wide);
    float* exact = scratch.take<float>(parts.stride() * group_);

    for (int first = 0; first < listed_[head]; first += kKeys) {
      const int count = listed_[head] - first < kKeys ? listed_[head] - first : kKeys;
      const int* list = list_ + state + first;
      for (int t = 0; t < count; t++) {
        const bool lost = list[t] < 0;
        const size_t from = lost ? (fresh - 1 - list[t]) * row_ : at(head, list[t]);
        memcpy(keys + static_cast<size_t>(t) * row_, (lost ? lost_key_ : keys_) + from, row_ * sizeof(float));
        memcpy(values + static_cast<size_t>(t) * row_, (lost ? lost_value_ : values_) + from, row_ * sizeof(float));
      }
      // Those without a row are the last of the list.
      int first_lost = count;
      while (first_lost > 0 && list[first_lost - 1] < 0) first_lost--;
      block.add(
          keys, values, row_, count, [&](int) { return count; },
          [&](int, int s, int, float* scores) {
            kernels_.close_later(scores, list_stamps_ + state + first, count, now(head, token + s), op_.closed);
            const uint8_t* keeps = keeps_ + (fresh + token + s) * length_;
            for (int t = first_lost; t < count; t++)
              if (!keeps[-1 - list[t]]) scores[t] = op_.closed;
          });
    }
    for (int first = 0; first < length_; first += kKeys) {
      const int count = length_ - first < kKeys ? length_ - first : kKeys;
      float stamps[kKeys];
      for (int t = 0; t < count; t++) stamps[t] = in_.k.as<float>()[new_at(head, first + t) + op_.dim + 1];
      // Behind its own key, a token usually sees none.
      int seen[AttentionBlock::kTokens], most = 0;
      for (int s = 0; s < tokens; s++) {
        seen[s] = count;
        while (seen[s] > 0 && !(stamps[seen[s] - 1] <= now(head, token + s))) seen[s]--;
        if (seen[s] > most) most = seen[s];
      }
      if (most == 0) continue;
      block.add(
          in_.k.as<float>() + new_at(head, first), in_.v.as<float>() + new_at(head, first),
          static_cast<size_t>(op_.kv_heads) * row_, most, [&](int s) { return seen[s]; },
          [&](int, int s, int visible, float* scores) {
            kernels_.close_later(scores, stamps, visible, now(head, token + s), op_.closed);
            const uint8_t* keeps = keeps_ + (fresh + token + s) * length_;
            for (int t = 0; t < visible; t++) {
              const int lost = lost_of_[fresh + first + t];
              if (lost >= 0 && !keeps[lost]) scores[t] = op_.closed;
            }
          });
    }
    for (int s = 0; s < tokens; s++) {
      for (int i = 0; i < group_; i++) {
        float* out = attended + query + s * width_ + static_cast<size_t>(i) * row_;
        if (block.largest(i, s) > op_.closed / 4) {
          block.finish(i, s, out);
          continue;
        }
        // The token sees closed keys only. They all weigh the same, those that were left out above, too.
        keep_lost(head, token + s, length_);
        for (int index = 0; index < parts.count; index++) attend_to(head, token + s, index, parts, exact);
        kernels_.join(exact + i * parts.stride(), parts.size(), parts.count, row_, out);
      }
    }
    return true;
  }

  const AttentionAttributes& op_;
  const Inputs& in_;
  const LayerKernels& kernels_;
  const int length_, rows_, row_, group_;
  const size_t width_;
  float *keys_, *values_;  // the present

  // In place of the rank of a row that a new key has taken.
  static constexpr double kTaken = -HUGE_VAL;
  double* ranks_;  // of the rows [heads, R], and what follows
  float* stamps_;  // one more than the position of each key
  int* lowest_;    // row of the lowest rank in each part
  // [heads, S]: the new keys in order, the row that each has taken, or -1, and the key that has no row.
  int *order_, *slots_;
  float *lost_key_, *lost_value_, *lost_stamps_;
  double *lost_ranks_, *new_ranks_;
  int *by_rank_;    // the keys without a row in order
  int *open_;       // [heads]: how many of these are not closed
  int *lost_of_;    // of each new key that is open and has no row, its number among those; else -1
  uint8_t* keeps_;  // [heads, S, S]
  float *other_key_, *other_value_;  // for one new token: see gather_others
  // For many new tokens: the keys of the past that are not closed.
  int *listed_, *list_;
  float* list_stamps_;
};

class WindowAttention {
 public:
  static constexpr const char* kName = "WindowAttention";
  static constexpr Input kInputs[] = {{kFloat}, {kFloat}, {kFloat}, {kFloat},   {kFloat},
                                      {kInt64}, {kDouble}, {kFloat}, {kAnyType}, {kFloat, kOptional},
                                      {kFloat, kOptional}, {kFloat}, {kFloat}};
  static constexpr int kOutputs[] = {kFloat, kFloat, kFloat, kFloat};

  explicit WindowAttention(Attributes& attributes) : op_(attributes) {
    if (!attributes.status() && (op_.gates != 1 || op_.window < 1)) {
      attributes.fail("a window state with %d gates and a window of %d keys", op_.gates, op_.window);
    }
  }

  void run(Context& context) const {
    Inputs in;
    in.past_key = context.input("past_key", 3, kFloat, {kAny, op_.kv_heads, kAny, kAny});
    const int64_t batch = in.past_key.dims[0], rows = in.past_key.dims[2], row = in.past_key.dims[3];
    in.past_value = context.input("past_value", 4, kFloat, {batch, op_.kv_heads, rows, row});
    in.q = context.input("q", 0, kFloat, {batch, kAny, op_.heads * row});
    const int64_t length = in.q.dims[1];
    in.k = context.input("k", 1, kFloat, {batch, length, op_.kv_heads * row});
    in.v = context.input("v", 2, kFloat, {batch, length, op_.kv_heads * row});
    in.positions = context.input("positions", 5, kInt64, {batch, length});
    Tensor lift = context.input("lift", 6, kDouble, {});
    in.x = context.input("x", 7, kFloat, {batch, length, kAny});
    const int64_t hidden = in.x.dims[2];
    in.output = op_.matrix.read(context, "output", 8, 9, 10, op_.heads * row, hidden, false);
    in.residual = context.input("residual", 11, kFloat, {hidden});
    in.norm = context.input("norm", 12, kFloat, {hidden});
    if (context.failed()) return;
    if (row < op_.dim + 2) return context.fail("a row of %lld channels is too short", static_cast<long long>(row));
    if (length < 1 || length > rows || rows > INT32_MAX / 2 || batch * length > INT32_MAX / 2) {
      return context.fail("%lld rows for %lld new tokens", static_cast<long long>(rows),
                          static_cast<long long>(length));
    }
    in.lift = *lift.as<double>();
    float* next_h = static_cast<float*>(context.output(0, {batch, length, hidden}));
    float* next_x = static_cast<float*>(context.output(1, {batch, length, hidden}));
    float* keys = static_cast<float*>(context.output(2, {batch, op_.kv_heads, rows, row}));
    float* values = static_cast<float*>(context.output(3, {batch, op_.kv_heads, rows, row}));
    if (context.failed() || batch == 0) return;
    Step(op_, in, keys, values).run(context, next_h, next_x);
  }

 private:
  AttentionAttributes op_;
};

}  // namespace

const OrtCustomOp* window_attention_operator() {
  static const Operator<WindowAttention> op;
  return &op;
}
