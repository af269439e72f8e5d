// Which keys of a window have the largest gates, without sorting them.
#pragma once

#include <cstdint>
#include <cstring>

// Numbers in the order of floats. NaN is above all, as for TopK.
inline int32_t ordered(float x) {
  x += 0.0f;  // -0 is 0
  if (x != x) return INT32_MAX;
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits ^ ((bits >> 31) & INT32_MAX);
}

// A set of keys: those with a number above `bound`, and from the index `first` on those equal to it.
struct Largest {
  int32_t bound;
  int32_t first;
};

// The `wanted` largest of `count` numbers, of equal ones the later.
inline Largest select_largest(const int32_t* numbers, int count, int wanted) {
  if (wanted >= count) return {INT32_MIN, 0};
  constexpr int kBits = 11, kBuckets = 1 << kBits;
  uint32_t found = 0, known = 0;  // the bits of the bound found so far, and which those are
  int left = wanted;              // keys to take among those whose bits are the found ones
  for (int shift = 32 - kBits; known != UINT32_MAX; shift = shift > kBits ? shift - kBits : 0) {
    int buckets[kBuckets] = {};
    uint32_t digit = static_cast<uint32_t>(kBuckets - 1) << shift & ~known;
    for (int i = 0; i < count; i++) {
      uint32_t number = static_cast<uint32_t>(numbers[i]) ^ 0x80000000u;
      if ((number & known) == found) buckets[(number & digit) >> shift]++;
    }
    int bucket = kBuckets - 1;
    for (; buckets[bucket] < left; bucket--) left -= buckets[bucket];
    found |= static_cast<uint32_t>(bucket) << shift & digit;
    known |= digit;
  }
  Largest kept{static_cast<int32_t>(found ^ 0x80000000u), count};
  while (left > 0) left -= numbers[--kept.first] == kept.bound;
  return kept;
}

// Writes the `wanted` first of the numbers 0 to count - 1, in order; before(a, b) says whether a
// comes before b, and no two are equal.
template <class Before>
void first_in_order(int* chosen, int wanted, int count, Before before) {
  // A heap, of which the first number comes last in order.
  auto sink = [&](int at, int size) {
    for (;;) {
      int last = 2 * at + 1;
      if (last >= size) return;
      if (last + 1 < size && before(chosen[last], chosen[last + 1])) last++;
      if (!before(chosen[at], chosen[last])) return;
      int moved = chosen[at];
      chosen[at] = chosen[last];
      chosen[last] = moved;
      at = last;
    }
  };
  for (int i = 0; i < wanted; i++) chosen[i] = i;
  for (int i = wanted / 2 - 1; i >= 0; i--) sink(i, wanted);
  for (int i = wanted; i < count; i++) {
    if (!before(i, chosen[0])) continue;
    chosen[0] = i;
    sink(0, wanted);
  }
  for (int size = wanted - 1; size > 0; size--) {
    int last = chosen[0];
    chosen[0] = chosen[size];
    chosen[size] = last;
    sink(0, size);
  }
}
