// Vectors of the width of one instruction set, by the compiler's own vector types.
//
// Included by `isa_*.cc` only, which define KERNEL_SET, the namespace of all that is compiled for
// this set, and KERNEL_WIDTH, the floats of a vector. Two instruction sets must share no function:
// the linker would keep one of both, and it might be the one that this processor cannot run. So
// nothing here or in the .inl files calls a function template or inline function of the standard
// library. `isa_scalar.cc` defines KERNEL_PLAIN: no instructions beyond the compiler's own choice.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(KERNEL_PLAIN)
#elif defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 16")

namespace KERNEL_SET {

constexpr int W = KERNEL_WIDTH;
typedef float Floats __attribute__((vector_size(4 * KERNEL_WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * KERNEL_WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * KERNEL_WIDTH)));
typedef int16_t Shorts __attribute__((vector_size(4 * KERNEL_WIDTH)));
typedef uint16_t UnsignedShorts __attribute__((vector_size(4 * KERNEL_WIDTH)));
// The same in memory, at any address.
typedef float FloatsAt __attribute__((vector_size(4 * KERNEL_WIDTH), aligned(4), may_alias));
typedef int32_t IntsAt __attribute__((vector_size(4 * KERNEL_WIDTH), aligned(4), may_alias));
typedef int16_t ShortsAt __attribute__((vector_size(4 * KERNEL_WIDTH), aligned(1), may_alias));
// As many narrower numbers as a vector has floats.
typedef uint16_t HalvesAt __attribute__((vector_size(2 * KERNEL_WIDTH), aligned(2), may_alias));
typedef int16_t ShortHalfAt __attribute__((vector_size(2 * KERNEL_WIDTH), aligned(2), may_alias));
typedef int8_t SmallAt __attribute__((vector_size(KERNEL_WIDTH), aligned(1), may_alias));
// Vectors of 16 bytes, for transposing.
typedef uint8_t Bytes16 __attribute__((vector_size(16)));
typedef uint16_t Words8 __attribute__((vector_size(16)));
typedef uint64_t Words2 __attribute__((vector_size(16)));
typedef float Floats4 __attribute__((vector_size(16)));
typedef float Floats4At __attribute__((vector_size(16), aligned(4), may_alias));

ALWAYS_INLINE Floats load(const float* x) { return *reinterpret_cast<const FloatsAt*>(x); }
ALWAYS_INLINE void store(float* x, Floats v) { *reinterpret_cast<FloatsAt*>(x) = v; }
ALWAYS_INLINE Shorts load_shorts(const void* x) { return *static_cast<const ShortsAt*>(x); }
ALWAYS_INLINE Floats all(float x) { return x - Floats{}; }
ALWAYS_INLINE Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }
ALWAYS_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
ALWAYS_INLINE Floats absolute(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }
ALWAYS_INLINE float sum(Floats v) {
  float total[KERNEL_WIDTH];
  store(total, v);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++) total[i] += total[i + half];
  return total[0];
}
// Asks for memory: into the first cache, or into the second. A core waits for few lines of the first
// at a time, too few for the whole speed of memory; so lines are asked for twice.
ALWAYS_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
ALWAYS_INLINE void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }
constexpr int kNear = 2048, kFar = 8192;  // bytes between reading and asking
// At the first byte of memory that is read from one end to the other, and at all bytes.
ALWAYS_INLINE void ask_first(const void* p) {
  for (int i = 0; i < kFar; i += 64) prefetch_far(static_cast<const char*>(p) + i);
}
ALWAYS_INLINE void ask_ahead(const void* p) {
  prefetch(static_cast<const char*>(p) + kNear);
  prefetch_far(static_cast<const char*>(p) + kFar);
}

// W numbers of 16 bits as float32.
ALWAYS_INLINE Floats load_bfloat16(const uint16_t* x) {
#if KERNEL_WIDTH == 16
  const __m512i wide = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  return (Floats)((Words)wide << 16);
#elif KERNEL_WIDTH == 8
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))), 16);
#else
  return (Floats)(__builtin_convertvector(*reinterpret_cast<const HalvesAt*>(x), Words) << 16);
#endif
}
ALWAYS_INLINE float from_bfloat16(uint16_t x) {
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}
ALWAYS_INLINE float from_float16(uint16_t x) {
  uint32_t magnitude = x & 0x7fff, bits = magnitude << 13;
  // 2^112 corrects the exponent, for subnormal numbers too; infinities and NaNs keep the largest one.
  const uint32_t factor_bits = 0x77800000;
  float y, factor;
  __builtin_memcpy(&factor, &factor_bits, 4);
  __builtin_memcpy(&y, &bits, 4);
  y *= factor;
  __builtin_memcpy(&bits, &y, 4);
  if (magnitude >= 0x7c00) bits = 0x7f800000 | magnitude << 13;
  bits |= static_cast<uint32_t>(x & 0x8000) << 16;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}
ALWAYS_INLINE Floats load_float16(const uint16_t* x) {
#if defined(KERNEL_PLAIN)
  float y[W];
  for (int i = 0; i < W; i++) y[i] = from_float16(x[i]);
  return load(y);
#elif KERNEL_WIDTH == 16
  return (Floats)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
#elif KERNEL_WIDTH == 8
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
#else
  return (Floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x)));
