// Runs phases of native/team.h on threads that ThreadSanitizer watches, in place of those of ONNX
// Runtime. Prints the sum of what the last phase read; the test knows what it has to be.
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "team.h"

namespace {

constexpr int kThreads = 4, kCells = 24, kRuns = 300;

// KernelContext_ParallelFor: `total` calls, shared by a few threads.
OrtStatus* parallel_for(const OrtKernelContext*, void (*call)(void*, size_t), size_t total, size_t, void* data) {
  std::atomic<size_t> next{0};
  std::atomic<int> ready{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; i++)
    threads.emplace_back([&] {
      // Relaxed, so that this orders nothing itself.
      ready.fetch_add(1, std::memory_order_relaxed);
      while (ready.load(std::memory_order_relaxed) < kThreads) std::this_thread::yield();
      for (size_t index; (index = next.fetch_add(1, std::memory_order_relaxed)) < total;) call(data, index);
    });
  for (auto& thread : threads) thread.join();
  return nullptr;
}

}  // namespace

int main() {
  OrtApi api{};
  api.functions[274] = reinterpret_cast<void*>(parallel_for);
  long long total = 0;
  for (int run = 0; run < kRuns; run++) {
    // Not atomic: only the end of a phase orders these writes and reads.
    long long first[kCells] = {}, sum = 0, second[kCells] = {};
    auto write = [&](int cell) {
      // Gives way, so that all threads have a part in each phase.
      std::this_thread::yield();
      first[cell] = cell + run;
    };
    auto add = [&](int) {
      for (long long each : first) sum += each;
    };
    auto read = [&](int cell) {
      std::this_thread::yield();
      second[cell] = sum + first[kCells - 1 - cell];
    };
    Context context(&api, nullptr, "Check");
    Team team;
    team.phase(kCells, write);
    team.phase(1, add);
    team.phase(0, write);
    team.phase(kCells, read);
    team.run(context);
    if (context.failed()) return 1;
    for (long long each : second) total += each;
  }
  printf("%lld\n", total);
  return 0;
}
