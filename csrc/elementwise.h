// RMS norm of rows, the gated activation of an MLP, and rotary position embedding.
//
//     norm       n = x / sqrt(mean(x^2) + eps),  y = factor n
//                u = factor dy,  dx = (u - n mean(u n)) / sqrt(mean(x^2) + eps)
//     gated      y = f(gate) up,  f(g) = g s(p(g)),  s(p) = 1 / (1 + exp(-p))
//                dgate = f'(gate) up dy,  dup = f(gate) dy,  f'(g) = s + g s (1 - s) p'(g)
//     rotary     y_1 = x_1 cos_1 - x_2 sin_1,  y_2 = x_2 cos_2 + x_1 sin_2  for the halves of a head,
//                each product rounded to the dtype
//
// p(g) = g is SiLU. p(g) = 2 sqrt(2 / pi) (g + 0.044715 g^3) is the tanh approximation of GELU, as 1 + tanh(z) = 2 s(2 z).
// Nothing is kept for the backward pass but the arguments: a norm's mean is found anew in the sweep that finds mean(u n).
#pragma once

#include <cmath>

#include "kernels.h"
#include "parallel.h"
#include "simd.h"
#include "storage.h"

namespace CDAS_ISA {

// Rows as they lie in memory, of which each is contiguous.
template <typename S> CDAS_INLINE const S* row_of(const CdasRows& rows, int64_t row) {
  const int64_t outer = row / rows.inner;
  return static_cast<const S*>(rows.data) + outer * rows.outer_stride + (row - outer * rows.inner) * rows.inner_stride;
}

// Calls body(row) for every row; a part is some tens of kilobytes.
template <typename Body> CDAS_INLINE void for_rows(int64_t rows, int64_t width, int64_t threads, const Body& body) {
  constexpr int64_t kPartNumbers = 1 << 14;
  int64_t parts = rows * width / kPartNumbers;
  if (parts > rows) parts = rows;
  if (parts < 1) parts = 1;
  cdas::parallel(parts, threads, [&](int64_t part) {
    const cdas::Range range = cdas::share(rows, part, parts);
    for (int64_t row = range.begin; row < range.end; ++row) body(row);
  });
}

// Calls body(first column, how many) for every vector of a row.
template <typename T, typename Body> CDAS_INLINE void for_vectors(int64_t width, const Body& body) {
  constexpr int64_t L = kLanes<T>;
  int64_t d = 0;
  for (; d + L <= width; d += L) body(d, L);
  if (d < width) body(d, width - d);
}

template <typename Storage> class RmsNorm {
  using T = typename Storage::Math;
  using S = typename Storage::Stored;
  static constexpr int L = kLanes<T>;

 public:
  explicit RmsNorm(const CdasRmsNorm& args) : a(args) {}

  void forward() const {
    for_rows(a.rows, a.width, a.threads, [&](int64_t row) {
      if (a.round_normalized)
        normalize<true>(row);
      else
        normalize<false>(row);
    });
  }

  void backward() const {
    for_rows(a.rows, a.width, a.threads, [&](int64_t row) {
      const S *const x = row_of<S>(a.x, row), *const grad = row_of<S>(a.grad_out, row);
      const T* const factor = static_cast<const T*>(a.factor);
      S* const out = static_cast<S*>(a.out) + row * a.width;
      Vec<T> squares = {}, products = {};
      for_vectors<T>(a.width, [&](int64_t d, int64_t count) __attribute__((always_inline)) {
        const Vec<T> y = read<Storage>(x + d, count);
        squares += y * y;
        products += read<Plain<T>>(factor + d, count) * read<Storage>(grad + d, count) * y;
      });
      const T scale = scale_of(squares);
      const T along = sum_of_lanes<T>(products) * scale / T(a.width) * scale;  // mean(u n) / sqrt(mean(x^2) + eps)
      for_vectors<T>(a.width, [&](int64_t d, int64_t count) __attribute__((always_inline)) {
        const Vec<T> u = read<Plain<T>>(factor + d, count) * read<Storage>(grad + d, count);
        write<Storage>(out + d, scale * (u - read<Storage>(x + d, count) * along), count);
      });
    });
  }

 private:
  template <bool ROUND> CDAS_INLINE void normalize(int64_t row) const {
    const S* const x = row_of<S>(a.x, row);
    const T* const factor = static_cast<const T*>(a.factor);
    S* const out = static_cast<S*>(a.out) + row * a.width;
    Vec<T> even = {}, odd = {};  // two chains of additions, for their latency
    const int64_t width = a.width;
    int64_t d = 0;
    for (; d + 2 * L <= width; d += 2 * L) {
      const Vec<T> y = Storage::get(x + d), z = Storage::get(x + d + L);
      even += y * y;
      odd += z * z;
    }
    for (; d < width; d += L) {
      const Vec<T> y = read<Storage>(x + d, width - d < L ? width - d : L);
      even += y * y;
    }
    const T scale = scale_of(even + odd);
    for_vectors<T>(width, [&](int64_t at, int64_t count) __attribute__((always_inline)) {
      const Vec<T> n = read<Storage>(x + at, count) * scale;
      write<Storage>(out + at, read<Plain<T>>(factor + at, count) * (ROUND ? Storage::round(n) : n), count);
    });
  }

  CDAS_INLINE T scale_of(Vec<T> squares) const {
    return T(1) / std::sqrt(sum_of_lanes<T>(squares) / T(a.width) + T(a.eps));
  }

  const CdasRmsNorm& a;
};

template <typename Storage> class GatedActivation {
  using T = typename Storage::Math;
  using S = typename Storage::Stored;

 public:
  explicit GatedActivation(const CdasGatedActivation& args) : a(args) {}

  void forward() const {
    a.activation == CDAS_SILU ? forward_of<CDAS_SILU>() : forward_of<CDAS_GELU_TANH>();
  }
  void backward() const {
    a.activation == CDAS_SILU ? backward_of<CDAS_SILU>() : backward_of<CDAS_GELU_TANH>();
  }

 private:
  template <int KIND> void forward_of() const {
    for_rows(a.rows, a.width, a.threads, [&](int64_t row) {
      const S *const gate = row_of<S>(a.gate, row), *const up = row_of<S>(a.up, row);
      S* const out = static_cast<S*>(a.out) + row * a.width;
      for_vectors<T>(a.width, [&](int64_t d, int64_t count) __attribute__((always_inline)) {
        const Vec<T> g = read<Storage>(gate + d, count);
        write<Storage>(out + d, Storage::round(g * sigmoid(exponent<KIND>(g).value).s) * read<Storage>(up + d, count), count);
      });
    });
  }

  template <int KIND> void backward_of() const {
    for_rows(a.rows, a.width, a.threads, [&](int64_t row) {
      const S *const gate = row_of<S>(a.gate, row), *const up = row_of<S>(a.up, row);
      const S* const grad = row_of<S>(a.grad_out, row);
      S* const grad_gate = a.grad_gate ? static_cast<S*>(a.grad_gate) + row * a.width : nullptr;
      S* const grad_up = a.grad_up ? static_cast<S*>(a.grad_up) + row * a.width : nullptr;
      for_vectors<T>(a.width, [&](int64_t d, int64_t count) __attribute__((always_inline)) {
        const Vec<T> g = read<Storage>(gate + d, count), dy = read<Storage>(grad + d, count);
        const Exponent p = exponent<KIND>(g);
        const Sigmoid sigma = sigmoid(p.value);
        if (grad_up) write<Storage>(grad_up + d, g * sigma.s * dy, count);
        if (grad_gate) {
          const Vec<T> slope = sigma.s + g * (sigma.s * sigma.rest) * p.slope;
          write<Storage>(grad_gate + d, slope * (read<Storage>(up + d, count) * dy), count);
        }
      });
    });
  }

  // p(g) and p'(g).
  struct Exponent {
    Vec<T> value, slope;
  };
  template <int KIND> static CDAS_INLINE Exponent exponent(Vec<T> g) {
    if (KIND == CDAS_SILU) return {g, broadcast<T>(1)};
    constexpr T kTwoRoots = T(1.59576912160573071176), kCubic = T(0.044715);  // 2 sqrt(2 / pi)
    const Vec<T> bound = broadcast<T>(-32);  // beyond, s is 0 or 1, and the cube of g may be infinite
    const Vec<T> x = -greater_of(bound, -greater_of(bound, g));
    const Vec<T> square = x * x;
    return {kTwoRoots * x * (T(1) + kCubic * square), kTwoRoots * (T(1) + T(3) * kCubic * square)};
  }

  // s(p) and 1 - s(p), both with a small relative error.
  struct Sigmoid {
    Vec<T> s, rest;
  };
  static CDAS_INLINE Sigmoid sigmoid(Vec<T> p) {
    const Vec<T> e = exp_nonpositive<T>(-absolute<T>(p));
    const Vec<T> large = T(1) / (T(1) + e), small = e * large;
    return {p < T(0) ? small : large, p < T(0) ? large : small};
  }

  const CdasGatedActivation& a;
};

template <typename Storage> class Rotary {
  using T = typename Storage::Math;
  using S = typename Storage::Stored;

 public:
  explicit Rotary(const CdasRotary& args) : a(args) {}

  void run() const {
    const int64_t half = a.width / 2;
    for_rows(a.rows, a.heads * a.width, a.threads, [&](int64_t row) {
      const S *const cos = row_of<S>(a.cos, row), *const sin = row_of<S>(a.sin, row), *const first = row_of<S>(a.x, row);
      for (int64_t head = 0; head < a.heads; ++head) {
        const S* const x = first + head * a.head_stride;
        S* const out = static_cast<S*>(a.out) + (row * a.heads + head) * a.width;
        for_vectors<T>(half, [&](int64_t d, int64_t count) __attribute__((always_inline)) {
          const int64_t e = half + d;
          const Vec<T> low = read<Storage>(x + d, count), high = read<Storage>(x + e, count);
          const Vec<T> low_cos = Storage::round(low * read<Storage>(cos + d, count));
          const Vec<T> high_sin = Storage::round(high * read<Storage>(sin + d, count));
          const Vec<T> high_cos = Storage::round(high * read<Storage>(cos + e, count));
          const Vec<T> low_sin = Storage::round(low * read<Storage>(sin + e, count));
          write<Storage>(out + d, low_cos - high_sin, count);
          write<Storage>(out + e, high_cos + low_sin, count);
        });
      }
    });
  }

 private:
  const CdasRotary& a;
};

}  // namespace CDAS_ISA