#endif
}
// W signed bytes as float32.
ALWAYS_INLINE Floats load_bytes(const int8_t* x) {
#if KERNEL_WIDTH == 16
  return to_floats((Ints)_mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
#elif KERNEL_WIDTH == 8
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
#else
  return to_floats(__builtin_convertvector(*reinterpret_cast<const SmallAt*>(x), Ints));
#endif
}

// Products of int16, two neighbours summed: lane i is a[2i] b[2i] + a[2i + 1] b[2i + 1].
ALWAYS_INLINE Ints multiply_pairs(Shorts a, Shorts b) {
#if defined(KERNEL_PLAIN)
  Ints x = (Ints)a, y = (Ints)b;
  return ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16);
#elif KERNEL_WIDTH == 16
  return (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif KERNEL_WIDTH == 8
  return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
  return (Ints)vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
#endif
}
ALWAYS_INLINE Ints add_pairs(Ints total, Shorts a, Shorts b) {
#if defined(KERNEL_PLAIN)
  return total + multiply_pairs(a, b);
#elif defined(__AVX512VNNI__)
  return (Ints)_mm512_dpwssd_epi32((__m512i)total, (__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__)
  return (Ints)_mm256_dpwssd_avx_epi32((__m256i)total, (__m256i)a, (__m256i)b);
#else
  return total + multiply_pairs(a, b);
#endif
}

// Interleaves a and b within each 128 bits: their lower or upper numbers, one by one or two by two.
#if KERNEL_WIDTH == 16
#define SHUFFLED(a, b, i, j, k, l)                                                                              \
  __builtin_shufflevector(a, b, i, j, k, l, i + 4, j + 4, k + 4, l + 4, i + 8, j + 8, k + 8, l + 8, i + 12, j + 12, \
                          k + 12, l + 12)
#elif KERNEL_WIDTH == 8
#define SHUFFLED(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l, i + 4, j + 4, k + 4, l + 4)
#else
#define SHUFFLED(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#endif
// Transposes the 4 x 4 numbers that each 128 bits of four vectors hold: number i of vector j becomes
// number j of vector i.
ALWAYS_INLINE void transpose_quads(Ints* x) {
  const Ints p = SHUFFLED(x[0], x[1], 0, W, 1, W + 1), q = SHUFFLED(x[2], x[3], 0, W, 1, W + 1);
  const Ints r = SHUFFLED(x[0], x[1], 2, W + 2, 3, W + 3), s = SHUFFLED(x[2], x[3], 2, W + 2, 3, W + 3);
  x[0] = SHUFFLED(p, q, 0, 1, W, W + 1);
  x[1] = SHUFFLED(p, q, 2, 3, W + 2, W + 3);
  x[2] = SHUFFLED(r, s, 0, 1, W, W + 1);
  x[3] = SHUFFLED(r, s, 2, 3, W + 2, W + 3);
}
// The sums of the four numbers that each 128 bits of four vectors hold: that of vector i becomes number i.
ALWAYS_INLINE Ints sum_quads(const Ints* x) {
  const Ints p = SHUFFLED(x[0], x[1], 0, W, 1, W + 1) + SHUFFLED(x[0], x[1], 2, W + 2, 3, W + 3);
  const Ints q = SHUFFLED(x[2], x[3], 0, W, 1, W + 1) + SHUFFLED(x[2], x[3], 2, W + 2, 3, W + 3);
  return SHUFFLED(p, q, 0, 1, W, W + 1) + SHUFFLED(p, q, 2, 3, W + 2, W + 3);
}
#undef SHUFFLED
constexpr int kQuads = W / 4;  // 128-bit parts of a vector
// Transposes the parts of 128 bits of kQuads vectors.
ALWAYS_INLINE void transpose_parts([[maybe_unused]] Ints* x) {
#if KERNEL_WIDTH == 16
  auto lower = [](Ints a, Ints b) __attribute__((always_inline)) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  };
  auto upper = [](Ints a, Ints b) __attribute__((always_inline)) {
    return __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  };
  auto even = [](Ints a, Ints b) __attribute__((always_inline)) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  };
  auto odd = [](Ints a, Ints b) __attribute__((always_inline)) {
    return __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  };
  const Ints p = lower(x[0], x[1]), q = upper(x[0], x[1]), r = lower(x[2], x[3]), s = upper(x[2], x[3]);
  x[0] = even(p, r);
  x[1] = odd(p, r);
  x[2] = even(q, s);
  x[3] = odd(q, s);
#elif KERNEL_WIDTH == 8
  const Ints p = __builtin_shufflevector(x[0], x[1], 0, 1, 2, 3, 8, 9, 10, 11);
  x[1] = __builtin_shufflevector(x[0], x[1], 4, 5, 6, 7, 12, 13, 14, 15);
  x[0] = p;
#endif
}

// The sums of four vectors. The order of the additions within a vector is always the same.
ALWAYS_INLINE Floats4 sum_four(Floats a, Floats b, Floats c, Floats d) {
#if defined(KERNEL_PLAIN)
  return Floats4{sum(a), sum(b), sum(c), sum(d)};
#elif defined(__x86_64__)
#if KERNEL_WIDTH == 16
  auto half = [](Floats v) {
    return (__m256)__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
           (__m256)__builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  };
#else
  auto half = [](Floats v) { return (__m256)v; };
#endif
  __m256 t = _mm256_hadd_ps(_mm256_hadd_ps(half(a), half(b)), _mm256_hadd_ps(half(c), half(d)));
  return (Floats4)_mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
#else
  return (Floats4)vpaddq_f32(vpaddq_f32((float32x4_t)a, (float32x4_t)b), vpaddq_f32((float32x4_t)c, (float32x4_t)d));
#endif
}

// e^x to about one unit in the last place, 0 below -87.3; NaN stays NaN. After Cephes' expf.
ALWAYS_INLINE Floats exponential(Floats x) {
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
