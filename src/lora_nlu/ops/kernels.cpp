// Dropout, the low-rank update, attention and gelu of a training step: CPU, any SIMD width; fp32 inside, while tensors
// are fp32 or bf16 (`half`). With AVX512-BF16, or better AMX, attention multiplies bf16 as it is, with sums in fp32.
// kernels.py compiles this file, calls these functions with plain pointers and holds the expressions they stand for.
//
// Dropout stores no mask. Element (row, column) is kept by 16 bits of a counter-based hash (SplitMix64, Steele et al.
// 2014) of a seed, the row and the column, so that the backward pass draws the same again, on any number of threads.
//
// Dim letters: N rows, H columns; for attention A heads, D head size, M queries and L keys of one sequence, S longest.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <type_traits>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using i64 = int64_t;
using u64 = uint64_t;
using word = u64 __attribute__((may_alias));  // four lanes of 16 bits

#ifdef __AVX512F__
constexpr i64 W = 16, ROWS = 6, COLS = 4;  // a tile of ROWS x COLS vectors of W floats stays in registers
#else
constexpr i64 W = 8, ROWS = 4, COLS = 2;
#endif
using vec = float __attribute__((vector_size(W * 4), aligned(4), may_alias));
using ivec = int32_t __attribute__((vector_size(W * 4), aligned(4), may_alias));

inline vec& at(float* p) { return *reinterpret_cast<vec*>(p); }
inline const vec& at(const float* p) { return *reinterpret_cast<const vec*>(p); }
inline i64 padded(i64 n) { return (n + W - 1) / W * W; }

struct half {  // bf16
  uint16_t bits;
};

inline float read(float x) { return x; }
inline float read(half x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16); }
inline void write(float* p, float x) { *p = x; }
inline void write(half* p, float x) {  // to the nearest, ties to even
  const uint32_t u = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  p->bits = static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);  // NaN stays NaN
}

// f with a null pointer of each element type that the flags choose
template <class F>
auto with_types(F f) {
  return f();
}
template <class F, class... Flags>
auto with_types(F f, i64 is_half, Flags... flags) {
  return is_half ? with_types([&](auto... rest) { return f(static_cast<half*>(nullptr), rest...); }, flags...)
                 : with_types([&](auto... rest) { return f(static_cast<float*>(nullptr), rest...); }, flags...);
}

// ------------------------------------------------------------------------------------------------------ dropout

// 16 random bits for each of n columns (out has room for the next multiple of 4).
inline void random_bits(u64 seed, i64 row, i64 columns, i64 n, uint16_t* out) {
  const u64 first = seed + static_cast<u64>(row) * static_cast<u64>((columns + 3) / 4) * 0x9E3779B97F4A7C15ull;
  const i64 words = (n + 3) / 4;
  word* to = reinterpret_cast<word*>(out);
  for (i64 i = 0; i < words; i++) {
    u64 z = first + static_cast<u64>(i + 1) * 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    to[i] = z ^ (z >> 31);
  }
}

struct Dropout {
  u64 seed;
  i64 columns;
  int32_t threshold;  // of 65536: an element is dropped if its bits are below
  float scale;

  Dropout(u64 seed, i64 columns, i64 threshold)
      : seed(seed), columns(columns), threshold(threshold), scale(65536.0f / (65536.0f - threshold)) {}

  // to[i] = from[i] / (1 - p) where kept, else 0, for the first n columns of a row; plus `residual`, if any
  template <class From, class To>
  void apply(i64 row, i64 n, const From* from, To* to, uint16_t* bits, const float* residual = nullptr) const {
    const int32_t t = threshold;
    const float s = scale;
    if (residual && !t) {
      for (i64 i = 0; i < n; i++) write(to + i, residual[i] + read(from[i]));
      return;
    }
    random_bits(seed, row, columns, n, bits);
    if (residual) {
#pragma omp simd
      for (i64 i = 0; i < n; i++)
        write(to + i, residual[i] + (static_cast<int32_t>(bits[i]) >= t ? read(from[i]) * s : 0.0f));
    } else {
#pragma omp simd
      for (i64 i = 0; i < n; i++) write(to + i, static_cast<int32_t>(bits[i]) >= t ? read(from[i]) * s : 0.0f);
    }
  }
};

// Bytes of [rows, columns] floats, a multiple of 64; sizes beyond any machine's memory are all as one that is.
inline size_t bytes_of(i64 rows, i64 columns) {
  constexpr size_t TOO_MUCH = size_t{1} << 57;  // the sum of a few still fits
  const auto exact = static_cast<unsigned __int128>(rows) * static_cast<unsigned __int128>(columns) * 4;
  return exact < TOO_MUCH ? (static_cast<size_t>(exact) + 63) / 64 * 64 : TOO_MUCH;
}

// Memory that is its holder's alone, aligned for vectors; null where there is not enough.
struct Buffer {
  char* data = nullptr;
  explicit Buffer(size_t bytes) : data(static_cast<char*>(std::aligned_alloc(64, std::max<size_t>(bytes, 64)))) {}
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
};

struct Slices {  // hands out consecutive parts of a buffer, or only counts them
  char* next;
  size_t used = 0;
  float* floats(i64 rows, i64 columns = 1) { return numbers<float>(rows, columns); }
  uint32_t* pairs(i64 rows, i64 columns) { return numbers<uint32_t>(rows, columns); }

 private:
  template <class N>
  N* numbers(i64 rows, i64 columns) {
    N* p = next ? reinterpret_cast<N*>(next + used) : nullptr;
    used += bytes_of(rows, columns);
    return p;
  }
};

// ------------------------------------------------------------------------------------------------ small products

template <int R, int C>
inline void tile(i64 k, const float* a, i64 a_row, i64 a_k, const float* b, i64 ldb, float* c, i64 ldc, bool add) {
  vec sum[R][C];
  for (int r = 0; r < R; r++)
    for (int s = 0; s < C; s++) sum[r][s] = add ? at(c + r * ldc + s * W) : vec{};
  for (i64 i = 0; i < k; i++) {
    vec x[C];
    for (int s = 0; s < C; s++) x[s] = at(b + i * ldb + s * W);
    for (int r = 0; r < R; r++) {
      const float y = a[r * a_row + i * a_k];
      for (int s = 0; s < C; s++) sum[r][s] += y * x[s];
    }
  }
  for (int r = 0; r < R; r++)
    for (int s = 0; s < C; s++) at(c + r * ldc + s * W) = sum[r][s];
}

template <int C>
inline void columns(i64 m, i64 k, const float* a, i64 a_row, i64 a_k, const float* b, i64 ldb, float* c, i64 ldc,
                    bool add) {
  i64 i = 0;
  for (; i + ROWS <= m; i += ROWS) tile<ROWS, C>(k, a + i * a_row, a_row, a_k, b, ldb, c + i * ldc, ldc, add);
  if (ROWS > 4 && i + 4 <= m) tile<4, C>(k, a + i * a_row, a_row, a_k, b, ldb, c + i * ldc, ldc, add), i += 4;
  if (i + 2 <= m) tile<2, C>(k, a + i * a_row, a_row, a_k, b, ldb, c + i * ldc, ldc, add), i += 2;
  if (i < m) tile<1, C>(k, a + i * a_row, a_row, a_k, b, ldb, c + i * ldc, ldc, add);
}

// c [m, n] (+)= a [m, k] b [k, n]; a by strides (also transposed), b and c by rows; n a multiple of W.
void multiply(i64 m, i64 n, i64 k, const float* a, i64 a_row, i64 a_k, const float* b, i64 ldb, float* c, i64 ldc,
              bool add) {
  i64 j = 0;
  for (; j + COLS * W <= n; j += COLS * W) columns<COLS>(m, k, a, a_row, a_k, b + j, ldb, c + j, ldc, add);
  if (COLS > 2 && j + 2 * W <= n) columns<2>(m, k, a, a_row, a_k, b + j, ldb, c + j, ldc, add), j += 2 * W;
  if (j < n) columns<1>(m, k, a, a_row, a_k, b + j, ldb, c + j, ldc, add);
}

