// Causal attention over rows that are packed one behind the other, all of which begin with the same prefix.
//
//     s_ij = softcap(scale q_i . k_j)    for the keys j of the prefix and those of the own row up to i, within the window
//     out_i = sum_j softmax_j(s_i)_j v_j
//     backward, with p = softmax(s), g = dout:  dv_j = sum_i p_ij g_i,   dp_ij = g_i . v_j,
//     ds_ij = p_ij (dp_ij - sum_k p_ik dp_ik),   dq_i = scale sum_j ds_ij k_j,   dk_j = scale sum_i ds_ij q_i
//
// The prefix gets no gradient. A part is one row and one head of keys with the heads of queries that share it; what it computes
// it writes alone. Scores lie as {keys, queries}, a vector across queries: sums over keys are additions of vectors.
#pragma once

#include <cmath>

#include "convert.h"
#include "gemm.h"
#include "kernels.h"
#include "parallel.h"
#include "simd.h"
#include "storage.h"

namespace CDAS_ISA {

template <typename Storage> class PackedAttention {
  using T = typename Storage::Math;
  using S = typename Storage::Stored;
  static constexpr int L = kLanes<T>;
  static constexpr int kBlock = kPanelVectors * L;  // queries, or columns of a head, that are done at once
  static constexpr T kFloor = T(-1e30);

 public:
  explicit PackedAttention(const CdasPackedAttention& args) : a(args) {
    threads = a.threads > 1 ? a.threads : 1;
    for (int64_t row = 0; row < a.rows; ++row) longest = greater(longest, a.starts[row + 1] - a.starts[row]);
    const int64_t keys = a.prefix + longest, width = padded(a.width), value_width = padded(a.value_width);
    const bool backward = a.grad_out.data != nullptr;
    int64_t count = 0;
    const auto take = [&](int64_t& at, int64_t numbers) {
      at = count;
      count += padded(numbers);
    };
    take(at.key, keys * width);
    take(at.value, keys * value_width);
    take(at.query, kBlock * width);
    take(at.query_columns, kBlock * width);
    take(at.scores, keys * kBlock);
    take(at.result, kBlock * greater(width, value_width));
    if (backward) {
      take(at.grad_out, kBlock * value_width);
      take(at.grad_out_columns, kBlock * value_width);
      take(at.grad_scores, keys * kBlock);
      take(at.grad_key, longest * width);
      take(at.grad_value, longest * value_width);
    }
    numbers = count;
  }

  int64_t workspace() const { return threads * numbers * int64_t(sizeof(T)); }

  void forward() const {
    cdas::parallel_in_slots(a.rows * a.groups, threads, [&](int64_t part, int64_t slot) {
      const Unit unit(*this, part, slot);
      for (int64_t head = unit.first_head; head < unit.last_head; ++head)
        for (int64_t query = 0; query < unit.count; query += kBlock)
          with_vectors(less(unit.count - query, kBlock), [&](auto vectors) {
            unit.template forward<decltype(vectors)::value>(head, query);
          });
    });
  }

  void backward() const {
    cdas::parallel_in_slots(a.rows * a.groups, threads, [&](int64_t part, int64_t slot) {
      const Unit unit(*this, part, slot);
      std::memset(unit.grad_key, 0, longest * padded(a.width) * sizeof(T));
      std::memset(unit.grad_value, 0, longest * padded(a.value_width) * sizeof(T));
      for (int64_t head = unit.first_head; head < unit.last_head; ++head)
        for (int64_t query = 0; query < unit.count; query += kBlock)
          with_vectors(less(unit.count - query, kBlock), [&](auto vectors) {
            unit.template backward<decltype(vectors)::value>(head, query);
          });
      unit.write_grads();
    });
  }

 private:
  template <int N> struct Constant {
    static constexpr int value = N;
  };
  static int64_t greater(int64_t x, int64_t y) { return x > y ? x : y; }
  static int64_t less(int64_t x, int64_t y) { return x < y ? x : y; }
  static int64_t padded(int64_t count) { return (count + L - 1) / L * L; }

  // Calls body(how many vectors hold `count` numbers, as a constant), which are at most a block.
  template <typename Body> static CDAS_INLINE void with_vectors(int64_t count, const Body& body) {
    if (kPanelVectors >= 4 && count > 3 * L)
      body(Constant<kPanelVectors>{});
    else if (kPanelVectors >= 4 && count > 2 * L)
      body(Constant<kPanelVectors >= 4 ? 3 : 2>{});
    else if (count > L)
      body(Constant<2>{});
    else
      body(Constant<1>{});
  }

  // Rows of a head are kept as panels: the first block of columns of all rows, then the next. Calls body(first column, vectors).
  template <typename Body> static CDAS_INLINE void for_panels(int64_t width, const Body& body) {
    for (int64_t column = 0; column < width; column += kBlock)
      with_vectors(less(width - column, kBlock), [&](auto vectors) { body(column, vectors); });
  }

  struct Offsets {
    int64_t key, value, query, query_columns, scores, result, grad_out, grad_out_columns, grad_scores, grad_key, grad_value;
  };

  struct Unit {
    const PackedAttention& p;
    const CdasPackedAttention& a;
    int64_t row, group, first, count, first_head, last_head;
    T *key, *value, *query, *query_columns, *scores, *result;
    T *grad_out, *grad_out_columns, *grad_scores, *grad_key, *grad_value;

    Unit(const PackedAttention& of, int64_t part, int64_t slot) : p(of), a(of.a) {
      row = part / a.groups;
      group = part % a.groups;
      first = a.starts[row];
      count = a.starts[row + 1] - first;
      first_head = group * (a.heads / a.groups);
      last_head = first_head + a.heads / a.groups;
      T* const base = static_cast<T*>(a.workspace) + slot * p.numbers;
      key = base + p.at.key;
      value = base + p.at.value;
      query = base + p.at.query;
      query_columns = base + p.at.query_columns;
      scores = base + p.at.scores;
      result = base + p.at.result;
      grad_out = base + p.at.grad_out;
      grad_out_columns = base + p.at.grad_out_columns;
      grad_scores = base + p.at.grad_scores;
      grad_key = base + p.at.grad_key;
      grad_value = base + p.at.grad_value;
      const int64_t keys = a.prefix + count;
      read_tokens(a.prefix_key, 0, group, a.prefix, a.width, T(1), key, keys);
      read_tokens(a.key, first, group, count, a.width, T(1), key, keys, a.prefix);
      read_tokens(a.prefix_value, 0, group, a.prefix, a.value_width, T(1), value, keys);
      read_tokens(a.value, first, group, count, a.value_width, T(1), value, keys, a.prefix);
    }

    // Tokens of a head, times a factor, into panels of `rows` rows, from row `to` on. Columns beyond the last are zero.
    static void read_tokens(const CdasHeads& from, int64_t token, int64_t head, int64_t count, int64_t width, T factor, T* out,
                     int64_t rows, int64_t to = 0) {
      for_panels(width, [&](int64_t column, auto vectors) {
        constexpr int kLine = decltype(vectors)::value * L;
        T* line = out + column * rows + to * kLine;
        for (int64_t i = 0; i < count; ++i, line += kLine) {
          const S* const data = static_cast<const S*>(from.data) + (token + i) * from.token_stride + head * from.head_stride;
          for (int j = 0; j < kLine; j += L)
            store(line + j, factor * read<Storage>(data + column + j, width - column - j));
        }
      });
    }

    // Panels of `rows` rows, times a factor, to the tokens of a head of a contiguous tensor.
    static void write_tokens(const T* from, int64_t rows, int64_t count, int64_t width, T factor, void* out, int64_t token,
                      int64_t head, int64_t heads) {
      for_panels(width, [&](int64_t column, auto vectors) {
        constexpr int kLine = decltype(vectors)::value * L;
        const T* line = from + column * rows;
        for (int64_t i = 0; i < count; ++i, line += kLine) {
          S* const data = static_cast<S*>(out) + ((token + i) * heads + head) * width;
          for (int j = 0; j < kLine; j += L)
            write<Storage>(data + column + j, factor * load(line + j), width - column - j);
        }
      });
    }

    // Panels {kBlock rows, width} as {width, VECTORS * L rows}; what lies beyond the rows is zero.
    template <int VECTORS> static void transpose(const T* from, int64_t rows, int64_t width, T* out) {
      constexpr int kLine = VECTORS * L;
      for_panels(width, [&](int64_t column, auto vectors) {
        constexpr int kColumns = decltype(vectors)::value * L;
        const int64_t columns = less(width - column, kColumns);
        for (int64_t i = 0; i < columns; ++i) {
          T* const line = out + (column + i) * kLine;
          const T* const data = from + column * kBlock + i;
          for (int64_t row = 0; row < rows; ++row) line[row] = data[row * kColumns];
          for (int64_t row = rows; row < kLine; ++row) line[row] = T(0);
        }
      });
    }

    // scores[j][i] = rows_j . columns_i, over panels {keys, width} and columns {width, VECTORS * L}.
    template <int VECTORS>
    static void multiply_rows(const T* rows, int64_t keys, int64_t begin, int64_t end, int64_t width, const T* columns, T* out) {
      constexpr int kLine = VECTORS * L;
      Ahead none{};
      for_panels(width, [&](int64_t column, auto vectors) {
        constexpr int kColumns = decltype(vectors)::value * L;
        product<MultiplyAdd<T>, VECTORS>(end - begin, less(width - column, kColumns), rows + column * keys + begin * kColumns,
                                         kColumns, 1, columns + column * kLine, out, column > 0, none, 0);
      });
    }

    // result[i] = sum_j weights[j][i] rows_j for the first `count` i, in panels of kBlock rows.
    template <int VECTORS>
    static void combine_rows(const T* weights, int64_t count, const T* rows, int64_t keys, int64_t begin, int64_t end,
                             int64_t width, T* out) {
      Ahead none{};
      for_panels(width, [&](int64_t column, auto vectors) {
        constexpr int kColumns = decltype(vectors)::value * L;
        product<MultiplyAdd<T>, decltype(vectors)::value>(count, end - begin, weights, 1, VECTORS * L,
                                                          rows + column * keys + begin * kColumns, out + column * kBlock, false,
                                                          none, 0);
      });
    }

    // sums[j] += sum_i weights[j][i] rows_i for the keys [begin, end), in panels of `longest` rows; rows are panels of kBlock.
    template <int VECTORS>
    void add_outer(const T* weights, int64_t begin, int64_t end, int64_t queries, const T* rows, int64_t width, T* sums) const {
      Ahead none{};
      for_panels(width, [&](int64_t column, auto vectors) {
        constexpr int kColumns = decltype(vectors)::value * L;
        product<MultiplyAdd<T>, decltype(vectors)::value>(end - begin, queries, weights, VECTORS * L, 1,
                                                          rows + column * kBlock, sums + column * p.longest + begin * kColumns,
                                                          true, none, 0);
      });
    }

    // The keys that some query of the block sees: [begin, end), counted from the first of the prefix.
    struct Range {
      int64_t begin, end;
    };
    Range seen(int64_t from, int64_t queries) const {
      const int64_t nearest = a.prefix + from;
      return {a.window > 0 ? greater(0, nearest - a.window + 1) : 0, nearest + queries};
    }

    // Capped and masked scores of a block of queries, {keys in range, VECTORS * L}.
    template <int VECTORS> Range make_scores(int64_t head, int64_t from) const {
      constexpr int kLine = VECTORS * L;
      const int64_t queries = less(count - from, kBlock), nearest = a.prefix + from;
      const Range range = seen(from, queries);
      read_tokens(a.query, first + from, head, queries, a.width, T(a.scale), query, kBlock);
      transpose<VECTORS>(query, queries, a.width, query_columns);
      multiply_rows<VECTORS>(key, a.prefix + count, range.begin, range.end, a.width, query_columns, scores);
      const T cap = T(a.softcap), over_cap = T(a.softcap > 0 ? 1 / a.softcap : 0);
      Vec<T> lanes[VECTORS];
      for (int i = 0; i < kLine; ++i) lanes[i / L][i % L] = T(i);
      for (int64_t k = range.begin; k < range.end; ++k) {
        T* const line = scores + (k - range.begin) * kLine;
        if (a.softcap > 0)
          for (int j = 0; j < VECTORS; ++j) store(line + j * L, cap * tanh_of<T>(load(line + j * L) * over_cap));
        const int64_t ahead = k - nearest;  // the queries before it do not see the key, nor those a window or more behind it
        const bool left_behind = a.window > 0 && queries - 1 - ahead >= a.window;
        if (ahead <= 0 && !left_behind) continue;
        const T end = left_behind ? T(ahead + a.window) : T(2 * kBlock);
        for (int j = 0; j < VECTORS; ++j) {
          const Vec<T> x = load(line + j * L);
          const Vec<T> floor = broadcast<T>(kFloor);
          const Vec<T> begun = lanes[j] >= T(ahead) ? x : floor;
          store(line + j * L, lanes[j] < end ? begun : floor);
        }
      }
      return range;
    }

    template <int VECTORS> void forward(int64_t head, int64_t from) const {
      constexpr int kLine = VECTORS * L;
      const int64_t queries = less(count - from, kBlock);
      const Range range = make_scores<VECTORS>(head, from);
      const int64_t keys = range.end - range.begin;
      Vec<T> most[VECTORS], sum[VECTORS];
      for (int j = 0; j < VECTORS; ++j) {
        most[j] = broadcast<T>(kFloor);
        sum[j] = Vec<T>{};
      }
      for (int64_t k = 0; k < keys; ++k)
        for (int j = 0; j < VECTORS; ++j) most[j] = greater_of(load(scores + k * kLine + j * L), most[j]);
      for (int64_t k = 0; k < keys; ++k)
        for (int j = 0; j < VECTORS; ++j) {
          const Vec<T> x = exp_nonpositive<T>(load(scores + k * kLine + j * L) - most[j]);
          sum[j] += x;
          store(scores + k * kLine + j * L, x);
        }
      combine_rows<VECTORS>(scores, queries, value, a.prefix + count, range.begin, range.end, a.value_width, result);
      T maxima[kLine], sums[kLine];
      for (int j = 0; j < VECTORS; ++j) {
        store(maxima + j * L, most[j]);
        store(sums + j * L, sum[j]);
      }
      for (int64_t i = 0; i < queries; ++i) {
        static_cast<T*>(a.log_sum)[(first + from + i) * a.heads + head] = maxima[i] + T(std::log(double(sums[i])));
        for_panels(a.value_width, [&](int64_t column, auto vectors) {
          constexpr int kColumns = decltype(vectors)::value * L;
          T* const line = result + column * kBlock + i * kColumns;
          for (int j = 0; j < kColumns; j += L) store(line + j, load(line + j) / sums[i]);
        });
      }
      write_tokens(result, kBlock, queries, a.value_width, T(1), a.out, first + from, head, a.heads);
    }

    template <int VECTORS> void backward(int64_t head, int64_t from) const {
      constexpr int kLine = VECTORS * L;
      const int64_t queries = less(count - from, kBlock);
      const Range range = make_scores<VECTORS>(head, from);
      const int64_t keys = range.end - range.begin, all = a.prefix + count;
      read_tokens(a.grad_out, first + from, head, queries, a.value_width, T(1), grad_out, kBlock);
      transpose<VECTORS>(grad_out, queries, a.value_width, grad_out_columns);
      multiply_rows<VECTORS>(value, all, range.begin, range.end, a.value_width, grad_out_columns, grad_scores);
      T log_sums[kLine] = {};
      for (int64_t i = 0; i < queries; ++i)
        log_sums[i] = static_cast<const T*>(a.log_sum)[(first + from + i) * a.heads + head];
      const T over_cap = T(a.softcap > 0 ? 1 / a.softcap : 0);
      for (int j = 0; j < VECTORS; ++j) {
        const Vec<T> log_sum = load(log_sums + j * L);
        Vec<T> mean = {};
        for (int64_t k = 0; k < keys; ++k) {
          const int64_t at = k * kLine + j * L;
          mean += exp_nonpositive<T>(load(scores + at) - log_sum) * load(grad_scores + at);
        }
        for (int64_t k = 0; k < keys; ++k) {
          const int64_t at = k * kLine + j * L;
          const Vec<T> s = load(scores + at), weight = exp_nonpositive<T>(s - log_sum);
          Vec<T> slope = weight * (load(grad_scores + at) - mean);
          if (a.softcap > 0) {
            const Vec<T> capped = s * over_cap;
            slope -= weight == T(0) ? slope : slope * capped * capped;  // a masked score is no cap's
          }
          store(scores + at, weight);
          store(grad_scores + at, slope);
        }
      }
      // Lanes beyond the last query have weights too; the products below never read them.
      const int64_t own = greater(range.begin, a.prefix), skipped = (own - range.begin) * kLine;
      add_outer<VECTORS>(scores + skipped, own - a.prefix, range.end - a.prefix, queries, grad_out, a.value_width, grad_value);
      add_outer<VECTORS>(grad_scores + skipped, own - a.prefix, range.end - a.prefix, queries, query, a.width, grad_key);
      combine_rows<VECTORS>(grad_scores, queries, key, all, range.begin, range.end, a.width, result);
      write_tokens(result, kBlock, queries, a.width, T(a.scale), a.grad_query, first + from, head, a.heads);
    }

    void write_grads() const {
      write_tokens(grad_key, p.longest, count, a.width, T(1), a.grad_key, first, group, a.groups);
      write_tokens(grad_value, p.longest, count, a.value_width, T(1), a.grad_value, first, group, a.groups);
    }
  };

  const CdasPackedAttention& a;
  int64_t threads, numbers = 0, longest = 0;
  Offsets at = {};
};

}  // namespace CDAS_ISA
