// Vectors of the width of one instruction set, by the compiler's own vector types.
//
// Included by `isa_*.cc` only, which define KERNEL_SET, the namespace of all that is compiled for
// this set, and KERNEL_WIDTH, the floats of a vector. Two instruction sets must share no function:
// the linker would keep one of both, and it might be the one that this processor cannot run. So
// nothing here or in the .inl files calls a function template or inline function of the standard
// library.
#pragma once

#include <cstddef>
#include <cstdint>

namespace KERNEL_SET {

constexpr int W = KERNEL_WIDTH;
typedef float Floats __attribute__((vector_size(4 * KERNEL_WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * KERNEL_WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * KERNEL_WIDTH)));
// The same in memory, at any address.
typedef float FloatsAt __attribute__((vector_size(4 * KERNEL_WIDTH), aligned(4), may_alias));
typedef int32_t IntsAt __attribute__((vector_size(4 * KERNEL_WIDTH), aligned(4), may_alias));

static inline Floats load(const float* x) { return *reinterpret_cast<const FloatsAt*>(x); }
static inline void store(float* x, Floats v) { *reinterpret_cast<FloatsAt*>(x) = v; }
static inline Floats all(float x) { return x - Floats{}; }
static inline Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }
static inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
static inline Floats absolute(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }
static inline float sum(Floats v) {
  float total[KERNEL_WIDTH];
  store(total, v);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++) total[i] += total[i + half];
  return total[0];
}

// e^x to about one unit in the last place, 0 below -87.3; NaN stays NaN. After Cephes' expf.
static inline Floats exponential(Floats x) {
  const Floats low = all(-87.33654f), high = all(88.72283f);
  Floats y = x < low ? low : x;
  y = y > high ? high : y;
  const Floats magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to whole numbers
  Floats n = (y * 1.44269504f + magic) - magic;
  Floats r = y - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^128 is infinity; in two factors, it is reached only where e^x is.
  Ints exponent = __builtin_convertvector(n, Ints), half = exponent >> 1;
  Floats result = p * (Floats)((half + 127) << 23) * (Floats)((exponent - half + 127) << 23);
  result = x < low ? Floats{} : result;
  result = x > high ? all(__builtin_inff()) : result;
  return x == x ? result : x;
}

}  // namespace KERNEL_SET
