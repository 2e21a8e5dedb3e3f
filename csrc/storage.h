// Storage types of activations: vectors of the maths in and out of memory, or rounded as if they had been there.
#pragma once

#include "convert.h"
#include "simd.h"

namespace CDAS_ISA {

template <typename T> struct Plain {
  using Math = T;
  using Stored = T;
  static CDAS_INLINE Vec<T> get(const T* p) { return load(p); }
  static CDAS_INLINE void put(T* p, Vec<T> v) { store(p, v); }
  static CDAS_INLINE Vec<T> round(Vec<T> v) { return v; }
};
typedef uint16_t HalfWords __attribute__((vector_size(kVectorBytes / 2)));
struct Bfloat16 {
  using Math = float;
  using Stored = uint16_t;
  static CDAS_INLINE Vec<float> get(const uint16_t* p) {
#if defined(CDAS_AVX512)
    return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(CDAS_AVX2)
    return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
    HalfWords half;
    std::memcpy(&half, p, sizeof(half));
    return (Vec<float>)(__builtin_convertvector(half, Ints<float>) << 16);
#endif
  }
  static CDAS_INLINE void put(uint16_t* p, Vec<float> v) {
#ifdef CDAS_AVX512_BF16
    const __m256bh half = _mm512_cvtneps_pbh(v);
#else
    const Ints<float> bits = (Ints<float>)v;
    const Ints<float> rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const HalfWords half = __builtin_convertvector(v == v ? rounded : bits >> 16 | 0x40, HalfWords);
#endif
    std::memcpy(p, &half, sizeof(half));
  }
  static CDAS_INLINE Vec<float> round(Vec<float> v) {
    const Ints<float> bits = (Ints<float>)v;
    return v == v ? (Vec<float>)((bits + 0x7fff + (bits >> 16 & 1)) & ~0xffff) : v;
  }
};
struct Float16 {
  using Math = float;
  using Stored = uint16_t;
  static CDAS_INLINE Vec<float> get(const uint16_t* p) {
#if defined(CDAS_AVX512)
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(CDAS_AVX2)
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    Vec<float> v;
    for (int i = 0; i < kLanes<float>; ++i) v[i] = float16_to_float(p[i]);
    return v;
#endif
  }
  static CDAS_INLINE void put(uint16_t* p, Vec<float> v) {
#if defined(CDAS_AVX512)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(CDAS_AVX2)
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kLanes<float>; ++i) p[i] = float_to_float16(v[i]);
#endif
  }
  static CDAS_INLINE Vec<float> round(Vec<float> v) {
#if defined(CDAS_AVX512)
    return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(CDAS_AVX2)
    return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kLanes<float>; ++i) v[i] = float16_to_float(float_to_float16(v[i]));
    return v;
#endif
  }
};

// A vector of the maths from the first `count` numbers at p, zeros behind them; all of it if there are more.
template <typename Storage>
CDAS_INLINE Vec<typename Storage::Math> read(const typename Storage::Stored* p, int64_t count) {
  constexpr int L = kLanes<typename Storage::Math>;
  if (count >= L) return Storage::get(p);
  typename Storage::Stored padded[L] = {};
  if (count > 0) std::memcpy(padded, p, count * sizeof(*p));
  return Storage::get(padded);
}
// The first `count` numbers of a vector to p.
template <typename Storage>
CDAS_INLINE void write(typename Storage::Stored* p, Vec<typename Storage::Math> v, int64_t count) {
  constexpr int L = kLanes<typename Storage::Math>;
  if (count >= L) return Storage::put(p, v);
  typename Storage::Stored padded[L];
  Storage::put(padded, v);
  if (count > 0) std::memcpy(p, padded, count * sizeof(*p));
}

}  // namespace CDAS_ISA
