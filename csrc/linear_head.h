// Losses of linear heads for one chunk of rows.
//
//     z = softcap(scale (W h + b)) / T,   p = softmax(z),   q likewise from the target,   d = log q - log p
//     jsd          (1 - beta) KL(p || m) + beta KL(q || m), m = (1 - beta) p + beta q
//                  dloss/dz_v = (1 - beta) p_v (log(p_v / m_v) - KL(p || m))
//     forward_kl   KL(q || p)       dloss/dz_v = p_v - q_v
//     reverse_kl   KL(p || q)       dloss/dz_v = -p_v (d_v + KL(p || q))
//     logprob      log p(label)     dloss/dz_v = [v is the label] - p_v
//
// Three sweeps over the vocabulary, each in parts that the threads take in turn:
// 1. logits     a tile of the head times the panels of both passes; while the tile of logits is in the cache: bias, scale,
//               softcap, temperature, running maximum and sum of exponentials
// 2. loss       the divergence and, where the gradient needs it, KL(p || .)
// 3. gradient   the gradient of a tile of logits, which meets the same tile of the head at once and is never stored whole
// What the parts found is combined in the order of their numbers. How many there are depends on the shapes alone, so that a
// result is the same to the bit whatever the number of threads.
#pragma once

#include <cmath>

#include "convert.h"
#include "gemm.h"
#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace CDAS_ISA {

// Whether the product of these takes pairs of bfloat16, not numbers of the maths.
CDAS_INLINE bool takes_pairs(const CdasMatrix& hidden, const CdasMatrix& weight) {
#ifdef CDAS_AVX512_BF16
  return hidden.dtype == CDAS_BFLOAT16 && weight.dtype == CDAS_BFLOAT16;
#else
  return (void)hidden, (void)weight, false;
#endif
}

template <typename T> constexpr int32_t kMathDtype = sizeof(T) == 8 ? CDAS_FLOAT64 : CDAS_FLOAT32;

// Two rows of bfloat16 (the second may be null) as pairs.
inline void interleave(const CdasMatrix& m, int64_t row, bool second, int64_t first_column, int64_t count, uint32_t* out) {
  const auto* a = static_cast<const uint16_t*>(m.data) + row * m.row_stride + first_column * m.column_stride;
  const auto* b = second ? a + m.row_stride : nullptr;
  if (second && m.column_stride == 1)
    for (int64_t i = 0; i < count; ++i) out[i] = uint32_t(a[i]) | uint32_t(b[i]) << 16;
  else
    for (int64_t i = 0; i < count; ++i)
      out[i] = uint32_t(a[i * m.column_stride]) | (second ? uint32_t(b[i * m.column_stride]) << 16 : 0u);
}

