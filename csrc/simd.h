// Vectors of the widest kind that the translation unit is compiled for, and the few functions of the kernels on them.
//
// Written once, with the vector extensions that GCC and Clang share: CDAS_VECTOR_BYTES is 64 (AVX-512), 32 (AVX2) or 16
// (SSE2, NEON). Everything lies in the namespace CDAS_ISA, one for each instruction set, and is inlined.
#pragma once

#include <cstdint>
#include <cstring>
#ifdef __x86_64__
#include <immintrin.h>
#endif

// What of x86 the file is compiled for; its vectors decide, whatever else the compiler was allowed.
#if defined(__AVX512F__) && CDAS_VECTOR_BYTES == 64
#define CDAS_AVX512
#ifdef __AVX512BF16__
#define CDAS_AVX512_BF16
#endif
#elif defined(__AVX2__) && CDAS_VECTOR_BYTES == 32
#define CDAS_AVX2
#endif

#define CDAS_INLINE inline __attribute__((always_inline))

namespace CDAS_ISA {

constexpr int kVectorBytes = CDAS_VECTOR_BYTES;

// The integers of the same width as a floating-point type.
template <typename T> struct IntegerOf;
template <> struct IntegerOf<float> { using type = int32_t; };
template <> struct IntegerOf<double> { using type = int64_t; };

template <typename T> struct Simd {
  static constexpr int kLanes = kVectorBytes / sizeof(T);
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  typedef typename IntegerOf<T>::type Integers __attribute__((vector_size(kVectorBytes)));
};
template <typename T> using Vec = typename Simd<T>::Vector;
template <typename T> using Ints = typename Simd<T>::Integers;
template <typename T> constexpr int kLanes = Simd<T>::kLanes;

template <typename T> CDAS_INLINE Vec<T> broadcast(T x) { return Vec<T>{} + x; }
template <typename T> CDAS_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <typename T> CDAS_INLINE void store(T* p, Vec<T> v) { std::memcpy(p, &v, sizeof(v)); }
// Brings what lies `count` numbers behind p, where there need be none, into the second level of the cache.
template <typename T> CDAS_INLINE void prefetch(const T* p, int64_t count) {
  __builtin_prefetch(reinterpret_cast<const char*>(uintptr_t(p) + uintptr_t(count) * sizeof(T)), 0, 2);
}

// a > b ? a : b, which is b where either is NaN.
CDAS_INLINE Vec<float> greater_of(Vec<float> a, Vec<float> b) {
#if defined(CDAS_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(CDAS_AVX2)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
CDAS_INLINE Vec<double> greater_of(Vec<double> a, Vec<double> b) {
#if defined(CDAS_AVX512)
  return _mm512_max_pd(a, b);
#elif defined(CDAS_AVX2)
  return _mm256_max_pd(a, b);
#else
  return a > b ? a : b;
#endif
}

template <typename T> CDAS_INLINE Vec<T> absolute(Vec<T> x) {
  const Ints<T> sign = Ints<T>{} + (typename IntegerOf<T>::type(1) << (8 * sizeof(T) - 1));
  return (Vec<T>)((Ints<T>)x & ~sign);
}

// The sum of the lanes, pairwise.
template <typename T> CDAS_INLINE T sum_of_lanes(Vec<T> v) {
  T lanes[kLanes<T>];
  store(lanes, v);
#pragma GCC unroll 4
  for (int width = kLanes<T> / 2; width > 0; width /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

template <typename T> struct MathConstants;
template <> struct MathConstants<float> {
  static constexpr int kMantissaBits = 23;
  static constexpr int32_t kBias = 127;
  static constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  static constexpr float kSmallest = -87.0f;      // below, exp is not a normal number
  static constexpr float kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;
  static constexpr float kSqrtHalf = 0.707106781f;
};
template <> struct MathConstants<double> {
  static constexpr int kMantissaBits = 52;
  static constexpr int64_t kBias = 1023;
  static constexpr double kRounder = 6755399441055744.0;
  static constexpr double kSmallest = -708.0;
  static constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kSqrtHalf = 0.70710678118654752440;
};

// (exp(r) - 1) / r for |r| <= ln(2) / 2: near-minimax, relative error 2.5e-8; the series to r^13 in double.
CDAS_INLINE Vec<float> expm1_ratio(Vec<float> r) {
  Vec<float> y = broadcast(0.00139337332f);
  y = y * r + 0.00836323538f;
  y = y * r + 0.0416664642f;
  y = y * r + 0.166665766f;
  y = y * r + 0.5f;
  return y * r + 1.0f;
}
CDAS_INLINE Vec<double> expm1_ratio(Vec<double> r) {
  Vec<double> y = broadcast(1.0 / 87178291200);  // 1 / 14!
  double factorial = 87178291200;
  for (int n = 14; n >= 2; --n) {
    factorial /= n;
    y = y * r + 1 / factorial;
  }
  return y;
}

// x = n ln 2 + r with n whole and |r| <= ln(2) / 2, for kSmallest <= x <= 0; NaN stays NaN.
template <typename T> struct Reduced {
  Vec<T> r, power;  // power: 2^n
};
template <typename T> CDAS_INLINE Reduced<T> reduce(Vec<T> x) {
  using M = MathConstants<T>;
  const Vec<T> shifted = x * T(1.44269504088896340736) + M::kRounder;
  const Vec<T> n = shifted - M::kRounder;
  return {(x - n * M::kLn2High) - n * M::kLn2Low, (Vec<T>)(((Ints<T>)shifted + M::kBias) << M::kMantissaBits)};
}

// exp(x) for x <= 0, exactly 0 below kSmallest; NaN for NaN.
template <typename T> CDAS_INLINE Vec<T> exp_nonpositive(Vec<T> x) {
  using M = MathConstants<T>;
  const Reduced<T> e = reduce<T>(greater_of(broadcast<T>(M::kSmallest), x));
  const Vec<T> y = (e.r * expm1_ratio(e.r) + T(1)) * e.power;
  return x < M::kSmallest ? Vec<T>{} : y;
}

// exp(x) - 1 for x <= 0, with a small relative error for small x; exp(x) beside it, not made from it.
template <typename T> struct Expm1 {
  Vec<T> minus_one, whole;
};
template <typename T> CDAS_INLINE Expm1<T> expm1_nonpositive(Vec<T> x) {
  const Reduced<T> e = reduce<T>(greater_of(broadcast<T>(MathConstants<T>::kSmallest), x));
  const Vec<T> rest = e.r * expm1_ratio(e.r);
  return {e.power * rest + (e.power - T(1)), e.power * rest + e.power};
}

// log(1 + f) - f + f^2/2, divided by f^3, for 1 + f in [sqrt(1/2), sqrt(2)).
CDAS_INLINE Vec<float> log_tail(Vec<float> f) {
  Vec<float> y = broadcast(7.0376836292e-2f);  // Cephes logf, absolute error of the logarithm below 1e-7
  y = y * f - 1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f - 1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f - 1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f - 2.4999993993e-1f;
  return y * f + 3.3333331174e-1f;
}

// log(1 + x) for -1 < x <= 0, with a small relative error for small x; u is 1 + x, and may be more exact than that sum.
CDAS_INLINE Vec<float> log1p_nonpositive(Vec<float> x, Vec<float> u) {
  using M = MathConstants<float>;
  const Ints<float> offset = (Ints<float>)(Vec<float>{} + M::kSqrtHalf);
  const Ints<float> bits = (Ints<float>)u - offset;
  const Ints<float> exponent = bits >> M::kMantissaBits;
  const Vec<float> k = __builtin_convertvector(exponent, Vec<float>);
  const Vec<float> mantissa = (Vec<float>)((Ints<float>)u - (exponent << M::kMantissaBits));
  const Vec<float> f = exponent == 0 ? x : mantissa - 1.0f;  // x itself has lost nothing to the rounding of 1 + x
  const Vec<float> f2 = f * f;
  const Vec<float> small = (log_tail(f) * f - 0.5f) * f2 + k * M::kLn2Low;
  return small + f + k * M::kLn2High + (x - x);  // a NaN has been lost to its bits
}
CDAS_INLINE Vec<double> log1p_nonpositive(Vec<double> x, Vec<double> u) {
  using M = MathConstants<double>;
  const Ints<double> offset = (Ints<double>)(Vec<double>{} + M::kSqrtHalf);
  const Ints<double> exponent = ((Ints<double>)u - offset) >> M::kMantissaBits;
  const Vec<double> k = __builtin_convertvector(exponent, Vec<double>);
  const Vec<double> mantissa = (Vec<double>)((Ints<double>)u - (exponent << M::kMantissaBits));
  const Vec<double> f = exponent == 0 ? x : mantissa - 1.0;
  // log(1 + f) = 2 atanh(s), s = f / (2 + f), |s| < 0.172: the series to s^23.
  const Vec<double> s = f / (2.0 + f), w = s * s;
  Vec<double> y = broadcast(1.0 / 23);
  for (int n = 21; n >= 3; n -= 2) y = y * w + 1.0 / n;
  return 2.0 * s + (2.0 * s * w * y + k * M::kLn2Low) + k * M::kLn2High + (x - x);
}

// log(1 + x / 2) for -1 <= x <= 0: near-minimax, relative error 1.1e-8.
CDAS_INLINE Vec<float> log1p_of_half(Vec<float> x) {
  Vec<float> y = broadcast(-0.00130010174f);
  y = y * x - 0.00308348668f;
  y = y * x - 0.0045360205f;
  y = y * x - 0.00157562769f;
  y = y * x - 0.0036176348f;
  y = y * x + 0.00604025213f;
  y = y * x - 0.0156464423f;
  y = y * x + 0.0416658308f;
  y = y * x - 0.125000005f;
  return (y * x + 0.5f) * x;
}
CDAS_INLINE Vec<double> log1p_of_half(Vec<double> x) { return log1p_nonpositive(0.5 * x, 0.5 * x + 1.0); }

// tanh(x) = -m / (2 + m) with m = exp(-2|x|) - 1, the sign of x restored.
template <typename T> CDAS_INLINE Vec<T> tanh_of(Vec<T> x) {
  const Vec<T> m = expm1_nonpositive<T>(T(-2) * absolute<T>(x)).minus_one;
  const Vec<T> y = -m / (m + T(2));
  return x < T(0) ? -y : y;
}

// Two vectors of float32 rounded to pairs of bfloat16: the first in the lower halves.
CDAS_INLINE Vec<float> to_pairs(Vec<float> low, Vec<float> high) {
  const auto rounded = [](Vec<float> x) {
    const Ints<float> bits = (Ints<float>)x;
    return bits + 0x7fff + (bits >> 16 & 1);
  };
  return (Vec<float>)((rounded(low) >> 16 & 0xffff) | (rounded(high) & ~0xffff));
}

}  // namespace CDAS_ISA
