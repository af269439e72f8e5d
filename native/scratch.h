// Memory for the length of one run of a node.
//
// Buffers are kept for the next run, in a few places that all threads share: a fresh one would cost
// a page fault for every 4 KB.
#pragma once

#include <cstddef>
#include <cstdint>

class Scratch {
 public:
  Scratch();
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // Two passes: first `reserve` for everything that is needed, then `allocate`, then `take` in the
  // same order. The memory is not cleared; it is aligned for any vector, and 64 bytes behind the
  // end of each part may be read.
  template <class T>
  void reserve(size_t count) {
    needed_ += round(count * sizeof(T));
  }
  // False if there is no memory.
  bool allocate();
  template <class T>
  T* take(size_t count) {
    char* at = buffer_ + used_;
    used_ += round(count * sizeof(T));
    return reinterpret_cast<T*>(at);
  }

 private:
  static size_t round(size_t bytes) { return (bytes + 127) / 64 * 64; }
  char* buffer_ = nullptr;
  void* header_ = nullptr;  // the allocation that the buffer is in
  size_t needed_ = 0, used_ = 0;
};
