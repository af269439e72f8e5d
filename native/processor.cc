#include "processor.h"

#include <cstdlib>
#include <cstring>

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvxVnniKernels, kAvx512VnniKernels;
#elif defined(__aarch64__)
extern const Kernels kNeonKernels, kNeonDotprodKernels, kNeonI8mmKernels;
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#endif

namespace {

struct Candidate {
  const Kernels* kernels;
  bool (*available)();
};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif

// From the best to the least.
const Candidate kCandidates[] = {
#if defined(__x86_64__)
    {&kAvx512VnniKernels,
     [] {
       return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512vnni");
     }},
    {&kAvx2Kernels, has_avx2},
#endif
    {&kScalarKernels, [] { return true; }},
};

}  // namespace

const Kernels& chosen_kernels() {
  const char* wanted = getenv("DOGE_ONNX_INSTRUCTIONS");
  for (const Candidate& candidate : kCandidates) {
    if (wanted && *wanted && strcmp(wanted, candidate.kernels->name)) continue;
    if (candidate.available()) return *candidate.kernels;
  }
  return kScalarKernels;
}
