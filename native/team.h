// The phases of a node, on ONNX Runtime's threads.
//
// All threads go through the phases together. Each claims chunks of a phase until none is left, and
// waits until those of the others are done. A thread that starts late, or never, keeps nobody
// waiting: no barrier counts threads. A phase of one chunk is done by the thread that ends the
// phase before it, so that nobody has to be woken for it.
#pragma once

#include <atomic>

#include "context.h"

#if defined(_WIN32)
extern "C" __declspec(dllimport) int __stdcall SwitchToThread();
inline void yield_thread() { SwitchToThread(); }
#else
#include <time.h>
inline void yield_thread() {
  // Not sched_yield: a processor that sleeps takes over the threads that wait for another one.
  const timespec moment = {0, 20000};
  nanosleep(&moment, nullptr);
}
#endif

#if defined(__x86_64__) || defined(_M_X64)
inline void pause_thread() { __builtin_ia32_pause(); }
#elif defined(__aarch64__)
inline void pause_thread() { asm volatile("yield"); }
#else
inline void pause_thread() {}
#endif

class Team {
 public:
  static constexpr int kMaxPhases = 16;

  // Adds a phase: function(chunk) for each chunk from 0 to chunks - 1, in any order. The function
  // object must live until `run` ends.
  template <class Function>
  void phase(int chunks, Function& function) {
    Phase& added = phases_[count_++];
    added.chunks = chunks;
    added.data = &function;
    added.call = [](void* data, int chunk) { (*static_cast<Function*>(data))(chunk); };
  }

  // Runs all phases.
  void run(Context& context) {
    int widest = 1;
    for (int i = 0; i < count_; i++) widest = phases_[i].chunks > widest ? phases_[i].chunks : widest;
    auto work = [this](size_t) { take_part(); };
    if (widest == 1) work(0);
    // More seats than threads: a seat that finds no work costs some nanoseconds.
    else context.parallel(widest < kSeats ? widest : kSeats, work);
  }

 private:
  static constexpr int kSeats = 64;
  static constexpr int kTurns = 1000;  // pauses before a thread lets others run; some tens of microseconds
  struct Phase {
    void (*call)(void*, int);
    void* data;
    int chunks;
    alignas(64) std::atomic<int> next{0};
    alignas(64) std::atomic<int> done{0};
    std::atomic<bool> over{false};
  };

  void take_part() {
    for (int i = 0; i < count_; i++) {
      Phase& phase = phases_[i];
      if (phase.chunks == 0) {
        // Nobody would end it.
        phase.over.store(true, std::memory_order_release);
        continue;
      }
      for (int chunk; (chunk = phase.next.fetch_add(1, std::memory_order_relaxed)) < phase.chunks;) {
        phase.call(phase.data, chunk);
        if (phase.done.fetch_add(1, std::memory_order_acq_rel) == phase.chunks - 1) end(i);
      }
      // On a busy machine, whoever is waited for may be waiting for this processor.
      for (int turns = 0; !phase.over.load(std::memory_order_acquire); turns++) {
        if (turns < kTurns) pause_thread();
        else yield_thread();
      }
    }
  }

  // Ends a phase, and runs the phases of one chunk that follow it before anybody is let on.
  void end(int index) {
    int next = index + 1;
    for (; next < count_ && phases_[next].chunks == 1; next++) {
      phases_[next].next.store(1, std::memory_order_relaxed);
      phases_[next].call(phases_[next].data, 0);
      phases_[next].over.store(true, std::memory_order_release);
    }
    phases_[index].over.store(true, std::memory_order_release);
  }

  Phase phases_[kMaxPhases];
  int count_ = 0;
};
