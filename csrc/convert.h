// Elements of tensors in and out of the dtype of the maths.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace CDAS_ISA {

template <typename To, typename From> CDAS_INLINE To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

CDAS_INLINE float bfloat16_to_float(uint16_t x) { return bit_cast<float>(uint32_t(x) << 16); }
CDAS_INLINE uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);  // a NaN stays one
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

CDAS_INLINE float float16_to_float(uint16_t x) {
  const uint32_t magnitude = uint32_t(x & 0x7fff) << 13;
  float value = bit_cast<float>(magnitude) * 0x1p112f;  // the exponent's bias goes from 15 to 127, subnormals with it
  if (magnitude >= 0x7c00u << 13) value = bit_cast<float>(magnitude | 0x7f800000u);
  return bit_cast<float>(bit_cast<uint32_t>(value) | uint32_t(x & 0x8000) << 16);
}
CDAS_INLINE uint16_t float_to_float16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000;
  const float magnitude = bit_cast<float>(bits & 0x7fffffff);
  if (!(magnitude < 65520.0f)) return uint16_t(sign | (magnitude == magnitude ? 0x7c00 : 0x7e00));
  if (magnitude < 0x1p-14f) return uint16_t(sign | (bit_cast<uint32_t>(magnitude + 0.5f) - 0x3f000000u));
  const uint32_t m = bits & 0x7fffffff;
  return uint16_t(sign | (m - 0x38000000u + 0xfff + (m >> 13 & 1)) >> 13);
}

template <typename T> CDAS_INLINE T element(const void* data, int64_t index, int32_t dtype) {
  switch (dtype) {
    case CDAS_FLOAT64: return T(static_cast<const double*>(data)[index]);
    case CDAS_BFLOAT16: return T(bfloat16_to_float(static_cast<const uint16_t*>(data)[index]));
    case CDAS_FLOAT16: return T(float16_to_float(static_cast<const uint16_t*>(data)[index]));
    default: return T(static_cast<const float*>(data)[index]);
  }
}

// count elements at data[first], data[first + stride], ... into out.
template <typename T>
inline void read_row(const void* data, int64_t first, int64_t stride, int64_t count, int32_t dtype, T* out) {
  const auto read = [&](auto convert, const auto* from) {
    if (stride == 1)
      for (int64_t i = 0; i < count; ++i) out[i] = T(convert(from[first + i]));
    else
      for (int64_t i = 0; i < count; ++i) out[i] = T(convert(from[first + i * stride]));
  };
  const auto same = [](auto x) { return x; };
  switch (dtype) {
    case CDAS_FLOAT64: return read(same, static_cast<const double*>(data));
    case CDAS_BFLOAT16: return read([](uint16_t x) { return bfloat16_to_float(x); }, static_cast<const uint16_t*>(data));
    case CDAS_FLOAT16: return read([](uint16_t x) { return float16_to_float(x); }, static_cast<const uint16_t*>(data));
    default: return read(same, static_cast<const float*>(data));
  }
}

// count numbers to out[first], out[first + 1], ...
template <typename T> inline void write_row(const T* from, int64_t count, int32_t dtype, void* out, int64_t first) {
  switch (dtype) {
    case CDAS_FLOAT64:
      for (int64_t i = 0; i < count; ++i) static_cast<double*>(out)[first + i] = double(from[i]);
      return;
    case CDAS_BFLOAT16:
      for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(out)[first + i] = float_to_bfloat16(float(from[i]));
      return;
    case CDAS_FLOAT16:
      for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(out)[first + i] = float_to_float16(float(from[i]));
      return;
    default:
      for (int64_t i = 0; i < count; ++i) static_cast<float*>(out)[first + i] = float(from[i]);
  }
}

}  // namespace CDAS_ISA