// Rows of D floats, `stride` apart, to rows [n, Dp], padded with 0, times `scale`.
template <class T>
void take_rows(const T* from, i64 stride, i64 n, i64 D, i64 Dp, float scale, float* to) {
  for (i64 i = 0; i < n; i++) {
    for (i64 d = 0; d < D; d++) to[i * Dp + d] = read(from[i * stride + d]) * scale;
    for (i64 d = D; d < Dp; d++) to[i * Dp + d] = 0;
  }
}

// [n, Dp] to [D, np], columns from n to np 0.
void transpose(const float* from, i64 n, i64 D, i64 Dp, i64 np, float* to) {
  constexpr i64 T = 16;
  for (i64 i0 = 0; i0 < np; i0 += T)
    for (i64 d0 = 0; d0 < D; d0 += T)
      for (i64 d = d0; d < std::min(d0 + T, D); d++)
        for (i64 i = i0; i < std::min(i0 + T, np); i++) to[d * np + i] = i < n ? from[i * Dp + d] : 0.0f;
}

inline vec exp_of(vec x) {  // Cephes' expf: relative error below 2e-7 for x <= 0; 0 below -87
  const vec low = vec{} - 87.3f;
  const ivec under = x < low;
  x = under ? low : x;
  const vec magic = vec{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const vec n = (x * 1.44269504f + magic) - magic;
  vec r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vec p = vec{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
  const vec result = p * reinterpret_cast<const vec&>(power);
  return under ? vec{} : result;
}

inline float sum_of(vec x) {
  float s = 0;
  for (i64 i = 0; i < W; i++) s += x[i];
  return s;
}

// --------------------------------------------------------------------------------------------------- attention

// Relative positions (DeBERTa): score(i, j) gets q_i . key[S - 1 - i + j] + k_j . query[S - 1 + i - j].
template <class T>
struct Attention {
  const T *q, *k, *v;  // [rows, stride]
  i64 q_stride, k_stride, v_stride;
  const T *relative_key, *relative_query;  // [V, R, A, D] or null, R = 2 S - 1 rows by descending, ascending distance
  i64 views;
  const i64 *q_starts, *k_starts, *view_of;  // [B + 1], [B + 1], [B]
  i64 sequences, heads, head_size, longest;
  float scale;
  u64 seed;
  i64 threshold;
};

constexpr i64 BAND = 48;  // rows whose products with the table are formed together

struct Tables {  // the relative tables of all heads and views: [A, V, R, Dp], and transposed [A, V, Dp, Rp]
  Buffer memory;
  float *rows[2] = {}, *columns[2] = {};  // of keys, of queries; null where there is no such table

  template <class T>
  Tables(const Attention<T>& a, int threads) : memory(a.relative_key || a.relative_query ? 2 * size(a) : 0) {
    const T* from[2] = {a.relative_key, a.relative_query};
    const i64 D = a.head_size, Dp = padded(D), R = 2 * a.longest - 1, Rp = padded(R + W), n = a.heads * a.views;
    if (!memory.data) return;
    float* next = reinterpret_cast<float*>(memory.data);
    for (int t = 0; t < 2; t++) {
      if (!from[t]) continue;
      rows[t] = next;
      columns[t] = next + n * R * Dp;
      next += n * (R * Dp + Dp * Rp) + W;  // a last vector may be read past the end
      std::fill(next - W, next, 0.0f);
      float *r = rows[t], *c = columns[t];
      const T* f = from[t];
#pragma omp parallel for num_threads(threads)
      for (i64 i = 0; i < n; i++) {
        const i64 head = i / a.views, view = i % a.views;
        take_rows(f + view * R * a.heads * D + head * D, a.heads * D, R, D, Dp, 1, r + i * R * Dp);
        transpose(r + i * R * Dp, R, Dp, Dp, Rp, c + i * Dp * Rp);
      }
    }
  }

  template <class T>
  static size_t size(const Attention<T>& a) {
    const i64 Dp = padded(a.head_size), R = 2 * a.longest - 1;
    return bytes_of(a.heads * a.views * Dp, R + padded(R + W)) + bytes_of(W, 1);
  }
};

template <class T>
struct Sequence {  // one head of one sequence
  using Tables = ::Tables;
  const Attention<T>& a;
  const Tables& tables;
  i64 M, L, D, Dp, Lp, R, Rp, q_row, k_row, head, table;

  Sequence(const Attention<T>& a, const Tables& tables, i64 b, i64 head)
      : a(a), tables(tables), M(a.q_starts[b + 1] - a.q_starts[b]), L(a.k_starts[b + 1] - a.k_starts[b]),
        D(a.head_size), Dp(padded(D)), Lp(padded(L)), R(2 * a.longest - 1), Rp(padded(R + W)), q_row(a.q_starts[b]),
        k_row(a.k_starts[b]), head(head), table(head * a.views + a.view_of[b]) {}

  // How many rows of the table, one after another, so many rows of one side meet: one a distance that occurs.
  static i64 run(i64 rows, i64 others) { return rows + others - 1; }

  // s [M, Lp] += both relative products; q [M, Dp] scaled, k [L, Dp] and its scale applied to the product.
  void add_relative(const float* q, const float* k, float* s, float* band) const {
    if (a.relative_key) {
      const float* t = tables.columns[0] + table * Dp * Rp;
      for (i64 i0 = 0; i0 < M; i0 += BAND) {
        const i64 rows = std::min(BAND, M - i0), n = run(rows, L), np = padded(n);
        const i64 first = a.longest - 1 - (i0 + rows - 1);  // the column of row i0 + rows - 1 and key 0
        // the last vector may read beyond the table's columns, into the padding of its row or the next one
        multiply(rows, np, Dp, q + i0 * Dp, Dp, 1, t + first, Rp, band, np, false);
        for (i64 i = 0; i < rows; i++) {
          const float* from = band + i * np + (rows - 1 - i);
          float* to = s + (i0 + i) * Lp;
          for (i64 j = 0; j < L; j++) to[j] += from[j];
        }
      }
    }
    if (a.relative_query) {
      const float* t = tables.columns[1] + table * Dp * Rp;
      for (i64 j0 = 0; j0 < L; j0 += BAND) {
        const i64 rows = std::min(BAND, L - j0), n = run(rows, M), np = padded(n);
        const i64 first = a.longest - 1 - (j0 + rows - 1);
        multiply(rows, np, Dp, k + j0 * Dp, Dp, 1, t + first, Rp, band, np, false);
        for (i64 i = 0; i < M; i++) {
          const float* from = band + (rows - 1) + i;  // key j0 + j, query i: row j, column rows - 1 - j + i
          float* to = s + i * Lp + j0;
          for (i64 j = 0; j < rows; j++) to[j] += a.scale * from[j * np - j];
        }
      }
    }
  }

  // dq [M, Dp] and dk [L, Dp] += what flows through the relative products; ds [M, Lp]. dq still lacks the scale.
  void add_relative_gradients(const float* ds, float* dq, float* dk, float* band) const {
    if (a.relative_key) {
      const float* t = tables.rows[0] + table * R * Dp;
      for (i64 i0 = 0; i0 < M; i0 += BAND) {
        const i64 rows = std::min(BAND, M - i0), n = run(rows, L);
        const i64 first = a.longest - 1 - (i0 + rows - 1);
        std::fill(band, band + rows * n, 0.0f);
        for (i64 i = 0; i < rows; i++)
          std::copy(ds + (i0 + i) * Lp, ds + (i0 + i) * Lp + L, band + i * n + (rows - 1 - i));
        multiply(rows, Dp, n, band, n, 1, t + first * Dp, Dp, dq + i0 * Dp, Dp, true);
      }
    }
    if (a.relative_query) {
      const float* t = tables.rows[1] + table * R * Dp;
      for (i64 j0 = 0; j0 < L; j0 += BAND) {
        const i64 rows = std::min(BAND, L - j0), n = run(rows, M);
        const i64 first = a.longest - 1 - (j0 + rows - 1);
        std::fill(band, band + rows * n, 0.0f);
        for (i64 i = 0; i < M; i++) {
          float* to = band + (rows - 1) + i;
          const float* from = ds + i * Lp + j0;
          for (i64 j = 0; j < rows; j++) to[j * n - j] = a.scale * from[j];
        }
        multiply(rows, Dp, n, band, n, 1, t + first * Dp, Dp, dk + j0 * Dp, Dp, true);
      }
    }
  }

  // s [M, Lp] = scaled scores
  void scores(const float* q, const float* k, const float* kt, float* s, float* band) const {
    multiply(M, Lp, Dp, q, Dp, 1, kt, Lp, s, Lp, false);
    add_relative(q, k, s, band);
    for (i64 i = 0; i < M; i++)
      for (i64 j = L; j < Lp; j++) s[i * Lp + j] = -INFINITY;
  }

  i64 band_columns() const { return a.relative_key || a.relative_query ? padded(BAND + std::max(L, M)) : 0; }
  i64 dropout_row(i64 i) const { return (q_row + i) * a.heads + head; }

  // `scale` times rows [n, Dp] into this head's columns
  void put_rows(const float* from, i64 n, float scale, T* to) const {
    for (i64 i = 0; i < n; i++)
      for (i64 d = 0; d < D; d++) write(to + i * a.heads * D + d, scale * from[i * Dp + d]);
  }

  size_t forward(char* memory, T* out, float* lse) const {
    Slices slices{memory};
    float *q = slices.floats(M, Dp), *k = slices.floats(L, Dp), *v = slices.floats(L, Dp);
    float *kt = slices.floats(Dp, Lp), *s = slices.floats(M, Lp), *o = slices.floats(M, Dp);
    float* band = slices.floats(BAND, band_columns());
    uint16_t* bits = reinterpret_cast<uint16_t*>(slices.floats(Lp));
    if (!memory) return slices.used;
    const i64 H = a.heads * D;
    take_rows(a.q + q_row * a.q_stride + head * D, a.q_stride, M, D, Dp, a.scale, q);
    take_rows(a.k + k_row * a.k_stride + head * D, a.k_stride, L, D, Dp, 1, k);
    take_rows(a.v + k_row * a.v_stride + head * D, a.v_stride, L, D, Dp, 1, v);
    transpose(k, L, Dp, Dp, Lp, kt);
    scores(q, k, kt, s, band);
    const Dropout dropout(a.seed, a.longest, a.threshold);
    for (i64 i = 0; i < M; i++) {
      float* row = s + i * Lp;
      vec most = at(row);
      for (i64 j = W; j < Lp; j += W) most = at(row + j) > most ? at(row + j) : most;
      float max = most[0];
      for (i64 j = 1; j < W; j++) max = std::max(max, most[j]);
      vec total{};
      for (i64 j = 0; j < Lp; j += W) total += (at(row + j) = exp_of(at(row + j) - max));
      const float sum = sum_of(total), inverse = 1 / sum;
      lse[(q_row + i) * a.heads + head] = max + std::log(sum);
      for (i64 j = 0; j < Lp; j += W) at(row + j) *= inverse;
      if (a.threshold) dropout.apply(dropout_row(i), L, row, row, bits);
    }
    multiply(M, Dp, L, s, Lp, 1, v, Dp, o, Dp, false);
    put_rows(o, M, 1, out + q_row * H + head * D);
    return slices.used;
  }

  size_t backward(char* memory, const float* lse, const T* grad, T* grad_q, T* grad_k, T* grad_v) const {
    Slices slices{memory};
    float *q = slices.floats(M, Dp), *k = slices.floats(L, Dp), *v = slices.floats(L, Dp);
    float *kt = slices.floats(Dp, Lp), *vt = slices.floats(Dp, Lp), *g = slices.floats(M, Dp);
    float *s = slices.floats(M, Lp), *ds = slices.floats(M, Lp);
    float *dq = slices.floats(M, Dp), *dk = slices.floats(L, Dp), *dv = slices.floats(L, Dp);
    float* band = slices.floats(BAND, band_columns());
    float* kept = slices.floats(Lp);  // what dropout multiplies a row of probabilities by
    uint16_t* bits = reinterpret_cast<uint16_t*>(slices.floats(Lp));
    if (!memory) return slices.used;
    const i64 H = a.heads * D;
    take_rows(a.q + q_row * a.q_stride + head * D, a.q_stride, M, D, Dp, a.scale, q);
    take_rows(a.k + k_row * a.k_stride + head * D, a.k_stride, L, D, Dp, 1, k);
    take_rows(a.v + k_row * a.v_stride + head * D, a.v_stride, L, D, Dp, 1, v);
    take_rows(grad + q_row * H + head * D, H, M, D, Dp, 1, g);
    transpose(k, L, Dp, Dp, Lp, kt);
    transpose(v, L, Dp, Dp, Lp, vt);
    scores(q, k, kt, s, band);
    multiply(M, Lp, Dp, g, Dp, 1, vt, Lp, ds, Lp, false);  // of the dropped probabilities
    std::fill(kept + L, kept + Lp, 0.0f);
    const Dropout dropout(a.seed, a.longest, a.threshold);
    for (i64 i = 0; i < M; i++) {
      float *p = s + i * Lp, *dp = ds + i * Lp;
      if (a.threshold) {
        std::fill(kept, kept + L, 1.0f);
        dropout.apply(dropout_row(i), L, kept, kept, bits);
      }
      const float shift = lse[(q_row + i) * a.heads + head];
      vec total{};
      for (i64 j = 0; j < Lp; j += W) {
        at(p + j) = exp_of(at(p + j) - shift);
        if (a.threshold) at(dp + j) *= at(kept + j);
        total += at(p + j) * at(dp + j);
      }
      const float delta = sum_of(total);
      for (i64 j = 0; j < Lp; j += W) {
        at(dp + j) = at(p + j) * (at(dp + j) - delta);
        if (a.threshold) at(p + j) *= at(kept + j);
      }
    }
    multiply(L, Dp, M, s, 1, Lp, g, Dp, dv, Dp, false);
    multiply(M, Dp, L, ds, Lp, 1, k, Dp, dq, Dp, false);
    multiply(L, Dp, M, ds, 1, Lp, q, Dp, dk, Dp, false);
    add_relative_gradients(ds, dq, dk, band);
    put_rows(dq, M, a.scale, grad_q + q_row * H + head * D);
    put_rows(dk, L, 1, grad_k + k_row * H + head * D);
    put_rows(dv, L, 1, grad_v + k_row * H + head * D);
    return slices.used;
  }
};

// --------------------------------------------------------------------------- attention by bf16 products, fp32 sums
#ifdef __AVX512BF16__

// Two bf16 side by side, whose products are added up: of a row in the first factor, of a column in the second.
using pair = uint32_t __attribute__((may_alias));

inline __m512i load(const void* p) { return _mm512_loadu_si512(p); }
inline void store(void* p, __m512i x) { _mm512_storeu_si512(p, x); }
inline __m512i rounded(vec low, vec high) {  // 32 bf16, those of `low` first
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}
inline vec where(__mmask16 mask, vec x) { return (vec)_mm512_maskz_mov_ps(mask, (__m512)x); }
inline uint32_t first_of_32(i64 n) { return n >= 32 ? ~0u : n > 0 ? (1u << n) - 1 : 0; }
inline i64 to_16(i64 n) { return (n + 15) / 16 * 16; }
inline i64 to_32(i64 n) { return (n + 31) / 32 * 32; }

#ifdef __AMX_BF16__
// Matrix registers of 16 rows of 16 pairs, of the thread that holds this; a process asks the kernel for them once.
struct Tiles {
  static bool granted() {
    static const bool result = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
    return result;
  }
  Tiles() {
    struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shapes;
    asm volatile("" : : "r"(&shapes) : "memory");  // g++ does not know that the next one reads all of it
    if (granted()) _tile_loadconfig(&shapes);
  }
  ~Tiles() {
    if (granted()) _tile_release();
  }
};

void multiply_tiles(i64 m, i64 n, i64 k, const pair* a, i64 lda, const pair* b, i64 ldb, float* c, i64 ldc, bool add) {
  asm volatile("" ::: "memory");  // g++ does not know that the next ones read memory
  for (i64 j = 0; j < n; j += 32)
    for (i64 i = 0; i < m; i += 32) {
      const bool below = i + 16 < m, beside = j + 16 < n;
      float *to = c + i * ldc + j, *lower = to + 16 * ldc;
      if (add) {
        _tile_loadd(0, to, ldc * 4);
        if (beside) _tile_loadd(1, to + 16, ldc * 4);
        if (below) _tile_loadd(2, lower, ldc * 4);
        if (below && beside) _tile_loadd(3, lower + 16, ldc * 4);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (i64 l = 0; l < k; l += 16) {
        const pair *x = a + i * lda + l, *y = b + l * ldb + j;
        _tile_loadd(4, x, lda * 4);
        _tile_loadd(6, y, ldb * 4);
        _tile_dpbf16ps(0, 4, 6);
        if (beside) {
          _tile_loadd(7, y + 16, ldb * 4);
          _tile_dpbf16ps(1, 4, 7);
        }
        if (below) {
          _tile_loadd(5, x + 16 * lda, lda * 4);
          _tile_dpbf16ps(2, 5, 6);
          if (beside) _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_stored(0, to, ldc * 4);
      if (beside) _tile_stored(1, to + 16, ldc * 4);
      if (below) _tile_stored(2, lower, ldc * 4);
      if (below && beside) _tile_stored(3, lower + 16, ldc * 4);
    }
  asm volatile("" ::: "memory");
}
#else
struct Tiles {
  static bool granted() { return false; }
  Tiles() {}
};
void multiply_tiles(i64, i64, i64, const pair*, i64, const pair*, i64, float*, i64, bool) {}
#endif

template <int C>
inline void pair_columns(i64 m, i64 k, const pair* a, i64 lda, const pair* b, i64 ldb, float* c, i64 ldc, bool add) {
  constexpr int R = 4;
  for (i64 i = 0; i < m; i += R) {
    __m512 sum[R][C];
    for (int r = 0; r < R; r++)
      for (int s = 0; s < C; s++) sum[r][s] = add ? _mm512_loadu_ps(c + (i + r) * ldc + s * 16) : _mm512_setzero_ps();
    for (i64 l = 0; l < k; l++) {
      __m512bh x[C];
      for (int s = 0; s < C; s++) x[s] = (__m512bh)load(b + l * ldb + s * 16);
      for (int r = 0; r < R; r++) {
        const auto y = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[(i + r) * lda + l]));
        for (int s = 0; s < C; s++) sum[r][s] = _mm512_dpbf16_ps(sum[r][s], y, x[s]);
      }
    }
    for (int r = 0; r < R; r++)
      for (int s = 0; s < C; s++) _mm512_storeu_ps(c + (i + r) * ldc + s * 16, sum[r][s]);
  }
}

// c [m, n] (+)= a b in fp32; a [m, k] pairs of a row, b [k, n] pairs of a column; m, n and k multiples of 16.
void multiply(i64 m, i64 n, i64 k, const pair* a, i64 lda, const pair* b, i64 ldb, float* c, i64 ldc, bool add) {
  if (Tiles::granted()) return multiply_tiles(m, n, k, a, lda, b, ldb, c, ldc, add);
  i64 j = 0;
  for (; j + 64 <= n; j += 64) pair_columns<4>(m, k, a, lda, b + j, ldb, c + j, ldc, add);
  if (j + 32 <= n) pair_columns<2>(m, k, a, lda, b + j, ldb, c + j, ldc, add), j += 32;
  if (j < n) pair_columns<1>(m, k, a, lda, b + j, ldb, c + j, ldc, add);
}

// Rows of D bf16, `stride` apart, to [np, Dp / 2] pairs of a row, padded with 0.
void copy_rows(const half* from, i64 stride, i64 n, i64 np, i64 D, i64 Dp, pair* to) {
  half* rows = reinterpret_cast<half*>(to);
  for (i64 i = 0; i < n; i++) {
    std::copy(from + i * stride, from + i * stride + D, rows + i * Dp);
    std::fill(rows + i * Dp + D, rows + (i + 1) * Dp, half{0});
  }
  std::fill(rows + n * Dp, rows + np * Dp, half{0});
}

// Of rows `stride` apart the first n and D columns, padded with 0 to np and Dp, to [np / 2, Dp] pairs of a column; np
// even, Dp a multiple of 32.
void pair_rows(const half* from, i64 stride, i64 n, i64 np, i64 D, i64 Dp, pair* to) {
  alignas(64) uint16_t order[2][32];
  for (int i = 0; i < 32; i++) order[0][i] = i / 2 + i % 2 * 32, order[1][i] = order[0][i] + 16;
  const __m512i first = load(order[0]), second = load(order[1]);
  for (i64 i = 0; i < np; i += 2)
    for (i64 d = 0; d < Dp; d += 32) {
      const __mmask32 columns = first_of_32(D - d);
      const __m512i upper = _mm512_maskz_loadu_epi16(i < n ? columns : 0, from + i * stride + d);
      const __m512i lower = _mm512_maskz_loadu_epi16(i + 1 < n ? columns : 0, from + (i + 1) * stride + d);
      store(to + i / 2 * Dp + d, _mm512_permutex2var_epi16(upper, first, lower));
      store(to + i / 2 * Dp + d + 16, _mm512_permutex2var_epi16(upper, second, lower));
    }
}

inline void transpose(__m512i* x) {  // 16 rows of 16 numbers of 32 bits
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    x[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    x[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    x[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// [n, m] pairs to [m, n]: those of a row to those of a column, or back; n and m multiples of 16.
void transpose(const pair* from, i64 n, i64 m, pair* to) {
  for (i64 i = 0; i < n; i += 16)
    for (i64 j = 0; j < m; j += 16) {
      __m512i x[16];
      for (int r = 0; r < 16; r++) x[r] = load(from + (i + r) * m + j);
      transpose(x);
      for (int r = 0; r < 16; r++) store(to + (j + r) * n + i, x[r]);
    }
}

// `scale[i]` or, without it, `scale` times rows [n, Dp] to rows of D, `stride` apart
void put_rows(const float* from, i64 n, i64 D, i64 Dp, float scale, const float* scales, half* to, i64 stride) {
  for (i64 i = 0; i < n; i++)
    for (i64 d = 0; d < D; d += 16) {
      const vec x = at(from + i * Dp + d) * (scales ? scales[i] : scale);
      _mm256_mask_storeu_epi16(to + i * stride + d, static_cast<__mmask16>(first_of_32(D - d)),
                               (__m256i)_mm512_cvtneps_pbh((__m512)x));
    }
}

// Which of 32 columns from `column` on a row's dropout keeps: the draws of `random_bits`.
inline uint32_t kept_of_32(const Dropout& dropout, i64 row, i64 column) {
  constexpr u64 STEP = 0x9E3779B97F4A7C15ull;
  const i64 word = row * ((dropout.columns + 3) / 4) + column / 4 + 1;
  const auto mix = [](__m512i z, int shift) { return _mm512_xor_si512(z, _mm512_srli_epi64(z, shift)); };
  __m512i z = _mm512_setr_epi64(0, STEP, 2 * STEP, 3 * STEP, 4 * STEP, 5 * STEP, 6 * STEP, 7 * STEP);
  z = _mm512_add_epi64(z, _mm512_set1_epi64(static_cast<i64>(dropout.seed + static_cast<u64>(word) * STEP)));
  z = _mm512_mullo_epi64(mix(z, 30), _mm512_set1_epi64(static_cast<i64>(0xBF58476D1CE4E5B9ull)));
  z = _mm512_mullo_epi64(mix(z, 27), _mm512_set1_epi64(static_cast<i64>(0x94D049BB133111EBull)));
  return _mm512_cmpge_epu16_mask(mix(z, 31), _mm512_set1_epi16(static_cast<int16_t>(dropout.threshold)));
}

struct PairTables {  // the relative tables of all heads and views, R rows padded with 0 to Rp
  Buffer memory;
  pair *transposed[2] = {}, *columns[2] = {};  // [A, V, Dp / 2, Rp] pairs of a row, [A, V, Rp / 2, Dp] of a column

  static i64 padded_rows(const Attention<half>& a) { return to_32(2 * a.longest - 1 + 32); }  // products read beyond R

  PairTables(const Attention<half>& a, int threads)
      : memory((!!a.relative_key + !!a.relative_query) * 3 *
               bytes_of(a.heads * a.views, padded_rows(a) * to_32(a.head_size) / 2)) {
    const half* from[2] = {a.relative_key, a.relative_query};
    const i64 D = a.head_size, Dp = to_32(D), Rp = padded_rows(a), n = a.heads * a.views, each = Rp * Dp / 2;
    pair* next = reinterpret_cast<pair*>(memory.data);
    for (int t = 0; next && t < 2; t++) {
      if (!from[t]) continue;
      pair *rows = next, *c = columns[t] = next + n * each, *x = transposed[t] = next + 2 * n * each;
      next += 3 * n * each;
      const half* f = from[t];
#pragma omp parallel for num_threads(threads)
      for (i64 i = 0; i < n; i++) {
        const half* first = f + (i % a.views * (2 * a.longest - 1) * a.heads + i / a.views) * D;
        copy_rows(first, a.heads * D, 2 * a.longest - 1, Rp, D, Dp, rows + i * each);
        pair_rows(first, a.heads * D, 2 * a.longest - 1, Rp, D, Dp, c + i * each);
        transpose(rows + i * each, Rp, Dp / 2, x + i * each);
      }
    }
  }
};

struct PairSequence {  // as `Sequence`: one head of one sequence
  using Tables = PairTables;
  const Attention<half>& a;
  const Tables& tables;
  i64 M, L, D, Dp, Mp, Lp, Rp, q_row, k_row, head, table;
  static constexpr i64 BAND = 32;

  PairSequence(const Attention<half>& a, const Tables& tables, i64 b, i64 head)
      : a(a), tables(tables), M(a.q_starts[b + 1] - a.q_starts[b]), L(a.k_starts[b + 1] - a.k_starts[b]),
        D(a.head_size), Dp(to_32(D)), Mp(to_32(M)), Lp(to_32(L)), Rp(Tables::padded_rows(a)), q_row(a.q_starts[b]),
        k_row(a.k_starts[b]), head(head), table((head * a.views + a.view_of[b]) * Rp * Dp / 2) {}

  // s [Mp, Lp] = scores without the scale; columns from L on are not to be read
  void scores(const pair* q, const pair* k, const pair* kt, float* s, float* band) const {
    multiply(to_16(M), to_16(L), Dp / 2, q, Dp / 2, kt, Lp, s, Lp, false);
    if (a.relative_key) {
      const pair* t = tables.transposed[0] + table;
      for (i64 i0 = 0; i0 < M; i0 += BAND) {
        const i64 rows = std::min(BAND, M - i0), np = to_16(rows + L - 1), first = a.longest - i0 - rows;
        multiply(to_16(rows), np, Dp / 2, q + i0 * Dp / 2, Dp / 2, t + first, Rp, band, np, false);
        for (i64 i = 0; i < rows; i++) {
          const float* from = band + i * np + rows - 1 - i;
          float* to = s + (i0 + i) * Lp;
          for (i64 j = 0; j < L; j += W) at(to + j) += at(from + j);
        }
      }
    }
    if (a.relative_query) {
      const pair* t = tables.transposed[1] + table;
      for (i64 j0 = 0; j0 < L; j0 += BAND) {
        const i64 rows = std::min(BAND, L - j0), np = to_16(rows + M - 1), first = a.longest - j0 - rows;
        multiply(to_16(rows), np, Dp / 2, k + j0 * Dp / 2, Dp / 2, t + first, Rp, band, np, false);
        for (i64 j = 0; j < rows; j += 16)  // key j0 + j, query i: row j, column rows - 1 - j + i
          for (i64 i = 0; i < M; i += 16) {
            __m512i x[16];
            for (i64 r = 0; r < 16; r++) x[r] = load(band + (j + r) * np + rows - 1 - j - r + i);
            transpose(x);
            for (i64 r = 0; r < 16; r++) at(s + (i + r) * Lp + j0 + j) += (vec)x[r];
          }
      }
    }
  }

  // dq [Mp, Dp] and dk [Lp, Dp] += what flows through the relative products; ds [Mp, Lp], transposed dst [Lp, Mp]
  void add_relative_gradients(const pair* ds, const pair* dst, float* dq, float* dk, half* band) const {
    const auto add = [&](const half* from, i64 n, i64 stride, i64 others, const pair* t, float* to) {
      for (i64 i0 = 0; i0 < n; i0 += BAND) {
        const i64 rows = std::min(BAND, n - i0), first = a.longest - i0 - rows, odd = first % 2;
        const i64 np = to_32(odd + rows + others - 1);
        std::fill(band, band + to_16(rows) * np, half{0});
        for (i64 i = 0; i < rows; i++)
          std::copy(from + (i0 + i) * stride, from + (i0 + i) * stride + others, band + i * np + odd + rows - 1 - i);
        multiply(to_16(rows), Dp, np / 2, reinterpret_cast<pair*>(band), np / 2, t + first / 2 * Dp, Dp, to + i0 * Dp,
                 Dp, true);
      }
    };
    if (a.relative_key) add(reinterpret_cast<const half*>(ds), M, Lp, L, tables.columns[0] + table, dq);
    if (a.relative_query) add(reinterpret_cast<const half*>(dst), L, Mp, M, tables.columns[1] + table, dk);
  }

  i64 band_columns() const { return a.relative_key || a.relative_query ? BAND + 48 + std::max(L, M) : 0; }
  i64 dropout_row(i64 i) const { return (q_row + i) * a.heads + head; }

  size_t forward(char* memory, half* out, float* lse) const {
    Slices slices{memory};
    pair *q = slices.pairs(Mp, Dp / 2), *k = slices.pairs(Lp, Dp / 2), *kt = slices.pairs(Dp / 2, Lp);
    pair *vc = slices.pairs(Lp / 2, Dp), *p = slices.pairs(Mp, Lp / 2);
    float *s = slices.floats(Mp, Lp), *o = slices.floats(Mp, Dp), *factors = slices.floats(M);
    float* band = slices.floats(BAND, band_columns());
    if (!memory) return slices.used;
    const i64 H = a.heads * D;
    copy_rows(a.q + q_row * a.q_stride + head * D, a.q_stride, M, Mp, D, Dp, q);
    copy_rows(a.k + k_row * a.k_stride + head * D, a.k_stride, L, Lp, D, Dp, k);
    pair_rows(a.v + k_row * a.v_stride + head * D, a.v_stride, L, Lp, D, Dp, vc);
    transpose(k, Lp, Dp / 2, kt);
    scores(q, k, kt, s, band);
    const Dropout dropout(a.seed, a.longest, a.threshold);
    for (i64 i = 0; i < M; i++) {
      float* row = s + i * Lp;
      vec most = vec{} - INFINITY;
      for (i64 j = 0; j < Lp; j += W) {
        const auto real = static_cast<__mmask16>(first_of_32(L - j));
        at(row + j) = (vec)_mm512_mask_mov_ps((__m512)(vec{} - INFINITY), real, (__m512)(at(row + j) * a.scale));
        most = at(row + j) > most ? at(row + j) : most;
      }
      const float max = _mm512_reduce_max_ps((__m512)most);
      vec total{};
      for (i64 j = 0; j < Lp; j += 32) {
        const vec low = exp_of(at(row + j) - max), high = exp_of(at(row + j + W) - max);
        total += low + high;
        const uint32_t kept = a.threshold ? kept_of_32(dropout, dropout_row(i), j) : ~0u;
        store(p + (i * Lp + j) / 2, _mm512_maskz_mov_epi16(kept, rounded(low, high)));
      }
      const float sum = sum_of(total);
      lse[(q_row + i) * a.heads + head] = max + std::log(sum);
      factors[i] = dropout.scale / sum;
    }
    std::fill(p + M * Lp / 2, p + to_16(M) * Lp / 2, 0);
    multiply(to_16(M), Dp, Lp / 2, p, Lp / 2, vc, Dp, o, Dp, false);
    put_rows(o, M, D, Dp, 1, factors, out + q_row * H + head * D, H);
    return slices.used;
  }

  size_t backward(char* memory, const float* lse, const half* grad, half* grad_q, half* grad_k, half* grad_v) const {
    Slices slices{memory};
    pair *q = slices.pairs(Mp, Dp / 2), *qc = slices.pairs(Mp / 2, Dp), *g = slices.pairs(Mp, Dp / 2);
    pair *gc = slices.pairs(Mp / 2, Dp), *k = slices.pairs(Lp, Dp / 2), *kc = slices.pairs(Lp / 2, Dp);
    pair *kt = slices.pairs(Dp / 2, Lp), *v = slices.pairs(Lp, Dp / 2), *vt = slices.pairs(Dp / 2, Lp);
    pair *pc = slices.pairs(Mp / 2, Lp), *dsc = slices.pairs(Mp / 2, Lp), *dsr = slices.pairs(Mp, Lp / 2);
    pair *pt = slices.pairs(Lp, Mp / 2), *dst = slices.pairs(Lp, Mp / 2);
    float *s = slices.floats(Mp, Lp), *ds = slices.floats(Mp, Lp);
    float *dq = slices.floats(Mp, Dp), *dk = slices.floats(Lp, Dp), *dv = slices.floats(Lp, Dp);
    float* band = slices.floats(BAND, band_columns());
    if (!memory) return slices.used;
    const i64 H = a.heads * D;
    copy_rows(a.q + q_row * a.q_stride + head * D, a.q_stride, M, Mp, D, Dp, q);
    copy_rows(a.k + k_row * a.k_stride + head * D, a.k_stride, L, Lp, D, Dp, k);
    copy_rows(a.v + k_row * a.v_stride + head * D, a.v_stride, L, Lp, D, Dp, v);
    copy_rows(grad + q_row * H + head * D, H, M, Mp, D, Dp, g);
    const auto pairs = [&](const pair* from, i64 n, pair* to) {
      pair_rows(reinterpret_cast<const half*>(from), Dp, n, n, Dp, Dp, to);
    };
    pairs(q, Mp, qc), pairs(g, Mp, gc), pairs(k, Lp, kc);
    transpose(k, Lp, Dp / 2, kt), transpose(v, Lp, Dp / 2, vt);
    scores(q, k, kt, s, band);
    multiply(to_16(M), to_16(L), Dp / 2, g, Dp / 2, vt, Lp, ds, Lp, false);  // of the dropped probabilities
    const Dropout dropout(a.seed, a.longest, a.threshold);
    alignas(64) uint16_t order[32];  // of two halves to pairs of a column
    for (int i = 0; i < 32; i++) order[i] = i / 2 + i % 2 * 16;
    for (i64 i = 0; i < M; i += 2) {
      const bool has_both = i + 1 < M;  // else the second row is 0
      const float shifts[2] = {lse[(q_row + i) * a.heads + head], has_both ? lse[(q_row + i + 1) * a.heads + head] : 0};
      vec totals[2] = {};
      for (i64 j = 0; j < Lp; j += 32) {
        vec dropped[2][2];
        for (i64 r = 0; r < 2; r++) {
          const uint32_t real = r == 0 || has_both ? first_of_32(L - j) : 0;
          const uint32_t kept = a.threshold ? real & kept_of_32(dropout, dropout_row(i + r), j) : real;
          for (i64 h = 0; h < 2; h++) {
            vec &p = at(s + (i + r) * Lp + j + h * 16), &dp = at(ds + (i + r) * Lp + j + h * 16);
            p = where(real >> h * 16, exp_of(p * a.scale - shifts[r]));
            dp = where(kept >> h * 16, dp * dropout.scale);
            totals[r] += p * dp;
            dropped[r][h] = where(kept >> h * 16, p * dropout.scale);
          }
        }
        for (i64 h = 0; h < 2; h++)
          store(pc + i / 2 * Lp + j + h * 16,
                _mm512_permutexvar_epi16(load(order), rounded(dropped[0][h], dropped[1][h])));
      }
      const float deltas[2] = {sum_of(totals[0]), sum_of(totals[1])};
      for (i64 j = 0; j < Lp; j += 16) {
        vec x[2];
        for (i64 r = 0; r < 2; r++) x[r] = at(s + (i + r) * Lp + j) * (at(ds + (i + r) * Lp + j) - deltas[r]);
        const __m512i both = rounded(x[0], x[1]);
        auto* to = reinterpret_cast<__m256i*>(dsr + (i * Lp + j) / 2);
        _mm256_storeu_si256(to, _mm512_castsi512_si256(both));
        _mm256_storeu_si256(to + Lp / 16, _mm512_extracti64x4_epi64(both, 1));
        store(dsc + i / 2 * Lp + j, _mm512_permutexvar_epi16(load(order), both));
      }
    }
    const i64 even = (M + 1) / 2 * 2;
    std::fill(pc + even / 2 * Lp, pc + Mp / 2 * Lp, 0), std::fill(dsc + even / 2 * Lp, dsc + Mp / 2 * Lp, 0);
    std::fill(dsr + even * Lp / 2, dsr + Mp * Lp / 2, 0);
    transpose(pc, Mp / 2, Lp, pt), transpose(dsc, Mp / 2, Lp, dst);
    multiply(to_16(L), Dp, Mp / 2, pt, Mp / 2, gc, Dp, dv, Dp, false);
    multiply(to_16(M), Dp, Lp / 2, dsr, Lp / 2, kc, Dp, dq, Dp, false);
    multiply(to_16(L), Dp, Mp / 2, dst, Mp / 2, qc, Dp, dk, Dp, false);
    add_relative_gradients(dsr, dst, dq, dk, reinterpret_cast<half*>(band));
    put_rows(dq, M, D, Dp, a.scale, nullptr, grad_q + q_row * H + head * D, H);
    put_rows(dk, L, D, Dp, a.scale, nullptr, grad_k + k_row * H + head * D, H);
    put_rows(dv, L, D, Dp, 1, nullptr, grad_v + k_row * H + head * D, H);
    return slices.used;
  }
};

template <class T>
using Head = std::conditional_t<std::is_same_v<T, half>, PairSequence, Sequence<T>>;
#else
struct Tiles {
  Tiles() {}
};
template <class T>
using Head = Sequence<T>;
#endif

// run(sequence, memory) for each head of each sequence; without memory it returns how many bytes it needs.
template <class T, class Run>
int for_each_head(const Attention<T>& a, i64 threads, Run run) {
  const typename Head<T>::Tables tables(a, threads);
  if (!tables.memory.data) return 1;
  size_t bytes = 0;
  for (i64 b = 0; b < a.sequences; b++) bytes = std::max(bytes, run(Head<T>(a, tables, b, 0), nullptr));
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    const Tiles tiles;
    Buffer memory(bytes);
    failed = !memory.data;
#pragma omp for schedule(dynamic)
    for (i64 i = a.sequences * a.heads - 1; i >= 0; i--)
      if (!failed) run(Head<T>(a, tables, i / a.heads, i % a.heads), memory.data);
  }
  return failed;
}

// n numbers of x in fp32: x itself, or a copy in `buffer`.
inline const float* as_floats(const float* x, i64, float*) { return x; }
inline const float* as_floats(const half* x, i64 n, float* buffer) {
  for (i64 i = 0; i < n; i++) buffer[i] = read(x[i]);
  return buffer;
}

// z = y + s u up with u = x down, as `add_low_rank` below
template <class X, class Y, class Z>
int add_update(const X* x, const float* down, i64 down_row, i64 down_column, const float* up, i64 up_row, i64 up_column,
               const Y* y, Z* z, float* u, i64 N, i64 I, i64 O, i64 R, float s, i64 threads) {
  const i64 Rp = padded(R);
  constexpr i64 BLOCK = 4 * ROWS;
  Buffer memory(bytes_of(I, Rp) + bytes_of(R, O));
  if (!memory.data) return 1;
  float *d = reinterpret_cast<float*>(memory.data), *v = d + I * Rp;
  int failed = 0;
  for (i64 i = 0; i < I; i++)
    for (i64 r = 0; r < Rp; r++) d[i * Rp + r] = r < R ? down[i * down_row + r * down_column] : 0;
  for (i64 r = 0; r < R; r++)
    for (i64 o = 0; o < O; o++) v[r * O + o] = s * up[r * up_row + o * up_column];
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    constexpr bool in_place = std::is_same_v<Z, float> && std::is_same_v<Y, float>;
    Buffer block(bytes_of(BLOCK, Rp) + (std::is_same_v<X, half> ? bytes_of(BLOCK, I) : 0) +
                 (in_place ? 0 : bytes_of(BLOCK, O)));
    float* t = reinterpret_cast<float*>(block.data);
    failed = !t;
#pragma omp for
    for (i64 i = 0; i < N; i += BLOCK) {
      if (failed) continue;
      const i64 rows = std::min(BLOCK, N - i);
      float* sum = t + BLOCK * Rp;
      multiply(rows, Rp, I, as_floats(x + i * I, rows * I, sum + (in_place ? 0 : BLOCK * O)), I, 1, d, Rp, t, Rp, false);
      if constexpr (in_place) {
        sum = z + i * O;
        if (y != z) std::copy(y + i * O, y + (i + rows) * O, sum);
      } else {
        for (i64 j = 0; j < rows * O; j++) sum[j] = read(y[i * O + j]);
      }
      multiply(rows, O, R, t, Rp, 1, v, O, sum, O, true);
      if constexpr (!in_place)
        for (i64 j = 0; j < rows * O; j++) write(z + i * O + j, sum[j]);
      for (i64 r = 0; r < rows; r++) std::copy(t + r * Rp, t + r * Rp + R, u + (i + r) * R);
    }
  }
  return failed;
}

// out [R, I] = s u^T x, as `low_rank_gradient` below: columns are shared among threads, so that sums have one order
template <class X>
int sum_outer(const float* u, const X* x, float* out, i64 N, i64 I, i64 R, float s, i64 threads) {
  constexpr i64 BLOCK = 256, WIDTH = COLS * W;
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    Buffer memory(bytes_of(BLOCK, WIDTH) + bytes_of(R, WIDTH));
    float *block = reinterpret_cast<float*>(memory.data), *sum = block + BLOCK * WIDTH;
    failed = !block;
#pragma omp for
    for (i64 j = 0; j < I; j += WIDTH) {
      if (failed) continue;
      const i64 n = std::min(WIDTH, I - j);
      std::fill(sum, sum + R * WIDTH, 0.0f);
      for (i64 i = 0; i < N; i += BLOCK) {
        const i64 rows = std::min(BLOCK, N - i);
        for (i64 k = 0; k < rows; k++)
          for (i64 c = 0; c < WIDTH; c++) block[k * WIDTH + c] = c < n ? read(x[(i + k) * I + j + c]) : 0.0f;
        multiply(R, WIDTH, rows, u + i * R, 1, R, block, WIDTH, sum, WIDTH, true);
      }
      for (i64 r = 0; r < R; r++)
        for (i64 c = 0; c < n; c++) out[r * I + j + c] = s * sum[r * WIDTH + c];
    }
  }
  return failed;
}

#ifdef __AVX512BF16__

// x is the sum of the two, to 16 bits
inline void split(float x, half& high, half& low) {
  write(&high, x);
  write(&low, x - read(high));
}

// Element (row, column) of pairs of a column, `columns` of them
inline half& in_pairs(pair* pairs, i64 columns, i64 row, i64 column) {
  return reinterpret_cast<half*>(pairs)[(row / 2 * columns + column) * 2 + row % 2];
}

// As `add_update` above, of x in bf16: down, up and u are multiplied as sums of two bf16 each.
template <class Y, class Z>
int add_update(const half* x, const float* down, i64 down_row, i64 down_column, const float* up, i64 up_row,
               i64 up_column, const Y* y, Z* z, float* u, i64 N, i64 I, i64 O, i64 R, float s, i64 threads) {
  if (!Tiles::granted())  // without matrix registers three products are slower than one in fp32
    return add_update<half, Y, Z>(x, down, down_row, down_column, up, up_row, up_column, y, z, u, N, I, O, R, s,
                                  threads);
  constexpr i64 BLOCK = 32, WIDTH = 128;
  const i64 Ip = to_32(I), n = to_16(2 * R), k = to_32(3 * R);
  Buffer memory(bytes_of(Ip / 2, n) + bytes_of(k / 2, O));
  if (!memory.data) return 1;
  Slices slices{memory.data};
  pair *d = slices.pairs(Ip / 2, n), *v = slices.pairs(k / 2, O);
  std::fill(d, d + Ip / 2 * n, 0), std::fill(v, v + k / 2 * O, 0);
  for (i64 i = 0; i < I; i++)
    for (i64 r = 0; r < R; r++)
      split(down[i * down_row + r * down_column], in_pairs(d, n, i, r), in_pairs(d, n, i, R + r));
  for (i64 r = 0; r < R; r++)
    for (i64 o = 0; o < O; o++) {
      split(s * up[r * up_row + o * up_column], in_pairs(v, O, r, o), in_pairs(v, O, 2 * R + r, o));
      in_pairs(v, O, R + r, o) = in_pairs(v, O, r, o);
    }
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    const Tiles tiles;
    Buffer block(bytes_of(BLOCK, Ip / 2) + bytes_of(BLOCK, k / 2) + bytes_of(BLOCK, n) + bytes_of(BLOCK, WIDTH));
    failed = !block.data;
    Slices parts{block.data};
    pair *copy = parts.pairs(BLOCK, Ip / 2), *t = parts.pairs(BLOCK, k / 2);
    float *both = parts.floats(BLOCK, n), *sum = parts.floats(BLOCK, WIDTH);
    if (!failed) std::fill(t, t + BLOCK * k / 2, 0);
#pragma omp for
    for (i64 i = 0; i < N; i += BLOCK) {
      if (failed) continue;
      const i64 rows = std::min(BLOCK, N - i);
      const bool as_it_is = rows == BLOCK && I == Ip;
      if (!as_it_is) copy_rows(x + i * I, I, rows, BLOCK, I, Ip, copy);
      const pair* from = as_it_is ? reinterpret_cast<const pair*>(x + i * I) : copy;
      multiply(BLOCK, n, Ip / 2, from, Ip / 2, d, n, both, n, false);
      for (i64 j = 0; j < rows; j++) {
        half* row = reinterpret_cast<half*>(t) + j * k;
        for (i64 r = 0; r < R; r++) {
          const float value = u[(i + j) * R + r] = both[j * n + r] + both[j * n + R + r];
          split(value, row[r], row[R + r]);
          row[2 * R + r] = row[r];
        }
      }
      for (i64 o = 0; o < O; o += WIDTH) {
        const i64 width = std::min(WIDTH, O - o);
        multiply(BLOCK, width, k / 2, t, k / 2, v + o, O, sum, WIDTH, false);
        for (i64 j = 0; j < rows; j++)
          for (i64 c = 0; c < width; c++) {
            const i64 at = (i + j) * O + o + c;
            write(z + at, read(y[at]) + sum[j * WIDTH + c]);
          }
      }
    }
  }
  return failed;
}

// As `sum_outer` above, of x in bf16; u is multiplied as the sum of two.
int sum_outer(const float* u, const half* x, float* out, i64 N, i64 I, i64 R, float s, i64 threads) {
  constexpr i64 BLOCK = 256, WIDTH = 64;
  const i64 n = to_16(2 * R), Np = to_32(N);
  Buffer memory(bytes_of(n, Np / 2));
  if (!memory.data) return 1;
  pair* a = reinterpret_cast<pair*>(memory.data);
  std::fill(a, a + n * Np / 2, 0);
  half* rows_of_u = reinterpret_cast<half*>(a);
  for (i64 i = 0; i < N; i++)
    for (i64 r = 0; r < R; r++) split(u[i * R + r], rows_of_u[r * Np + i], rows_of_u[(R + r) * Np + i]);
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    const Tiles tiles;
    Buffer parts(bytes_of(BLOCK / 2, WIDTH) + bytes_of(n, WIDTH));
    failed = !parts.data;
    pair* block = reinterpret_cast<pair*>(parts.data);
    float* sum = reinterpret_cast<float*>(block + BLOCK / 2 * WIDTH);
#pragma omp for
    for (i64 j = 0; j < I; j += WIDTH) {
      if (failed) continue;
      for (i64 i = 0; i < Np; i += BLOCK) {
        const i64 rows = std::min(BLOCK, Np - i);
        pair_rows(x + i * I + j, I, N - i, rows, I - j, WIDTH, block);
        multiply(n, WIDTH, rows / 2, a + i / 2, Np / 2, block, WIDTH, sum, WIDTH, i > 0);
      }
      for (i64 r = 0; r < R; r++)
        for (i64 c = 0; c < std::min(WIDTH, I - j); c++)
          out[r * I + j + c] = s * (sum[r * WIDTH + c] + sum[(R + r) * WIDTH + c]);
    }
  }
  return failed;
}
#endif

struct Gelu {  // of every bf16 by its bits: x P(X <= x), X standard normal, and the derivative
  float value[65536], slope[65536];
  Gelu() {
    for (int32_t i = 0; i < 65536; i++) {
      const double x = read(half{static_cast<uint16_t>(i)}), below = 0.5 * std::erfc(-x * 0.70710678118654752);
      value[i] = static_cast<float>(x * below);
      slope[i] = static_cast<float>(below + x * 0.39894228040143268 * std::exp(-0.5 * x * x));
    }
  }
  static const Gelu& tables() {
    static const Gelu result;
    return result;
  }
};

}  // namespace

extern "C" {

// Each returns 0, or 1 where there is not enough memory; the results are then not to be read. Pointers to void are to
// bf16 where the flag of their name is not 0, else to fp32.

// y [N, H] = dropout(x), plus `residual` unless it is null
int dropout(const void* x, void* y, const float* residual, i64 N, i64 H, u64 seed, i64 threshold, i64 half_x,
            i64 half_y, i64 threads) {
  const Dropout dropout(seed, H, threshold);
  const auto run = [&](auto* x_type, auto* y_type) {
    const auto* from = static_cast<decltype(x_type)>(const_cast<void*>(x));
    auto* to = static_cast<decltype(y_type)>(y);
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
      Buffer bits(bytes_of(H / 2 + 2, 1));
      failed = !bits.data;
#pragma omp for
      for (i64 i = 0; i < N; i++)
        if (!failed)
          dropout.apply(i, H, from + i * H, to + i * H, reinterpret_cast<uint16_t*>(bits.data),
                        residual ? residual + i * H : nullptr);
    }
    return failed;
  };
  return with_types(run, half_x, half_y);
}

// y [n] = gelu(x) or, with `grad`, grad gelu'(x), all in bf16
int gelu(const void* x, const void* grad, void* y, i64 n, i64 threads) {
  const Gelu& tables = Gelu::tables();
  const auto *from = static_cast<const half*>(x), *g = static_cast<const half*>(grad);
  auto* to = static_cast<half*>(y);
  if (g) {
#pragma omp parallel for simd num_threads(threads)
    for (i64 i = 0; i < n; i++) write(to + i, read(g[i]) * tables.slope[from[i].bits]);
  } else {
#pragma omp parallel for simd num_threads(threads)
    for (i64 i = 0; i < n; i++) write(to + i, tables.value[from[i].bits]);
  }
  return 0;
}

// z [N, O] = y + s u up with u [N, R] = x down; x [N, I], y [N, O], which may be z; down [I, R] and up [R, O] by strides
// (row, column); O a multiple of W.
int add_low_rank(const void* x, const float* down, i64 down_row, i64 down_column, const float* up, i64 up_row,
                 i64 up_column, const void* y, void* z, float* u, i64 N, i64 I, i64 O, i64 R, float s, i64 half_x,
                 i64 half_y, i64 half_z, i64 threads) {
  const auto run = [&](auto* x_type, auto* y_type, auto* z_type) {
    return add_update(static_cast<decltype(x_type)>(const_cast<void*>(x)), down, down_row, down_column, up, up_row,
                      up_column, static_cast<decltype(y_type)>(const_cast<void*>(y)), static_cast<decltype(z_type)>(z),
                      u, N, I, O, R, s, threads);
  };
  return with_types(run, half_x, half_y, half_z);
}

// out [R, I] = s u^T x with u [N, R], x [N, I]
int low_rank_gradient(const float* u, const void* x, float* out, i64 N, i64 I, i64 R, float s, i64 half_x,
                      i64 threads) {
  const auto run = [&](auto* type) {
    return sum_outer(u, static_cast<decltype(type)>(const_cast<void*>(x)), out, N, I, R, s, threads);
  };
  return with_types(run, half_x);
}

// out [Q, A D], lse [Q, A]; q [Q, ...], k and v [N, ...] by their strides; relative tables [V, 2 S - 1, A, D] or null.
int attention(const void* q, i64 q_stride, const void* k, i64 k_stride, const void* v, i64 v_stride,
              const void* relative_key, const void* relative_query, i64 views, const i64* q_starts,
              const i64* k_starts, const i64* view_of, i64 sequences, i64 heads, i64 head_size, i64 longest,
              float scale, u64 seed, i64 threshold, i64 half, i64 threads, void* out, float* lse) {
  const auto run = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Attention<T> a{static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v), q_stride, k_stride,
                   v_stride, static_cast<const T*>(relative_key), static_cast<const T*>(relative_query), views, q_starts,
                   k_starts, view_of, sequences, heads, head_size, longest, scale, seed, threshold};
    return for_each_head(a, threads, [&](const Head<T>& s, char* memory) {
      return s.forward(memory, static_cast<T*>(out), lse);
    });
  };
  return with_types(run, half);
}

int attention_backward(const void* q, i64 q_stride, const void* k, i64 k_stride, const void* v, i64 v_stride,
                       const void* relative_key, const void* relative_query, i64 views, const i64* q_starts,
                       const i64* k_starts, const i64* view_of, i64 sequences, i64 heads, i64 head_size, i64 longest,
                       float scale, u64 seed, i64 threshold, i64 half, i64 threads, const float* lse,
                       const void* grad, void* grad_q, void* grad_k, void* grad_v) {
  const auto run = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Attention<T> a{static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v), q_stride, k_stride,
                   v_stride, static_cast<const T*>(relative_key), static_cast<const T*>(relative_query), views, q_starts,
                   k_starts, view_of, sequences, heads, head_size, longest, scale, seed, threshold};
    return for_each_head(a, threads, [&](const Head<T>& s, char* memory) {
      return s.backward(memory, lse, static_cast<const T*>(grad), static_cast<T*>(grad_q), static_cast<T*>(grad_k),
                        static_cast<T*>(grad_v));
    });
  };
  return with_types(run, half);
}

i64 vector_width() { return W; }

}  // extern "C"
