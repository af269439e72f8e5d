// The build says which instruction sets its compiler does not know, DOGE_ONNX_NO_NAME: their kernels
// are not in the library.
#include "processor.h"

#include <cstdlib>
#include <cstring>

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
#include <cpuid.h>
extern const Kernels kAvx2Kernels, kAvxVnniKernels, kAvx512VnniKernels;
#elif defined(__aarch64__)
extern const Kernels kNeonKernels, kNeonDotprodKernels, kNeonI8mmKernels;
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(_WIN32)
extern "C" __declspec(dllimport) int __stdcall IsProcessorFeaturePresent(unsigned long feature);
#endif
#endif

namespace {

struct Candidate {
  const Kernels* kernels;
  bool (*available)();
};

#if defined(__x86_64__)

// The registers that `cpuid` gives; zeros for a leaf that the processor does not have.
struct Leaf {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  Leaf(unsigned leaf, unsigned subleaf) { __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx); }
};

bool bit(unsigned word, int position) { return word >> position & 1; }

// Whether the operating system keeps these parts of the registers when it changes threads.
bool keeps(unsigned parts) {
  if (!bit(Leaf(1, 0).ecx, 27)) return false;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & parts) == parts;
}

[[maybe_unused]] bool has_avx2() {
  const Leaf first(1, 0);
  // FMA, AVX, F16C; AVX2.
  return bit(first.ecx, 12) && bit(first.ecx, 28) && bit(first.ecx, 29) && bit(Leaf(7, 0).ebx, 5) && keeps(0x06);
}

[[maybe_unused]] bool has_avx_vnni() { return has_avx2() && Leaf(7, 0).eax >= 1 && bit(Leaf(7, 1).eax, 4); }

[[maybe_unused]] bool has_avx512_vnni() {
  const Leaf seventh(7, 0);
  // F, DQ, BW, VL; VNNI.
  return has_avx2() && bit(seventh.ebx, 16) && bit(seventh.ebx, 17) && bit(seventh.ebx, 30) &&
         bit(seventh.ebx, 31) && bit(seventh.ecx, 11) && keeps(0xe6);
}

#elif defined(__aarch64__)

#if defined(__linux__)
[[maybe_unused]] bool has_dotprod() { return getauxval(AT_HWCAP) >> 20 & 1; }
[[maybe_unused]] bool has_i8mm() { return has_dotprod() && (getauxval(AT_HWCAP2) >> 13 & 1); }
#elif defined(__APPLE__)
bool has(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value;
}
[[maybe_unused]] bool has_dotprod() { return has("hw.optional.arm.FEAT_DotProd"); }
[[maybe_unused]] bool has_i8mm() { return has_dotprod() && has("hw.optional.arm.FEAT_I8MM"); }
#elif defined(_WIN32)
[[maybe_unused]] bool has_dotprod() { return IsProcessorFeaturePresent(43); }
[[maybe_unused]] bool has_i8mm() { return has_dotprod() && IsProcessorFeaturePresent(66); }
#else
[[maybe_unused]] bool has_dotprod() { return false; }
[[maybe_unused]] bool has_i8mm() { return false; }
#endif

#endif

// From the best to the least.
const Candidate kCandidates[] = {
#if defined(__x86_64__)
#if !defined(DOGE_ONNX_NO_AVX512_VNNI)
    {&kAvx512VnniKernels, has_avx512_vnni},
#endif
#if !defined(DOGE_ONNX_NO_AVX_VNNI)
    {&kAvxVnniKernels, has_avx_vnni},
#endif
#if !defined(DOGE_ONNX_NO_AVX2)
    {&kAvx2Kernels, has_avx2},
#endif
#elif defined(__aarch64__)
#if !defined(DOGE_ONNX_NO_NEON_I8MM)
    {&kNeonI8mmKernels, has_i8mm},
#endif
#if !defined(DOGE_ONNX_NO_NEON_DOTPROD)
    {&kNeonDotprodKernels, has_dotprod},
#endif
    {&kNeonKernels, [] { return true; }},
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
