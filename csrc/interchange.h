// Intervention on a low-rank subspace of the residual stream.
//
//     forward    out = h + W^T (a - W h)                            where the mask is set, h elsewhere
//     backward   dh  = g - W^T (W g)                                where the mask is set, g elsewhere
//                da  = sum over the rows of a sequence of W g
//                dW  = sum over the rows of (a - W h) g^T - (W g) h^T
//
// A row is read from memory once: the projections first, then, out of the cache, what is made of them. Four rows share a
// reading of W.
#pragma once

#include "kernels.h"
#include "parallel.h"
#include "simd.h"
#include "storage.h"

namespace CDAS_ISA {

template <typename Storage> class Clamp {
  using T = typename Storage::Math;
  using S = typename Storage::Stored;
  static constexpr int L = kLanes<T>;
  static constexpr int kBlock = 4;

 public:
  explicit Clamp(const CdasClamp& args) : a(args) {
    threads = a.threads > 1 ? a.threads : 1;
    const int64_t matrix = a.concepts * a.rank * a.width;
    parts = a.rows / kPartRows < kMostParts ? a.rows / kPartRows : kMostParts;
    if (a.grad_direction && parts * matrix * int64_t(sizeof(T)) > kPartialBytes)
      parts = kPartialBytes / (matrix * int64_t(sizeof(T)));
    if (parts < 1) parts = 1;
    char* next = static_cast<char*>(a.workspace);
    const auto take = [&](int64_t count) {
      T* const p = reinterpret_cast<T*>(next);
      next += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
      return p;
    };
    coordinates = a.grad_value ? take(a.rows * a.rank) : nullptr;
    scratch = take(parts * 2 * kBlock * a.rank);
    sums = a.grad_direction ? take(parts * matrix) : nullptr;
    bytes = next - static_cast<char*>(a.workspace);
  }

  int64_t workspace() const { return bytes; }

  void forward() const {
    cdas::parallel(parts, threads, [&](int64_t part) {
      T* const change = scratch + part * 2 * kBlock * a.rank;
      for_blocks(
          part,
          [&](const int64_t* rows, auto count) {
            constexpr int COUNT = decltype(count)::value;
            const T* const w = direction_of(rows[0]);
            project<COUNT>(w, hidden(), a.hidden_stride, rows, change);
            for (int i = 0; i < COUNT; ++i)
              for (int64_t r = 0; r < a.rank; ++r) change[i * a.rank + r] = value_of(rows[i])[r] - change[i * a.rank + r];
            combine<COUNT>(hidden(), a.hidden_stride, rows, w, change, static_cast<S*>(a.out));
          },
          [&](int64_t row) {
            std::memcpy(static_cast<S*>(a.out) + row * a.width, hidden() + row * a.hidden_stride, a.width * sizeof(S));
          });
    });
  }

  void backward() const {
    cdas::parallel(parts, threads, [&](int64_t part) { backward_rows(part); });
    if (a.grad_value) {
      const int64_t sequences = a.rows / a.rows_per_sequence;
      cdas::parallel(threads, threads, [&](int64_t part) {
        const cdas::Range range = cdas::share(sequences, part, threads);
        for (int64_t s = range.begin; s < range.end; ++s)
          for (int64_t r = 0; r < a.rank; ++r) {
            T sum = 0;
            for (int64_t t = 0; t < a.rows_per_sequence; ++t) sum += coordinates[(s * a.rows_per_sequence + t) * a.rank + r];
            static_cast<T*>(a.grad_value)[s * a.rank + r] = sum;
          }
      });
    }
    if (a.grad_direction) {
      const int64_t matrix = a.concepts * a.rank * a.width;
      cdas::parallel(threads, threads, [&](int64_t part) {
        const cdas::Range range = cdas::share(matrix, part, threads);
        for (int64_t i = range.begin; i < range.end; ++i) {
          T sum = 0;
          for (int64_t other = 0; other < parts; ++other) sum += sums[other * matrix + i];
          static_cast<T*>(a.grad_direction)[i] = sum;
        }
      });
    }
  }

 private:
  static constexpr int64_t kPartRows = 128, kMostParts = 64;  // by the shapes alone: so is the result, to the bit
  static constexpr int64_t kPartialBytes = 32 << 20;  // of the directions' gradients, of all parts together
  template <int N> struct Constant {
    static constexpr int value = N;
  };

  void backward_rows(int64_t part) const {
    const int64_t matrix = a.concepts * a.rank * a.width;
    T* const residual = scratch + part * 2 * kBlock * a.rank;  // a - W h
    T* const along = residual + kBlock * a.rank;               // W g
    T* const sum = a.grad_direction ? sums + part * matrix : nullptr;
    if (sum) std::memset(sum, 0, matrix * sizeof(T));
    for_blocks(
        part,
        [&](const int64_t* rows, auto count) {
          constexpr int COUNT = decltype(count)::value;
          const T* const w = direction_of(rows[0]);
          project<COUNT>(w, grad_out(), a.grad_out_stride, rows, along);
          if (a.grad_value)
            for (int i = 0; i < COUNT; ++i)
              std::memcpy(coordinates + rows[i] * a.rank, along + i * a.rank, a.rank * sizeof(T));
          if (sum) {
            project<COUNT>(w, hidden(), a.hidden_stride, rows, residual);
            for (int i = 0; i < COUNT; ++i)
              for (int64_t r = 0; r < a.rank; ++r)
                residual[i * a.rank + r] = value_of(rows[i])[r] - residual[i * a.rank + r];
          }
          if (sum) add_outer<COUNT>(rows, residual, along, sum + (w - static_cast<const T*>(a.direction)));
          if (!a.grad_hidden) return;
          for (int64_t i = 0; i < COUNT * a.rank; ++i) along[i] = -along[i];
          combine<COUNT>(grad_out(), a.grad_out_stride, rows, w, along, static_cast<S*>(a.grad_hidden));
        },
        [&](int64_t row) {
          if (a.grad_value) std::memset(coordinates + row * a.rank, 0, a.rank * sizeof(T));
          if (a.grad_hidden)
            std::memcpy(static_cast<S*>(a.grad_hidden) + row * a.width, grad_out() + row * a.grad_out_stride,
                        a.width * sizeof(S));
        });
  }

  const S* hidden() const { return static_cast<const S*>(a.hidden); }
  const S* grad_out() const { return static_cast<const S*>(a.grad_out); }
  const T* value_of(int64_t row) const { return static_cast<const T*>(a.value) + row / a.rows_per_sequence * a.rank; }
  const T* direction_of(int64_t row) const {
    const int64_t concept_index = a.concept_of ? a.concept_of[row / a.rows_per_sequence] : 0;
    return static_cast<const T*>(a.direction) + concept_index * a.rank * a.width;
  }

  // Calls block(rows, how many as a constant) for the rows of a part, up to four of one direction at a time, and
  // untouched(row) for those that the mask leaves out.
  template <typename Block, typename Untouched>
  CDAS_INLINE void for_blocks(int64_t part, const Block& block, const Untouched& untouched) const {
    const cdas::Range range = cdas::share(a.rows, part, parts);
    int64_t rows[kBlock];
    int count = 0;
    const auto flush = [&] {
      if (count == kBlock)
        block(rows, Constant<kBlock>{});
      else
        for (int i = 0; i < count; ++i) block(rows + i, Constant<1>{});
      count = 0;
    };
    for (int64_t row = range.begin; row < range.end; ++row) {
      if (a.rank == 0 || (a.mask && !a.mask[row])) {
        untouched(row);
        continue;
      }
      if (count && a.concept_of && direction_of(row) != direction_of(rows[0])) flush();
      rows[count++] = row;
      if (count == kBlock) flush();
    }
    flush();
  }

  template <typename Body> CDAS_INLINE void for_columns(const Body& body) const {
    const int64_t width = a.width;  // in a register: the compiler cannot know that what is written is not it
    int64_t d = 0;
    for (; d + L <= width; d += L) body(d, int64_t(L));
    if (d < width) body(d, width - d);
  }

  // out[i][r] = W_r . x_i
  template <int COUNT>
  CDAS_INLINE void project(const T* w, const S* x, int64_t stride, const int64_t* rows, T* out) const {
    const S* from[COUNT];
    for (int i = 0; i < COUNT; ++i) from[i] = x + rows[i] * stride;
    for (int64_t r = 0; r < a.rank; ++r) {
      const T* const direction = w + r * a.width;
      Vec<T> even[COUNT] = {}, odd[COUNT] = {};  // two chains of additions a row, for their latency
      const int64_t width = a.width;
      int64_t d = 0;
      for (; d + 2 * L <= width; d += 2 * L) {
        const Vec<T> y = load(direction + d), z = load(direction + d + L);
        for (int i = 0; i < COUNT; ++i) {
          for (int64_t ahead = 0; ahead < 2 * L; ahead += 64 / int64_t(sizeof(S)))
            __builtin_prefetch(from[i] + kBlock * stride + d + ahead);  // the same place of the next block's rows
          even[i] += Storage::get(from[i] + d) * y;
          odd[i] += Storage::get(from[i] + d + L) * z;
        }
      }
      for (; d < width; d += L) {
        const int64_t count = width - d < L ? width - d : L;
        const Vec<T> y = read<Plain<T>>(direction + d, count);
        for (int i = 0; i < COUNT; ++i) even[i] += read<Storage>(from[i] + d, count) * y;
      }
      for (int i = 0; i < COUNT; ++i) out[i * a.rank + r] = sum_of_lanes<T>(even[i] + odd[i]);
    }
  }

  // out_i = x_i + sum_r factor[i][r] W_r
  template <int COUNT>
  CDAS_INLINE void combine(const S* x, int64_t stride, const int64_t* rows, const T* w, const T* factor, S* out) const {
    Vec<T> first[COUNT];
    const S* from[COUNT];
    S* to[COUNT];
    for (int i = 0; i < COUNT; ++i) {
      first[i] = broadcast<T>(factor[i * a.rank]);
      from[i] = x + rows[i] * stride;
      to[i] = out + rows[i] * a.width;
    }
    const int64_t rank = a.rank, width = a.width;
    for_columns([&](int64_t d, int64_t count) __attribute__((always_inline)) {
      Vec<T> y[COUNT];
      const Vec<T> direction = read<Plain<T>>(w + d, count);
      for (int i = 0; i < COUNT; ++i) y[i] = read<Storage>(from[i] + d, count) + first[i] * direction;
      for (int64_t r = 1; r < rank; ++r) {
        const Vec<T> next = read<Plain<T>>(w + r * width + d, count);
        for (int i = 0; i < COUNT; ++i) y[i] += factor[i * rank + r] * next;
      }
      for (int i = 0; i < COUNT; ++i) write<Storage>(to[i] + d, y[i], count);
    });
  }

  // sum_r += sum_i residual[i][r] g_i - along[i][r] h_i
  template <int COUNT>
  CDAS_INLINE void add_outer(const int64_t* rows, const T* residual, const T* along, T* sum) const {
    for (int64_t r = 0; r < a.rank; ++r) {
      Vec<T> of_g[COUNT], of_h[COUNT];
      const S *g[COUNT], *h[COUNT];
      for (int i = 0; i < COUNT; ++i) {
        g[i] = grad_out() + rows[i] * a.grad_out_stride;
        h[i] = hidden() + rows[i] * a.hidden_stride;
        of_g[i] = broadcast<T>(residual[i * a.rank + r]);
        of_h[i] = broadcast<T>(-along[i * a.rank + r]);
      }
      for_columns([&](int64_t d, int64_t count) __attribute__((always_inline)) {
        T* const at = sum + r * a.width + d;
        Vec<T> x = read<Plain<T>>(at, count);
        for (int i = 0; i < COUNT; ++i) {
          x += of_g[i] * read<Storage>(g[i] + d, count);
          x += of_h[i] * read<Storage>(h[i] + d, count);
        }
        write<Plain<T>>(at, x, count);
      });
    }
  }

  const CdasClamp& a;
  int64_t threads, parts, bytes;
  T *coordinates, *scratch, *sums;
};

}  // namespace CDAS_ISA