template <typename T> class HeadLoss {
 public:
  static constexpr int L = kLanes<T>;
  static constexpr int kPanelRows = kPanelVectors * L;

  explicit HeadLoss(const CdasHeadLoss& args) : a(args) {
    heads = a.divergence == CDAS_LOGPROB ? 1 : 2;
    const CdasMatrix activations[2] = {a.hidden, a.target_hidden}, weights[2] = {a.weight, a.target_weight};
    const int64_t widths[2] = {a.width, a.target_width};
    panels = (a.rows + kPanelRows - 1) / kPanelRows;
    threads = a.threads > 1 ? a.threads : 1;
    parts = share_of(a.vocabulary, kPartEntries, kMostParts);
    char* next = static_cast<char*>(a.workspace);
    const auto take = [&](int64_t count) {
      T* const p = reinterpret_cast<T*>(next);
      next += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
      return p;
    };
    for (int h = 0; h < heads; ++h) {
      const bool pairs = takes_pairs(activations[h], weights[h]);
      const int64_t depth = pairs ? (widths[h] + 1) / 2 : widths[h];
      head[h] = {activations[h], weights[h], widths[h], depth, pairs,
                 static_cast<const T*>(h ? a.target_bias : a.bias), take(panels * a.vocabulary * kPanelRows),
                 take(panels * depth * kPanelRows)};
    }
    one_sweep = heads == 2 && a.weight.data == a.target_weight.data && head[0].pairs == head[1].pairs;
    partial = take(parts * panels * kPartials * kPanelRows);
    statistics = take(panels * kStatistics * kPanelRows);
    tile = take(parts * kTileSize);
    // The parts' own gradients take at most half as much as the logits.
    gradient_parts = share_of(heads * a.vocabulary, 2 * a.width, parts);
    gradients = a.gradient ? take(gradient_parts * panels * a.width * kPanelRows) : nullptr;
    slopes = a.gradient ? take(gradient_parts * panels * kGradientTile * kPanelRows) : nullptr;
    bytes = next - static_cast<char*>(a.workspace);
  }

  int64_t workspace() const { return bytes; }

  void run() const {
    parallel([&](int64_t part) { pack_activations(part); });
    parallel([&](int64_t part) { make_logits(part); });
    combine_logits();
    switch (a.divergence) {
      case CDAS_JSD: return a.beta == 0.5 ? rest<CDAS_JSD, true>() : rest<CDAS_JSD>();
      case CDAS_FORWARD_KL: return rest<CDAS_FORWARD_KL>();
      case CDAS_REVERSE_KL: return rest<CDAS_REVERSE_KL>();
      default: return rest<CDAS_LOGPROB>();
    }
  }

 private:
  static constexpr int kLogitsTile = 48;      // rows of the head: with 64 lanes 12 KiB of logits
  static constexpr int kDepthBlock = 384;     // steps of a panel at most: with 64 lanes 96 KiB
  static constexpr int kGradientDepth = 96;   // steps of a tile of gradients of logits: with 64 lanes 24 KiB
  static constexpr int kWidthBlock = 512;     // columns of the head: with 96 steps 192 KiB
  static constexpr int64_t kPartEntries = 2048;  // of the vocabulary, at least, in a part
  static constexpr int64_t kMostParts = 64;
  static constexpr int kGradientTile = 2 * kGradientDepth;
  static constexpr int64_t kTileSize = kGradientDepth * kWidthBlock;  // the larger of the two kinds of tile of the head
  static_assert(kTileSize >= kLogitsTile * kDepthBlock);
  static constexpr T kFloor = T(-1e30);  // stands for log 0 where a bias forbids an entry: differences stay finite

  // How many shares of `size` there are in `count`, at least 1 and at most `most`.
  static int64_t share_of(int64_t count, int64_t size, int64_t most) {
    const int64_t shares = count / size;
    return shares < 1 ? 1 : shares < most ? shares : most;
  }

  struct Head {
    CdasMatrix hidden, weight;
    int64_t width, depth;
    bool pairs;
    const T* bias;
    T* logits;   // {panels, V, panel's rows}
    T* operand;  // {panels, depth, panel's rows}
  };
  // What a part finds for a row: maximum and sum of exponentials of each head; after that loss and KL(p || .).
  enum { kMax = 0, kSum = 1, kPartials = 4 };
  enum { kLoss = 0, kKL = 1 };
  // What all parts need of a row: maximum and logarithm of the sum, of each head; KL(p || .).
  enum { kLogSum = 1, kRowKL = 4, kStatistics = 5 };

  template <typename Body> void parallel(const Body& body) const { cdas::parallel(parts, threads, body); }

  // Calls body(panel, number of vectors as a constant): a last panel of few rows has fewer.
  template <typename Body> CDAS_INLINE void for_panels(const Body& body) const {
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t rows = a.rows - panel * kPanelRows;
      if (kPanelVectors >= 4 && rows > 3 * L)
        body(panel, Constant<kPanelVectors>{});
      else if (kPanelVectors >= 4 && rows > 2 * L)
        body(panel, Constant<kPanelVectors >= 4 ? 3 : 2>{});
      else if (rows > L)
        body(panel, Constant<2>{});
      else
        body(panel, Constant<1>{});
    }
  }
  template <int N> struct Constant {
    static constexpr int value = N;
  };
  int64_t panel_rows(int64_t panel) const {
    const int64_t rows = a.rows - panel * kPanelRows;
    return rows < kPanelRows ? (rows + L - 1) / L * L : kPanelRows;
  }
  T* of_part(int64_t part, int64_t panel, int which) const {
    return partial + ((part * panels + panel) * kPartials + which) * kPanelRows;
  }
  T* of_panel(int64_t panel, int which) const { return statistics + (panel * kStatistics + which) * kPanelRows; }

  // ---- activations

  void pack_activations(int64_t part) const {
    for (int h = 0; h < heads; ++h) {
      const Head& m = head[h];
      const cdas::Range range = cdas::share(a.rows, part, parts);
      for (int64_t row = range.begin; row < range.end; ++row) pack_row(m, row);
      if (part == 0)  // the lanes beyond the last row
        for (int64_t row = a.rows; row < (panels - 1) * kPanelRows + panel_rows(panels - 1); ++row) pack_row(m, row);
    }
  }
  void pack_row(const Head& m, int64_t row) const {
    const int64_t panel = row / kPanelRows, stride = panel_rows(panel);
    T* const out = m.operand + panel * m.depth * kPanelRows + row % kPanelRows;
    for (int64_t k = 0; k < m.depth; ++k) {
      if (row >= a.rows) {
        out[k * stride] = T(0);
        continue;
      }
      const int64_t at = row * m.hidden.row_stride + k * (m.pairs ? 2 : 1) * m.hidden.column_stride;
      if (m.pairs) {
        const auto* x = static_cast<const uint16_t*>(m.hidden.data) + at;
        const uint32_t second = 2 * k + 1 < m.width ? uint32_t(x[m.hidden.column_stride]) << 16 : 0u;
        out[k * stride] = bit_cast<float>(uint32_t(x[0]) | second);
      } else {
        out[k * stride] = element<T>(m.hidden.data, at, m.hidden.dtype);
      }
    }
  }

  // ---- logits

  void make_logits(int64_t part) const {
    for_panels([&](int64_t panel, auto) {
      for (int h = 0; h < heads; ++h)
        for (int i = 0; i < kPanelRows; ++i) {
          of_part(part, panel, 2 * h + kMax)[i] = kFloor;
          of_part(part, panel, 2 * h + kSum)[i] = T(0);
        }
    });
    for (int h = 0; h < (one_sweep ? 1 : heads); ++h) {
#ifdef CDAS_AVX512_BF16
      if constexpr (sizeof(T) == 4)
        if (head[h].pairs) {
          logits_of<Bfloat16Pairs>(part, h, one_sweep ? 2 : h + 1);
          continue;
        }
#endif
      logits_of<MultiplyAdd<T>>(part, h, one_sweep ? 2 : h + 1);
    }
  }

  // The logits of the heads first to last - 1, which have the same weights.
  template <typename Product> void logits_of(int64_t part, int first, int last) const {
    const Head& m = head[first];
    const int64_t blocks = (m.depth + kDepthBlock - 1) / kDepthBlock, block = (m.depth + blocks - 1) / blocks;
    const cdas::Range range = cdas::share(a.vocabulary, part, parts, kLogitsTile);
    for (int64_t v = range.begin; v < range.end; v += kLogitsTile) {
      const int64_t count = range.end - v < kLogitsTile ? range.end - v : kLogitsTile;
      for (int64_t k = 0; k < m.depth; k += block) {
        const int64_t depth = m.depth - k < block ? m.depth - k : block;
        const auto head_tile = rows_of_head<Product>(part, m, v, count, k, depth);
        Ahead ahead = next_block(m.weight, m.width, v, k * Product::kDepth, kLogitsTile, block * Product::kDepth, range.end);
        const int64_t lines = ahead.lines() / ((last - first) * panels * (count / kTileRows) + 1) + 1;
        for (int h = first; h < last; ++h)
          for_panels([&](int64_t panel, auto vectors) {
            constexpr int kLine = decltype(vectors)::value * L;
            product<Product, decltype(vectors)::value>(
                count, depth, head_tile.data, head_tile.stride, 1, head[h].operand + panel * m.depth * kPanelRows + k * kLine,
                head[h].logits + panel * a.vocabulary * kPanelRows + v * kLine, k > 0, ahead, lines);
          });
      }
      for (int h = first; h < last; ++h)
        for_panels([&](int64_t panel, auto vectors) { finish_logits<decltype(vectors)::value>(part, panel, h, v, count); });
    }
  }

  template <typename Element> struct Tile {
    const Element* data;
    int64_t stride;
  };
  // Rows v, v + 1, ... of the head, columns from the k-th step on: as they lie in memory, or converted.
  template <typename Product>
  Tile<typename Product::Element> rows_of_head(int64_t part, const Head& m, int64_t v, int64_t count, int64_t k,
                                               int64_t depth) const {
    using Element = typename Product::Element;
    const CdasMatrix& w = m.weight;
    if constexpr (Product::kDepth == 2) {
      const auto* data = static_cast<const uint16_t*>(w.data);
      if (w.column_stride == 1 && w.row_stride % 2 == 0 && m.width % 2 == 0)
        return {reinterpret_cast<const Element*>(data + v * w.row_stride + 2 * k), w.row_stride / 2};
      auto* out = reinterpret_cast<Element*>(tile + part * kTileSize);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < depth; ++j) {
          const auto* x = data + (v + i) * w.row_stride + 2 * (k + j) * w.column_stride;
          out[i * depth + j] = x[0] | (2 * (k + j) + 1 < m.width ? uint32_t(x[w.column_stride]) << 16 : 0u);
        }
      return {out, depth};
    } else {
      if (w.dtype == kMathDtype<T> && w.column_stride == 1)
        return {static_cast<const T*>(w.data) + v * w.row_stride + k, w.row_stride};
      T* const out = tile + part * kTileSize;
      for (int64_t i = 0; i < count; ++i)
        read_row(w.data, (v + i) * w.row_stride + k * w.column_stride, w.column_stride, depth, w.dtype, out + i * depth);
      return {out, depth};
    }
  }

  // The block of a head that follows the one at row v and column d, blocks of rows by columns in [v, end) by [0, width).
  static Ahead next_block(const CdasMatrix& w, int64_t width, int64_t v, int64_t d, int64_t rows, int64_t columns, int64_t end) {
    const int64_t bytes = w.dtype == CDAS_FLOAT64 ? 8 : w.dtype == CDAS_FLOAT32 ? 4 : 2;
    d += columns;
    if (d >= width) {
      d = 0;
      v += rows;
    }
    if (v >= end || w.column_stride != 1) return {};
    if (columns > width - d) columns = width - d;
    return {static_cast<const char*>(w.data) + (v * w.row_stride + d) * bytes, end - v < rows ? end - v : rows,
            w.row_stride * bytes, columns * bytes};
  }

  template <int VECTORS> void finish_logits(int64_t part, int64_t panel, int h, int64_t v, int64_t count) const {
    constexpr int kLine = VECTORS * L;
    T* const z = head[h].logits + panel * a.vocabulary * kPanelRows + v * kLine;
    const T* const bias = head[h].bias ? head[h].bias + v : nullptr;
    if (bias || a.scale != 1 || a.softcap > 0 || a.temperature != 1) {
      const T scale = T(a.scale), cap = T(a.softcap), over_cap = T(1 / a.softcap), over_t = T(1 / a.temperature);
      for (int64_t i = 0; i < count; ++i)
        for (int j = 0; j < VECTORS; ++j) {
          Vec<T> x = load(z + i * kLine + j * L);
          if (bias) x = greater_of(broadcast<T>(kFloor), x + bias[i]);
          x *= scale;
          if (a.softcap > 0) x = cap * tanh_of<T>(x * over_cap);
          store(z + i * kLine + j * L, x * over_t);
        }
    }
    Vec<T> before[VECTORS], most[VECTORS], sum[VECTORS];
    T* const max_found = of_part(part, panel, 2 * h + kMax);
    T* const sum_found = of_part(part, panel, 2 * h + kSum);
    for (int j = 0; j < VECTORS; ++j) most[j] = before[j] = load(max_found + j * L);
    for (int64_t i = 0; i < count; ++i)
      for (int j = 0; j < VECTORS; ++j) most[j] = greater_of(load(z + i * kLine + j * L), most[j]);
    for (int j = 0; j < VECTORS; ++j) sum[j] = Vec<T>{};
    for (int64_t i = 0; i < count; ++i)
      for (int j = 0; j < VECTORS; ++j) sum[j] += exp_nonpositive<T>(load(z + i * kLine + j * L) - most[j]);
    for (int j = 0; j < VECTORS; ++j) {
      store(sum_found + j * L, load(sum_found + j * L) * exp_nonpositive<T>(before[j] - most[j]) + sum[j]);
      store(max_found + j * L, most[j]);
    }
  }

  void combine_logits() const {
    for (int64_t row = 0; row < a.rows; ++row) {
      const int64_t panel = row / kPanelRows, lane = row % kPanelRows;
      for (int h = 0; h < heads; ++h) {
        double most = double(kFloor), sum = 0;
        for (int64_t part = 0; part < parts; ++part) {
          const double found = double(of_part(part, panel, 2 * h + kMax)[lane]);
          if (found > most) most = found;
        }
        for (int64_t part = 0; part < parts; ++part)
          sum += double(of_part(part, panel, 2 * h + kSum)[lane]) *
                 std::exp(double(of_part(part, panel, 2 * h + kMax)[lane]) - most);
        of_panel(panel, 2 * h + kMax)[lane] = T(most);
        of_panel(panel, 2 * h + kLogSum)[lane] = T(std::log(sum));
      }
      if (a.divergence == CDAS_LOGPROB) {
        const int64_t label = a.labels[row];
        const T* const z = head[0].logits + panel * a.vocabulary * kPanelRows + label * panel_rows(panel) + lane;
        T result = label < 0 ? T(0) : (*z - of_panel(panel, kMax)[lane]) - of_panel(panel, kLogSum)[lane];
        if (result < kFloor / 2) result = T(-HUGE_VAL);
        static_cast<T*>(a.loss)[row] = result;
      }
    }
    for (int64_t row = a.rows; row < panels * kPanelRows; ++row)  // lanes without a row stay finite
      for (int i = 0; i < kStatistics; ++i) of_panel(row / kPanelRows, i)[row % kPanelRows] = T(0);
  }

  // ---- loss

  template <CdasDivergence KIND, bool HALF = false> void rest() const {
    constexpr bool kLossFirst = KIND == CDAS_JSD || KIND == CDAS_REVERSE_KL;
    if constexpr (KIND != CDAS_LOGPROB)
      if (kLossFirst || !a.gradient) {
        parallel([&](int64_t part) { make_loss<KIND, HALF>(part); });
        combine_loss<KIND>(parts);
      }
    if (!a.gradient) return;
    cdas::parallel(gradient_parts, threads, [&](int64_t part) { make_gradient<KIND, HALF>(part); });
    if (KIND == CDAS_FORWARD_KL) combine_loss<KIND>(gradient_parts);
    parallel([&](int64_t part) { write_gradient(part); });
  }

  struct Row {
    Vec<T> max_p, log_sum_p, max_q, log_sum_q, kl;
  };
  Row row_of(int64_t panel, int j) const {
    return {load(of_panel(panel, kMax) + j * L), load(of_panel(panel, kLogSum) + j * L),
            load(of_panel(panel, 2 + kMax) + j * L), load(of_panel(panel, 2 + kLogSum) + j * L),
            load(of_panel(panel, kRowKL) + j * L)};
  }
  // Both probabilities and the mixture m, from the larger probability and the distance of the logarithms: nowhere is a
  // difference of nearly equal numbers taken. HALF: beta is 1/2.
  struct Mixture {
    Vec<T> larger, smaller, log_m_over_larger, log_m_over_smaller;
    Ints<T> q_larger;
  };
  template <bool HALF> static CDAS_INLINE Mixture mixture(Vec<T> log_p, Vec<T> log_q, T rest, T beta) {
    const Vec<T> d = log_q - log_p, distance = absolute<T>(d);
    const Vec<T> larger = exp_nonpositive<T>(greater_of(log_p, log_q));
    const Expm1<T> e = expm1_nonpositive<T>(-distance);  // of smaller / larger
    Mixture m;
    m.larger = larger;
    m.smaller = larger * e.minus_one + larger;
    m.q_larger = d > T(0);
    if constexpr (HALF) {
      m.log_m_over_larger = log1p_of_half(e.minus_one);
    } else {
      const Vec<T> of_p = broadcast<T>(rest), of_q = broadcast<T>(beta);
      const Vec<T> of_larger = m.q_larger ? of_q : of_p, of_smaller = m.q_larger ? of_p : of_q;
      m.log_m_over_larger = log1p_nonpositive(of_smaller * e.minus_one, of_smaller * e.whole + of_larger);
    }
    m.log_m_over_smaller = m.log_m_over_larger + distance;
    return m;
  }

  // x log(x / y) - x + y, whose sum is KL(x || y): the last two cancel in it, and with them what a rounding error of the
  // normalisation would have added.
  static CDAS_INLINE Vec<T> relative_entropy(Vec<T> x, Vec<T> y, Vec<T> log_ratio) { return x * (log_ratio - T(1)) + y; }

  template <CdasDivergence KIND, bool HALF> void make_loss(int64_t part) const {
    const cdas::Range range = cdas::share(a.vocabulary, part, parts, kGradientTile);
    const T beta = T(a.beta), rest = T(1 - a.beta);
    for_panels([&](int64_t panel, auto vectors) {
      constexpr int kLine = decltype(vectors)::value * L;
      const T* const zp = head[0].logits + panel * a.vocabulary * kPanelRows;
      const T* const zq = head[1].logits + panel * a.vocabulary * kPanelRows;
      for (int j = 0; j < kLine / L; ++j) {
        store(of_part(part, panel, kLoss) + j * L, Vec<T>{});
        store(of_part(part, panel, kKL) + j * L, Vec<T>{});
      }
      for (int64_t begin = range.begin; begin < range.end; begin += kGradientTile) {
        const int64_t end = range.end - begin < kGradientTile ? range.end : begin + kGradientTile;
        for (int j = 0; j < kLine / L; ++j) {
          const Row row = row_of(panel, j);
          Vec<T> loss = {}, kl = {};
          for (int64_t v = begin; v < end; ++v) {
            // Every fourth line is no pattern that the processor would see to by itself.
            prefetch(zp + v * kLine + j * L, kGradientTile * kLine);
            prefetch(zq + v * kLine + j * L, kGradientTile * kLine);
            const Vec<T> log_p = load(zp + v * kLine + j * L) - row.max_p - row.log_sum_p;
            const Vec<T> log_q = load(zq + v * kLine + j * L) - row.max_q - row.log_sum_q;
            if constexpr (KIND == CDAS_JSD) {
              const Mixture m = mixture<HALF>(log_p, log_q, rest, beta);
              const Vec<T> of_larger = m.larger * m.log_m_over_larger, of_smaller = m.smaller * m.log_m_over_smaller;
              const Vec<T> of_p = m.q_larger ? of_smaller : of_larger;
              kl -= of_p;
              if constexpr (HALF)
                loss -= T(0.5) * (of_larger + of_smaller);
              else
                loss -= rest * of_p + beta * (m.q_larger ? of_larger : of_smaller);
            } else if constexpr (KIND == CDAS_FORWARD_KL) {
              loss += relative_entropy(exp_nonpositive<T>(log_q), exp_nonpositive<T>(log_p), log_q - log_p);
            } else {
              const Vec<T> p = exp_nonpositive<T>(log_p), log_ratio = log_p - log_q;
              kl += p * log_ratio;
              loss += relative_entropy(p, exp_nonpositive<T>(log_q), log_ratio);
            }
          }
          T* const loss_found = of_part(part, panel, kLoss) + j * L;
          T* const kl_found = of_part(part, panel, kKL) + j * L;
          store(loss_found, load(loss_found) + loss);
          store(kl_found, load(kl_found) + kl);
        }
      }
    });
  }

  template <CdasDivergence KIND> void combine_loss(int64_t count) const {
    for (int64_t row = 0; row < a.rows; ++row) {
      const int64_t panel = row / kPanelRows, lane = row % kPanelRows;
      double loss = 0, kl = 0;
      for (int64_t part = 0; part < count; ++part) {
        loss += double(of_part(part, panel, kLoss)[lane]);
        kl += double(of_part(part, panel, kKL)[lane]);
      }
      if (loss < 0) loss = 0;
      // A difference of 1e30 stands for an infinite one, which no mixture meets.
      if (KIND != CDAS_JSD && loss > 1e20) loss = HUGE_VAL;
      static_cast<T*>(a.loss)[row] = T(loss);
      of_panel(panel, kRowKL)[lane] = T(kl);
    }
  }

  // ---- gradient

  template <CdasDivergence KIND, bool HALF> void make_gradient(int64_t part) const {
    if (KIND == CDAS_FORWARD_KL) std::memset(of_part(part, 0, 0), 0, panels * kPartials * kPanelRows * sizeof(T));
#ifdef CDAS_AVX512_BF16
    if constexpr (sizeof(T) == 4)
      if (head[0].pairs) return gradient_of<KIND, HALF, Bfloat16Pairs>(part);
#endif
    gradient_of<KIND, HALF, MultiplyAdd<T>>(part);
  }

  template <CdasDivergence KIND, bool HALF, typename Product> void gradient_of(int64_t part) const {
    constexpr int kStep = Product::kDepth, kRows = kGradientDepth * kStep;
    const cdas::Range range = cdas::share(a.vocabulary, part, gradient_parts, kRows);
    T* const slope = slopes + part * panels * kGradientTile * kPanelRows;
    T* const sums = gradients + part * panels * a.width * kPanelRows;
    if (range.begin == range.end) std::memset(sums, 0, panels * a.width * kPanelRows * sizeof(T));
    for (int64_t v = range.begin; v < range.end; v += kRows) {
      const int64_t count = range.end - v < kRows ? range.end - v : kRows, depth = (count + kStep - 1) / kStep;
      for_panels([&](int64_t panel, auto vectors) {
        make_slopes<KIND, HALF, kStep, decltype(vectors)::value>(part, panel, v, count, slope + panel * kRows / kStep * kPanelRows);
      });
      for (int64_t d = 0; d < a.width; d += kWidthBlock) {
        const int64_t width = a.width - d < kWidthBlock ? a.width - d : kWidthBlock;
        const auto head_tile = columns_of_head<Product>(part, v, count, d, width);
        Ahead ahead = next_block(a.weight, a.width, v, d, kRows, kWidthBlock, range.end);
        const int64_t lines = ahead.lines() / (panels * (width / kTileRows) + 1) + 1;
        for_panels([&](int64_t panel, auto vectors) {
          constexpr int kLine = decltype(vectors)::value * L;
          product<Product, decltype(vectors)::value>(width, depth, head_tile.data, 1, head_tile.stride,
                                                     slope + panel * kRows / kStep * kPanelRows,
                                                     sums + panel * a.width * kPanelRows + d * kLine, v > range.begin, ahead, lines);
        });
      }
    }
  }

  // Columns d, d + 1, ... of the rows v, v + 1, ... of the head: {steps, columns}.
  template <typename Product>
  Tile<typename Product::Element> columns_of_head(int64_t part, int64_t v, int64_t count, int64_t d, int64_t width) const {
    const CdasMatrix& w = a.weight;
    if constexpr (Product::kDepth == 2) {
      auto* const out = reinterpret_cast<uint32_t*>(tile + part * kTileSize);
      for (int64_t i = 0; i < count; i += 2) interleave(w, v + i, i + 1 < count, d, width, out + i / 2 * width);
      return {reinterpret_cast<const typename Product::Element*>(out), width};
    } else {
      if (w.dtype == kMathDtype<T> && w.column_stride == 1)
        return {static_cast<const T*>(w.data) + v * w.row_stride + d, w.row_stride};
      T* const out = tile + part * kTileSize;
      for (int64_t i = 0; i < count; ++i)
        read_row(w.data, (v + i) * w.row_stride + d * w.column_stride, w.column_stride, width, w.dtype, out + i * width);
      return {out, width};
    }
  }

  // dloss/dz, times the slope of the cap, of `count` entries of the vocabulary, in the form of a product's panel.
  template <CdasDivergence KIND, bool HALF, int STEP, int VECTORS>
  void make_slopes(int64_t part, int64_t panel, int64_t first, int64_t count, T* out) const {
    constexpr int kLine = VECTORS * L;
    const T beta = T(a.beta), rest = T(1 - a.beta), over_cap = T(a.softcap > 0 ? a.temperature / a.softcap : 0);
    const T* const zp = head[0].logits + (panel * a.vocabulary * kPanelRows + first * kLine);
    const T* const zq = heads == 2 ? head[1].logits + (panel * a.vocabulary * kPanelRows + first * kLine) : nullptr;
    for (int j = 0; j < VECTORS; ++j) {
      const Row row = row_of(panel, j);
      Vec<T> loss = {};
      const auto at = [&](int64_t i) __attribute__((always_inline)) {
        prefetch(zp + i * kLine + j * L, kGradientTile * kLine);
        if (heads == 2) prefetch(zq + i * kLine + j * L, kGradientTile * kLine);
        const Vec<T> z = load(zp + i * kLine + j * L);
        const Vec<T> log_p = z - row.max_p - row.log_sum_p;
        Vec<T> g;
        if constexpr (KIND == CDAS_LOGPROB) {
          g = -exp_nonpositive<T>(log_p);
        } else {
          const Vec<T> log_q = load(zq + i * kLine + j * L) - row.max_q - row.log_sum_q;
          if constexpr (KIND == CDAS_JSD) {
            const Mixture m = mixture<HALF>(log_p, log_q, rest, beta);
            const Vec<T> log_m_over_p = m.q_larger ? m.log_m_over_smaller : m.log_m_over_larger;
            g = -rest * (m.q_larger ? m.smaller : m.larger) * (log_m_over_p + row.kl);
          } else if constexpr (KIND == CDAS_FORWARD_KL) {
            const Vec<T> p = exp_nonpositive<T>(log_p), q = exp_nonpositive<T>(log_q);
            g = p - q;
            loss += relative_entropy(q, p, log_q - log_p);
          } else {
            g = exp_nonpositive<T>(log_p) * (log_p - log_q - row.kl);
          }
        }
        const Vec<T> capped = z * over_cap;
        return a.softcap > 0 ? g - g * capped * capped : g;
      };
      if constexpr (STEP == 1) {
        for (int64_t i = 0; i < count; ++i) store(out + i * kLine + j * L, at(i));
      } else {
        for (int64_t i = 0; i < count; i += 2)
          store(out + i / 2 * kLine + j * L, to_pairs(at(i), i + 1 < count ? at(i + 1) : Vec<T>{}));
      }
      if (KIND == CDAS_FORWARD_KL) {
        T* const found = of_part(part, panel, kLoss) + j * L;
        store(found, load(found) + loss);
      }
    }
    if (KIND == CDAS_LOGPROB) finish_labels<STEP>(panel, first, count, kLine, out);
  }

  // [v is the label] - p_v for the labels among these entries, and 0 for the rows that are ignored.
  template <int STEP> void finish_labels(int64_t panel, int64_t first, int64_t count, int64_t line, T* out) const {
    for (int64_t row = panel * kPanelRows; row < a.rows && row < (panel + 1) * kPanelRows; ++row) {
      const int64_t lane = row % kPanelRows, label = a.labels[row], i = label - first;
      if (label < 0) {
        for (int64_t k = 0; k < (count + STEP - 1) / STEP; ++k) out[k * line + lane] = T(0);
      } else if (i >= 0 && i < count) {
        const T z = head[0].logits[panel * a.vocabulary * kPanelRows + label * line + lane];
        const T log_p = z - of_panel(panel, kMax)[lane] - of_panel(panel, kLogSum)[lane];
        const T capped = a.softcap > 0 ? z * T(a.temperature / a.softcap) : T(0);
        const T g = -T(std::expm1(double(log_p))) * (1 - capped * capped);
        if constexpr (STEP == 1) {
          out[i * line + lane] = g;
        } else {
          const uint16_t half = float_to_bfloat16(float(g));
          std::memcpy(reinterpret_cast<char*>(out + i / 2 * line + lane) + i % 2 * 2, &half, 2);
        }
      }
    }
  }

  void write_gradient(int64_t part) const {
    constexpr int kColumns = 16;
    const T factor = T(a.scale / a.temperature);
    const cdas::Range range = cdas::share(a.width, part, parts, kColumns);
    T block[kColumns][kPanelRows], line[kColumns];
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t lanes = panel_rows(panel);
      for (int64_t d = range.begin; d < range.end; d += kColumns) {
        const int64_t count = range.end - d < kColumns ? range.end - d : kColumns;
        for (int64_t other = 0; other < gradient_parts; ++other) {
          const T* const found = gradients + (other * panels + panel) * a.width * kPanelRows + d * lanes;
          for (int64_t i = 0; i < count; ++i)
            for (int64_t lane = 0; lane < lanes; lane += L) {
              const Vec<T> before = other ? load(&block[i][lane]) : Vec<T>{};
              store(&block[i][lane], before + load(found + i * lanes + lane));
            }
        }
        for (int64_t row = panel * kPanelRows; row < a.rows && row < (panel + 1) * kPanelRows; ++row) {
          for (int64_t i = 0; i < count; ++i) line[i] = block[i][row % kPanelRows] * factor;
          write_row(line, count, a.gradient_dtype, a.gradient, row * a.width + d);
        }
      }
    }
  }

  const CdasHeadLoss& a;
  int heads;
  bool one_sweep;  // both heads are one: its rows are read once for both
  int64_t panels, threads, parts, gradient_parts, bytes;
  Head head[2] = {};
  T *partial, *statistics, *gradients, *tile, *slopes;
};

}  // namespace CDAS_ISA
