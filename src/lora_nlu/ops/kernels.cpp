// Dropout, the low-rank update and attention of a training step: CPU, any SIMD width; fp32 inside, while tensors are
// fp32 or bf16 (`half`).
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
  float* floats(i64 rows, i64 columns = 1) {
    float* p = next ? reinterpret_cast<float*>(next + used) : nullptr;
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
  const T *q, *k, *v;                         // [rows, stride]
  i64 q_stride, k_stride, v_stride;
  const float *relative_key, *relative_query;  // [A, V, R, Dp], R = 2 S - 1 rows by descending, ascending distance
  const float *relative_key_t, *relative_query_t;  // the same as [A, V, Dp, Rp]
  i64 views;
  const i64 *q_starts, *k_starts, *view_of;  // [B + 1], [B + 1], [B]
  i64 sequences, heads, head_size, longest;
  float scale;
  u64 seed;
  i64 threshold;
};

constexpr i64 BAND = 48;  // rows whose products with the table are formed together

template <class T>
struct Sequence {  // one head of one sequence
  const Attention<T>& a;
  i64 M, L, D, Dp, Lp, R, Rp, q_row, k_row, head, table;

  Sequence(const Attention<T>& a, i64 b, i64 head)
      : a(a), M(a.q_starts[b + 1] - a.q_starts[b]), L(a.k_starts[b + 1] - a.k_starts[b]), D(a.head_size),
        Dp(padded(D)), Lp(padded(L)), R(2 * a.longest - 1), Rp(padded(R + W)), q_row(a.q_starts[b]),
        k_row(a.k_starts[b]), head(head), table(head * a.views + a.view_of[b]) {}

  // How many rows of the table, one after another, so many rows of one side meet: one a distance that occurs.
  static i64 run(i64 rows, i64 others) { return rows + others - 1; }

  // s [M, Lp] += both relative products; q [M, Dp] scaled, k [L, Dp] and its scale applied to the product.
  void add_relative(const float* q, const float* k, float* s, float* band) const {
    if (a.relative_key) {
      const float* t = a.relative_key_t + table * Dp * Rp;
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
      const float* t = a.relative_query_t + table * Dp * Rp;
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
      const float* t = a.relative_key + table * R * Dp;
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
      const float* t = a.relative_query + table * R * Dp;
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

struct Tables {  // the relative tables of all heads and views: rows padded to Dp, and transposed
  Buffer memory;
  float *rows[2], *columns[2];

  template <class T>
  Tables(Attention<T>& a, const float* key, const float* query, int threads)
      : memory(key || query ? 2 * size(a) : 0) {
    const float* from[2] = {key, query};
    const i64 D = a.head_size, Dp = padded(D), R = 2 * a.longest - 1, Rp = padded(R + W), n = a.heads * a.views;
    if (!memory.data) return;
    float* next = reinterpret_cast<float*>(memory.data);
    for (int t = 0; t < 2; t++) {
      rows[t] = columns[t] = nullptr;
      if (!from[t]) continue;
      rows[t] = next;
      columns[t] = next + n * R * Dp;
      next += n * (R * Dp + Dp * Rp) + W;  // a last vector may be read past the end
      std::fill(next - W, next, 0.0f);
      float *r = rows[t], *c = columns[t];
      const float* f = from[t];
#pragma omp parallel for num_threads(threads)
      for (i64 i = 0; i < n; i++) {  // f is [V, R, A, D]
        const i64 head = i / a.views, view = i % a.views;
        take_rows(f + view * R * a.heads * D + head * D, a.heads * D, R, D, Dp, 1, r + i * R * Dp);
        transpose(r + i * R * Dp, R, Dp, Dp, Rp, c + i * Dp * Rp);
      }
    }
    a.relative_key = rows[0], a.relative_query = rows[1];
    a.relative_key_t = columns[0], a.relative_query_t = columns[1];
  }

  template <class T>
  static size_t size(const Attention<T>& a) {
    const i64 Dp = padded(a.head_size), R = 2 * a.longest - 1;
    return bytes_of(a.heads * a.views * Dp, R + padded(R + W)) + bytes_of(W, 1);
  }
};

// run(sequence, memory) for each head of each sequence; without memory it returns how many bytes it needs.
template <class T, class Run>
int for_each_head(Attention<T>& a, const float* relative_key, const float* relative_query, i64 threads, Run run) {
  Tables tables(a, relative_key, relative_query, threads);
  if (!tables.memory.data) return 1;
  size_t bytes = 0;
  for (i64 b = 0; b < a.sequences; b++) bytes = std::max(bytes, run(Sequence<T>(a, b, 0), nullptr));
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    Buffer memory(bytes);
    failed = !memory.data;
#pragma omp for schedule(dynamic)
    for (i64 i = a.sequences * a.heads - 1; i >= 0; i--)
      if (!failed) run(Sequence<T>(a, i / a.heads, i % a.heads), memory.data);
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

// out [Q, A D] and lse [Q, A]; q [Q, ...], k and v [N, ...] by their strides; relative tables [V, 2 S - 1, A, D] or null.
int attention(const void* q, i64 q_stride, const void* k, i64 k_stride, const void* v, i64 v_stride,
              const float* relative_key, const float* relative_query, i64 views, const i64* q_starts,
              const i64* k_starts, const i64* view_of, i64 sequences, i64 heads, i64 head_size, i64 longest,
              float scale, u64 seed, i64 threshold, i64 half, i64 threads, void* out, float* lse) {
  const auto run = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Attention<T> a{static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v), q_stride, k_stride,
                   v_stride, nullptr, nullptr, nullptr, nullptr, views, q_starts, k_starts, view_of, sequences, heads,
                   head_size, longest, scale, seed, threshold};
    return for_each_head(a, relative_key, relative_query, threads, [&](const Sequence<T>& s, char* memory) {
      return s.forward(memory, static_cast<T*>(out), lse);
    });
  };
  return with_types(run, half);
}

int attention_backward(const void* q, i64 q_stride, const void* k, i64 k_stride, const void* v, i64 v_stride,
                       const float* relative_key, const float* relative_query, i64 views, const i64* q_starts,
                       const i64* k_starts, const i64* view_of, i64 sequences, i64 heads, i64 head_size, i64 longest,
                       float scale, u64 seed, i64 threshold, i64 half, i64 threads, const float* lse,
                       const void* grad, void* grad_q, void* grad_k, void* grad_v) {
  const auto run = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Attention<T> a{static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v), q_stride, k_stride,
                   v_stride, nullptr, nullptr, nullptr, nullptr, views, q_starts, k_starts, view_of, sequences, heads,
                   head_size, longest, scale, seed, threshold};
    return for_each_head(a, relative_key, relative_query, threads, [&](const Sequence<T>& s, char* memory) {
      return s.backward(memory, lse, static_cast<const T*>(grad), static_cast<T*>(grad_q), static_cast<T*>(grad_k),
                        static_cast<T*>(grad_v));
    });
  };
  return with_types(run, half);
}

i64 vector_width() { return W; }

}  // extern "C"
