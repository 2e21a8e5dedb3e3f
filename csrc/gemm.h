// Matrix products of a few rows of activations with a large head, in the layout that the losses want.
//
// The lanes of a vector are rows of activations, so that everything done to the logits afterwards is done lane by lane:
//   panel   some rows of activations, transposed: element (k, row) at [k * rows + row]
//   head    the weights as they lie in memory where that is possible: an element is broadcast, and nothing is packed
// Both products of a loss are   tile(i, row) += sum_k a(i, k) panel(k, row):
//   logits   i runs over the vocabulary, k over the width       gradient   i runs over the width, k over the vocabulary
#pragma once

#include "simd.h"

namespace CDAS_ISA {

// How an element of the broadcast operand meets a vector of the panel.
template <typename T> struct MultiplyAdd {
  using Number = T;   // of the sums
  using Element = T;  // of both operands
  static constexpr int kDepth = 1;
  static CDAS_INLINE Vec<T> spread(Element a) { return broadcast<T>(a); }
  static CDAS_INLINE Vec<T> add(Vec<T> sum, Vec<T> a, Vec<T> b) { return a * b + sum; }
};

#ifdef CDAS_AVX512_BF16
// An element is a pair of bfloat16, neighbours in k; products and sums are float32.
struct Bfloat16Pairs {
  using Number = float;
  typedef uint32_t Element __attribute__((aligned(2), may_alias));
  static constexpr int kDepth = 2;
  static CDAS_INLINE Vec<float> spread(Element a) { return (Vec<float>)_mm512_set1_epi32(int(a)); }
  static CDAS_INLINE Vec<float> add(Vec<float> sum, Vec<float> a, Vec<float> b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

#if defined(CDAS_AVX512) || defined(__aarch64__)
constexpr int kPanelVectors = 4;  // 32 registers: 6 x 4 sums, 4 of the panel, 1 of the head
#else
constexpr int kPanelVectors = 2;  // 16 registers: 6 x 2 sums, 2 of the panel, 1 of the head
#endif
constexpr int kTileRows = 6;

// tile[i][row] = (accumulate ? tile[i][row] : 0) + sum_k a[i * stride_i + k * stride_k] panel[k][row], i < ROWS.
// The sum over k is made on its own and then added: long sums are sums of sums, whose rounding errors stay small.
template <typename Product, int ROWS, int VECTORS>
inline void tile_product(int64_t depth, const typename Product::Element* a, int64_t stride_i, int64_t stride_k,
                         const typename Product::Number* panel, typename Product::Number* tile, bool accumulate) {
  using T = typename Product::Number;
  constexpr int L = kLanes<T>;
  Vec<T> sum[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) sum[i][j] = Vec<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> b[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) b[j] = load(panel + j * L);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const Vec<T> x = Product::spread(a[i * stride_i]);
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) sum[i][j] = Product::add(sum[i][j], x, b[j]);
    }
    a += stride_k;
    panel += VECTORS * L;
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) {
      T* const out = tile + (i * VECTORS + j) * L;
      store(out, accumulate ? load(out) + sum[i][j] : sum[i][j]);
    }
}

// Brings rows of a matrix into the second level of the cache, some lines at a time, while something else is computed.
struct Ahead {
  const char* data;
  int64_t rows, row_stride, row_bytes;
  int64_t row = 0, at = 0;
  int64_t lines() const { return rows * ((row_bytes + 63) / 64); }
  CDAS_INLINE void fetch(int64_t count) {
    for (; count > 0 && row < rows; --count) {
      __builtin_prefetch(data + row * row_stride + at, 0, 2);
      at += 64;
      if (at >= row_bytes) {
        at = 0;
        ++row;
      }
    }
  }
};

// The same for any number of rows; tile is {rows, VECTORS * lanes}. Fetches `lines` lines ahead for every tile.
template <typename Product, int VECTORS>
inline void product(int64_t rows, int64_t depth, const typename Product::Element* a, int64_t stride_i, int64_t stride_k,
                    const typename Product::Number* panel, typename Product::Number* tile, bool accumulate, Ahead& ahead,
                    int64_t lines) {
  constexpr int kLine = VECTORS * kLanes<typename Product::Number>;
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows) {
    ahead.fetch(lines);
    tile_product<Product, kTileRows, VECTORS>(depth, a + i * stride_i, stride_i, stride_k, panel, tile + i * kLine,
                                              accumulate);
  }
  for (; i < rows; ++i)
    tile_product<Product, 1, VECTORS>(depth, a + i * stride_i, stride_i, stride_k, panel, tile + i * kLine, accumulate);
}

}  // namespace CDAS_ISA
