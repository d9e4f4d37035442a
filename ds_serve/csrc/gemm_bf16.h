// A bf16 matrix product against weights packed once at load, for AVX512-BF16.
//
// Computes x[M, K] * W[N, K]^T with fp32 sums. W lies in panels [ceil(N/32)][ceil(K/2)][32][2]: one step of
// vdpbf16ps multiplies a pair of k for 16 columns, so a panel is read front to back with no shuffles, and one
// thread's panels are one unbroken stream. Columns past N and an odd last k are zeros.
//
// The functions here run inside the caller's parallel region, one thread's share each; they know no tensors.
// What becomes of the sums (bias, residual, SiLU) is the caller's epilogue, called on registers.
#pragma once
#ifdef __AVX512BF16__

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace ds_serve {

using bf16 = uint16_t;

constexpr int64_t PANEL = 32;      // columns of a panel: two registers of 16 sums
constexpr int64_t TILE_ROWS = 12;  // rows of a tile: 24 of 32 registers hold sums
constexpr int64_t CHUNK = 96;      // rows whose inputs stay in L2 while all panels pass by

constexpr int64_t AHEAD = 96 << 10;  // bytes of weights between what is multiplied and what is fetched into L2

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline __m512 widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
inline __m256i narrow(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }
inline __m512 rounded(__m512 v) { return widen(narrow(v)); }  // to bf16 and back, as a bf16 module would
inline __m512 load_bf16(const bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
inline __m512 load_bf16(const bf16* p, __mmask16 m) { return widen(_mm256_maskz_loadu_epi16(m, p)); }
inline void store_bf16(bf16* p, __m512 v, __mmask16 m) { _mm256_mask_storeu_epi16(p, m, narrow(v)); }
inline __mmask16 mask_upto(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }

// One thread's rectangle of the product: rows [m0, m1), panels [p0, p1).
struct Share {
  int64_t m0, m1, p0, p1;
};

// Splits by panels, so that each thread streams its own part of the weights, unless there are many rows and
// splitting them too balances better. Threads beyond the grid get an empty share.
inline Share share_of(int64_t thread, int64_t threads, int64_t m, int64_t panels) {
  int64_t row_tiles = ceil_div(m, TILE_ROWS), best = INT64_MAX, tm = 1, tn = 1;
  for (int64_t a = 1; a <= threads && (a == 1 || row_tiles >= 8 * a); ++a) {
    int64_t b = threads / a;
    int64_t cost = ceil_div(row_tiles, a) * ceil_div(panels, b);
    if (cost < best) best = cost, tm = a, tn = b;
  }
  if (thread >= tm * tn) return {0, 0, 0, 0};
  int64_t i = thread / tn, j = thread % tn;
  auto cut = [](int64_t total, int64_t parts, int64_t at) { return total * at / parts; };
  return {std::min(m, cut(row_tiles, tm, i) * TILE_ROWS), std::min(m, cut(row_tiles, tm, i + 1) * TILE_ROWS),
          cut(panels, tn, j), cut(panels, tn, j + 1)};
}

// Sums of R rows by one panel, left in sum[R][2]. `ahead` is weight memory to bring into L2 meanwhile,
// LINES cache lines for each pair of k.
template <int R, int LINES>
inline __attribute__((always_inline)) void tile(const bf16* x, int64_t ldx, const bf16* panel, int64_t pairs,
                                                const char* ahead, __m512 (&sum)[R][2]) {
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; ++k) {
    __m512bh w0 = (__m512bh)_mm512_loadu_si512(panel + k * 64);
    __m512bh w1 = (__m512bh)_mm512_loadu_si512(panel + k * 64 + 32);
    if (LINES > 0) _mm_prefetch(ahead + k * LINES * 64, _MM_HINT_T1);
    if (LINES > 1) _mm_prefetch(ahead + k * LINES * 64 + 64, _MM_HINT_T1);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      __m512bh v = (__m512bh)_mm512_set1_epi32(*(const int32_t*)(x + r * ldx + 2 * k));
      sum[r][0] = _mm512_dpbf16_ps(sum[r][0], v, w0);
      sum[r][1] = _mm512_dpbf16_ps(sum[r][1], v, w1);
    }
  }
}

