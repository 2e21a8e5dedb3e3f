// Weights in 4 bits, NF4 as bitsandbytes stores it, back to floating point.
//
//     value[i] = NF4[nibble i] absmax[i / 64], rounded to the dtype
//     absmax[b] = code[a[b]] nested_absmax[b / 256] + offset for statistics that are quantised themselves
//
// A block of 64 values holds 16 different ones at most: these are multiplied and rounded, and each nibble picks one. Every step
// is rounded as torch rounds it, so that results are those of plain PyTorch to the bit.
//
// Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (2023).
#pragma once

#include "kernels.h"
#include "parallel.h"
#include "simd.h"
#include "storage.h"

namespace CDAS_ISA {

constexpr int64_t kNf4Block = 64, kNf4NestedBlock = 256;
alignas(64) constexpr float kNf4[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
};

template <typename Storage> CDAS_INLINE void put_exactly(typename Storage::Stored* p, Vec<float> v) { Storage::put(p, v); }
// The instruction for it makes subnormal numbers zero.
template <> CDAS_INLINE void put_exactly<Bfloat16>(uint16_t* p, Vec<float> v) {
  const HalfWords half = __builtin_convertvector((Ints<float>)Bfloat16::round(v) >> 16, HalfWords);
  std::memcpy(p, &half, sizeof(half));
}

// Writes the 64 values that 32 bytes stand for, given what the 16 nibbles do. Of a byte the high nibble is first.
#if defined(CDAS_AVX512)
CDAS_INLINE void look_up(const uint8_t* packed, const float* values, float* out) {
  const __m512 table = _mm512_loadu_ps(values);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)(packed + 8 * i)));
    // The permutation reads the low 4 bits of each index.
    const __m512i index = _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));
    _mm512_storeu_ps(out + 16 * i, _mm512_permutexvar_ps(index, table));
  }
}
CDAS_INLINE void look_up(const uint8_t* packed, const uint16_t* values, uint16_t* out) {
  const __m512i table = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)values));
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(packed + 16 * i)));
    // The permutation reads the low 5 bits of each index; the fifth changes nothing, for the table is there twice.
    const __m512i index = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
    _mm512_storeu_si512(out + 32 * i, _mm512_permutexvar_epi16(index, table));
  }
}
#elif defined(CDAS_AVX2)
CDAS_INLINE void look_up(const uint8_t* packed, const float* values, float* out) {
  const __m256 low = _mm256_loadu_ps(values), high = _mm256_loadu_ps(values + 8);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    int32_t four;
    std::memcpy(&four, packed + 4 * i, sizeof(four));
    const __m256i bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
    // The permutations read the low 3 bits of each index, the blend the sign, which the fourth bit becomes.
    const __m256i index = _mm256_or_si256(_mm256_srli_epi64(bytes, 4), _mm256_slli_epi64(bytes, 32));
    const __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    const __m256 from_low = _mm256_permutevar8x32_ps(low, index), from_high = _mm256_permutevar8x32_ps(high, index);
    _mm256_storeu_ps(out + 8 * i, _mm256_blendv_ps(from_low, from_high, is_high));
  }
}
CDAS_INLINE void look_up(const uint8_t* packed, const uint16_t* values, uint16_t* out) {
  // Bytes are what can be picked: those of the low halves of the table, those of the high halves, and then in pairs.
  const __m128i first = _mm_loadu_si128((const __m128i*)values), last = _mm_loadu_si128((const __m128i*)(values + 8));
  const __m128i byte = _mm_set1_epi16(0xff);
  const __m256i low = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(last, byte)));
  const __m256i high = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(last, 8)));
  // Each byte twice, where pairing within the halves of a vector leaves values next to each other.
  const __m256i twice = _mm256_setr_epi8(0, 0, 1, 1, 2, 2, 3, 3, 8, 8, 9, 9, 10, 10, 11, 11,  //
                                         4, 4, 5, 5, 6, 6, 7, 7, 12, 12, 13, 13, 14, 14, 15, 15);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256i sixteen = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)(packed + 16 * i)));
    const __m256i bytes = _mm256_shuffle_epi8(sixteen, twice);
    const __m256i index = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(bytes, 4), _mm256_set1_epi16(0x000f)),
                                          _mm256_and_si256(bytes, _mm256_set1_epi16(0x0f00)));
    const __m256i lows = _mm256_shuffle_epi8(low, index), highs = _mm256_shuffle_epi8(high, index);
    _mm256_storeu_si256((__m256i*)(out + 32 * i), _mm256_unpacklo_epi8(lows, highs));
    _mm256_storeu_si256((__m256i*)(out + 32 * i + 16), _mm256_unpackhi_epi8(lows, highs));
  }
}
#else
template <typename T>
CDAS_INLINE void look_up(const uint8_t* packed, const T* values, T* out) {
  for (int i = 0; i < 32; ++i) {
    out[2 * i] = values[packed[i] >> 4];
    out[2 * i + 1] = values[packed[i] & 15];
  }
}
#endif

template <typename Storage> class Nf4 {
  using S = typename Storage::Stored;

 public:
  explicit Nf4(const CdasNf4& args) : a(args) {}

  void run() const {
    constexpr int64_t kPartValues = 1 << 16;
    cdas::parallel((a.count + kPartValues - 1) / kPartValues, a.threads, [&](int64_t part) {
      const int64_t begin = part * kPartValues, end = begin + kPartValues < a.count ? begin + kPartValues : a.count;
      S* const out = static_cast<S*>(a.out);
      int64_t i = begin;
      for (; i + kNf4Block <= end; i += kNf4Block) block(i / kNf4Block, a.packed + i / 2, out + i);
      if (i < end) {
        uint8_t packed[kNf4Block / 2] = {};
        S values[kNf4Block];
        std::memcpy(packed, a.packed + i / 2, (end - i + 1) / 2);
        block(i / kNf4Block, packed, values);
        std::memcpy(out + i, values, (end - i) * sizeof(S));
      }
    });
  }

 private:
  CDAS_INLINE void block(int64_t index, const uint8_t* packed, S* out) const {
    const Vec<float> absmax = broadcast(absmax_of(index));
    alignas(64) S values[16];
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += kLanes<float>) put_exactly<Storage>(values + i, load(kNf4 + i) * absmax);
    look_up(packed, values, out);
  }

  CDAS_INLINE float absmax_of(int64_t index) const {
    if (!a.nested_code) return static_cast<const float*>(a.absmax)[index];
    float product = a.nested_code[static_cast<const uint8_t*>(a.absmax)[index]] * a.nested_absmax[index / kNf4NestedBlock];
    asm("" : "+m"(product));  // else it is added unrounded, by one instruction
    return product + *a.offset;
  }

  const CdasNf4& a;
};

}  // namespace CDAS_ISA
