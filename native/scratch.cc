#include "scratch.h"

#include <atomic>
#include <cstdlib>

namespace {

constexpr size_t kAlignment = 64;

// A buffer begins with its own size, so that one atomic pointer is enough for a place.
struct Header {
  size_t size;
};
constexpr int kPlaces = 16;
std::atomic<Header*> places[kPlaces];

}  // namespace

Scratch::Scratch() = default;

bool Scratch::allocate() {
  Header* best = nullptr;
  for (auto& place : places) {
    if (!place.load(std::memory_order_relaxed)) continue;
    best = place.exchange(nullptr, std::memory_order_acquire);
    if (best) break;
  }
  if (best && best->size < needed_) {
    free(best);
    best = nullptr;
  }
  if (!best) {
    size_t size = (needed_ + needed_ / 2 + kAlignment - 1) / kAlignment * kAlignment;
    void* memory = malloc(size + 2 * kAlignment);
    if (!memory) return false;
    best = static_cast<Header*>(memory);
    best->size = size;
  }
  auto address = reinterpret_cast<uintptr_t>(best) + sizeof(Header);
  address = (address + kAlignment - 1) / kAlignment * kAlignment;
  buffer_ = reinterpret_cast<char*>(address);
  header_ = best;
  return true;
}

Scratch::~Scratch() {
  Header* header = static_cast<Header*>(header_);
  if (!header) return;
  for (auto& place : places) {
    Header* none = nullptr;
    if (place.compare_exchange_strong(none, header, std::memory_order_release)) return;
  }
  free(header);
}