template <int R, int LINES, class Epilogue>
__attribute__((noinline)) void tile_rows(const bf16* x, int64_t ldx, const bf16* panel, int64_t pairs,
                                         const char* ahead, int64_t row, int64_t p, const Epilogue& epilogue) {
  __m512 sum[R][2];
  tile<R, LINES>(x, ldx, panel, pairs, ahead, sum);
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) epilogue(row + r, p, sum[r][0], sum[r][1]);
}

template <int LINES, class Epilogue>
void tile_any(int64_t rows, const bf16* x, int64_t ldx, const bf16* panel, int64_t pairs, const char* ahead,
              int64_t row, int64_t p, const Epilogue& e) {
  switch (rows) {
#define DS_SERVE_ROWS(R) \
  case R: return tile_rows<R, LINES>(x, ldx, panel, pairs, ahead, row, p, e);
    DS_SERVE_ROWS(1) DS_SERVE_ROWS(2) DS_SERVE_ROWS(3) DS_SERVE_ROWS(4) DS_SERVE_ROWS(5) DS_SERVE_ROWS(6)
    DS_SERVE_ROWS(7) DS_SERVE_ROWS(8) DS_SERVE_ROWS(9) DS_SERVE_ROWS(10) DS_SERVE_ROWS(11) DS_SERVE_ROWS(12)
#undef DS_SERVE_ROWS
  }
}

// Multiplies rows [0, m) at x by panels [p0, p1), calling epilogue(row0 + row, panel, sums 0..15, sums 16..31).
// x must be readable up to an even K. The first two tiles of rows fetch weights AHEAD bytes further on, the last
// panels those at `after`, which is what this thread reads next (or null).
template <class Epilogue>
void multiply(const bf16* x, int64_t ldx, int64_t m, int64_t row0, const bf16* packed, int64_t pairs, int64_t p0,
              int64_t p1, const char* after, const Epilogue& epilogue) {
  if (m <= 0) return;
  int64_t tiles = ceil_div(m, TILE_ROWS), bytes = pairs * 2 * PANEL * sizeof(bf16), total = (p1 - p0) * bytes;
  const char* stream = (const char*)packed + p0 * bytes;
  for (int64_t p = p0; p < p1; ++p) {
    const bf16* panel = packed + p * pairs * 2 * PANEL;
    for (int64_t t = 0; t < tiles; ++t) {
      int64_t from = m * t / tiles, rows = m * (t + 1) / tiles - from;
      int64_t at = (p - p0) * bytes + t * bytes / 2 + AHEAD;
      const char* ahead = at < total ? stream + at : after ? after + (at - total) : nullptr;
      const bf16* in = x + from * ldx;
      if (t >= 2 || !ahead)
        tile_any<0>(rows, in, ldx, panel, pairs, nullptr, row0 + from, p, epilogue);
      else if (tiles == 1)
        tile_any<2>(rows, in, ldx, panel, pairs, ahead, row0 + from, p, epilogue);
      else
        tile_any<1>(rows, in, ldx, panel, pairs, ahead, row0 + from, p, epilogue);
    }
  }
}

// RMSNorm of one row as transformers' bf16 modules round it: fp32 statistics, bf16(x * r), then bf16(w * that).
inline void rms_norm_row(const bf16* x, const bf16* w, bf16* out, int64_t n, float eps) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 16) {
    __m512 v = load_bf16(x + i, mask_upto(n - i));
    squares = _mm512_fmadd_ps(v, v, squares);
  }
  __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / (float)n + eps));
  for (int64_t i = 0; i < n; i += 16) {
    __mmask16 m = mask_upto(n - i);
    __m512 v = rounded(_mm512_mul_ps(load_bf16(x + i, m), scale));
    store_bf16(out + i, _mm512_mul_ps(v, load_bf16(w + i, m)), m);
  }
}

// exp to about 1e-7 relative: 2^n times a polynomial on [-ln2/2, ln2/2]; saturates to 0 and infinity.
inline __m512 exp_ps(__m512 x) {
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-104.0f)), _mm512_set1_ps(89.0f));
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
  __m512 y = _mm512_set1_ps(1.0f / 720);
  for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(y, n);
}

inline __m512 silu_ps(__m512 x) {
  __m512 e = exp_ps(_mm512_sub_ps(_mm512_setzero_ps(), x));
  return _mm512_div_ps(x, _mm512_add_ps(e, _mm512_set1_ps(1.0f)));
}

}  // namespace ds_serve
#endif  // __AVX512BF16__
