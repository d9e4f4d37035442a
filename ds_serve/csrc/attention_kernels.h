// The inner loops of paged attention: a few query rows against up to kRange keys that lie in KV blocks.
//
// Rows are (query, head of the KV group) pairs, so that all heads of a group share each load of K and V.
// Scores are kept in units of log2, so that the softmax is made of powers of two. Knows neither tensors
// nor threads; paged_attention.cpp calls it. The scheme is flash attention's online softmax
// (Dao et al. 2022, arXiv:2205.14135).
#pragma once

#include <algorithm>

#include "vec.h"

namespace ds_serve {

constexpr int kSub = 16;            // tokens in one line of K
constexpr int kRange = 256;         // keys in one softmax update; ranges begin at multiples of it
constexpr int kMicroRows = 6;       // query rows whose sums stay in registers ...
#ifdef DS_SERVE_AVX512
constexpr int kWide = 4;            // ... for so many times 16 keys or columns
#else
constexpr int kWide = 1;
#endif
constexpr float kNoScore = -1e30f;  // below any score, and finite: a row without visible keys stays exact
constexpr float kMasked = -__builtin_inff();

template <typename T>
constexpr int kPerWord = 4 / sizeof(T);  // elements of T in a 32-bit word: 1 fp32 or 2 bf16

// Where a range's keys and values lie: pointers to the lines of each 16 tokens.
// Past the last, k is padded with any of its pointers, since it is prefetched kAhead lines in advance.
constexpr int kAhead = 4;
struct Range {
  int64_t first_key;
  const uint32_t* k[kRange / kSub + kAhead];
  const uint32_t* v[kRange / kSub];
};

// Makes the V line of 16 tokens whose values are the first v_dim columns of their keys, from their K line.
template <typename T>
void values_of_keys(const uint32_t* k_line, int v_dim, uint32_t* v_line) {
  constexpr int kWord = kPerWord<T>;
  int d = 0;
#ifdef DS_SERVE_AVX512
  for (; d + kSub * kWord <= v_dim; d += kSub * kWord) {
    vec::Word16 x[kSub];
#pragma GCC unroll 16
    for (int i = 0; i < kSub; i++) x[i] = vec::load_words(k_line + (d / kWord + i) * kSub);
    vec::transpose(x);
    uint32_t* out = v_line + d;
#pragma GCC unroll 16
    for (int t = 0; t < kSub; t += kWord, out += v_dim) {
      if constexpr (kWord == 1) {
        vec::store_words(out, x[t]);
      } else {
        vec::store_words(out, vec::interleave<false>(x[t], x[t + 1]));
        vec::store_words(out + kSub, vec::interleave<true>(x[t], x[t + 1]));
      }
    }
  }
#endif
  const T* k = reinterpret_cast<const T*>(k_line);
  T* v = reinterpret_cast<T*>(v_line);
  for (; d < v_dim; d++)
    for (int t = 0; t < kSub; t++)
      v[(t / kWord * v_dim + d) * kWord + t % kWord] = k[(d / kWord * kSub + t) * kWord + d % kWord];
}

// Query rows of one KV head, and the state of their softmax.
struct Tile {
  int rows;
  int k_words;           // words of one query: Dk / kPerWord
  int v_dim, v_stride;   // Dv, and Dv rounded up to 16
  const uint32_t* q;     // [rows][k_words]
  float* out;            // [rows][v_stride] sums of p * v
  float* top;            // [rows] largest score yet
  float* lane_sums;      // [rows][16] sums of p
  const int64_t* low;    // [rows] first visible key, not decreasing
  const int64_t* high;   // [rows] last visible key, not decreasing
  const float** bias;    // [rows] what is added to a row's scores, by the key's position, in units of e; null for none
  int64_t bias_length;   // keys that each bias is given for
  float scale;           // of q.k: gives log2 units, or tanh's argument where there is a cap
  float cap;             // soft cap in log2 units; 0 for none
  float* scores;         // [kMicroRows][kRange] scratch
  uint32_t* probs;       // [kMicroRows][kRange / kPerWord] scratch
  uint32_t* values;      // V lines of a range, where values are columns of the keys
};

// Few rows wait for memory: then the next keys and these keys' values are fetched meanwhile.
template <typename T, int M, int N>
DS_INLINE void score_blocks(const uint32_t* q, int k_words, const uint32_t* const* k, const uint32_t* const* v,
                            float scale, float* out) {
  vec::Vec16 acc[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) acc[m][n] = vec::set1(0.0f);
  for (int d = 0; d < k_words; d++) {
    vec::Word16 key[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      key[n] = vec::load_words(k[n] + d * kSub);
      if constexpr (M <= 3) {
        __builtin_prefetch(k[n + kAhead] + d * kSub);
        __builtin_prefetch(v[n] + d * kSub);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      vec::Word16 query = vec::set1_word(q[m * k_words + d]);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) acc[m][n] = vec::dot<T>(acc[m][n], key[n], query);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) vec::store(out + m * kRange + n * kSub, acc[m][n] * vec::set1(scale));
}

template <typename T, int M>
void score(const Tile& tile, int row, const Range& range, int begin, int end) {
  const uint32_t* q = tile.q + int64_t(row) * tile.k_words;
  auto blocks = [&]<int N>(int b) {
    score_blocks<T, M, N>(q, tile.k_words, range.k + b, range.v + b, tile.scale, tile.scores + b * kSub);
  };
  int b = begin;
  for (; b + kWide <= end; b += kWide) blocks.template operator()<kWide>(b);
  if constexpr (kWide == 4) {
    switch (end - b) {
      case 3: blocks.template operator()<3>(b); break;
      case 2: blocks.template operator()<2>(b); break;
      case 1: blocks.template operator()<1>(b); break;
    }
  }
}

// Adds to one row's scores of blocks [begin, end) their keys' biases. What the last block has beyond the
// biases is masked later: no visible key is without one.
inline void add_bias(const Tile& tile, int row, float* scores, int64_t first_key, int begin, int end) {
  const float* bias = tile.bias[row] + first_key;
  for (int b = begin; b < end; b++) {
    const int64_t lanes = std::min<int64_t>(tile.bias_length - first_key - b * kSub, kSub);
    const vec::Vec16 own = vec::load(bias + b * kSub, int(lanes));
    vec::store(scores + b * kSub, vec::fma(own, vec::set1(vec::kLog2e), vec::load(scores + b * kSub)));
  }
}

// Masks one row's scores of blocks [begin, end) and returns their largest.
inline float mask_and_max(const Tile& tile, int row, float* scores, int64_t first_key, int begin, int end) {
  const int low = int(std::clamp<int64_t>(tile.low[row] - first_key, 0, kRange));
  const int high = int(std::clamp<int64_t>(tile.high[row] + 1 - first_key, 0, kRange));
  if (tile.cap != 0.0f)
    for (int b = begin; b < end; b++)
      vec::store(scores + b * kSub, vec::tanh(vec::load(scores + b * kSub)) * vec::set1(tile.cap));
  if (tile.bias) add_bias(tile, row, scores, first_key, begin, end);
  auto mask = [&](int b) {
    vec::Vec16 x = vec::load(scores + b * kSub);
    vec::store(scores + b * kSub, vec::keep_lanes(x, low - b * kSub, high - b * kSub, kMasked));
  };
  const int whole_begin = (low + kSub - 1) / kSub, whole_end = high / kSub;
  for (int b = begin; b < std::min(whole_begin, end); b++) mask(b);
  for (int b = std::max(whole_end, begin); b < end; b++) mask(b);
  vec::Vec16 top = vec::set1(kNoScore), other = top;
  int b = begin;
  for (; b + 2 <= end; b += 2) {
    top = vec::max(top, vec::load(scores + b * kSub));
    other = vec::max(other, vec::load(scores + (b + 1) * kSub));
  }
  if (b < end) top = vec::max(top, vec::load(scores + b * kSub));
  return vec::reduce_max(vec::max(top, other));
}

// Turns scores into unnormalised probabilities; factors become what earlier sums must be scaled by.
template <typename T, int M>
void softmax(const Tile& tile, int row, const Range& range, int begin, int end, float* factors) {
  float shift[kSub] = {};
  for (int m = 0; m < M; m++) {
    float* scores = tile.scores + m * kRange;
    float top = mask_and_max(tile, row + m, scores, range.first_key, begin, end);
    top = std::max(top, tile.top[row + m]);
    shift[m] = tile.top[row + m] - top;
    tile.top[row + m] = top;
  }
  vec::store(factors, vec::exp2(vec::load(shift)));
  for (int m = 0; m < M; m++) {
    const float* scores = tile.scores + m * kRange;
    T* probs = reinterpret_cast<T*>(tile.probs + m * (kRange / kPerWord<T>));
    float* sums = tile.lane_sums + (row + m) * kSub;
    const vec::Vec16 top = vec::set1(tile.top[row + m]);
    vec::Vec16 sum = vec::load(sums) * vec::set1(factors[m]);
    for (int b = begin; b < end; b++) {
      vec::Vec16 p = vec::exp2<kPerWord<T> == 2>(vec::load(scores + b * kSub) - top);
      sum = sum + p;
      vec::store(probs + b * kSub, p);
    }
    vec::store(sums, sum);
  }
}

template <typename T, int M, int N, bool Partial>
DS_INLINE void weigh_columns(const Tile& tile, int row, const Range& range, int begin, int end,
                             const float* factors, int column) {
  constexpr int kSteps = kSub / kPerWord<T>;
  const int lanes = Partial ? tile.v_dim - column : kSub;
  float* out = tile.out + int64_t(row) * tile.v_stride + column;
  vec::Vec16 acc[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++)
      acc[m][n] = vec::load(out + m * tile.v_stride + n * kSub) * vec::set1(factors[m]);
  for (int b = begin; b < end; b++) {
    const uint32_t* v = range.v[b] + column;
    const uint32_t* probs = tile.probs + b * kSteps;
#pragma GCC unroll 2
    for (int s = 0; s < kSteps; s++, v += tile.v_dim) {
      vec::Word16 value[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; n++)
        value[n] = Partial ? vec::load_words(v + n * kSub, lanes) : vec::load_words(v + n * kSub);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        vec::Word16 p = vec::set1_word(probs[m * (kRange / kPerWord<T>) + s]);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) acc[m][n] = vec::dot<T>(acc[m][n], value[n], p);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) vec::store(out + m * tile.v_stride + n * kSub, acc[m][n]);
}

// One softmax update of rows [row, row + M) with the keys of blocks [begin, end) of the range.
template <typename T, int M>
void update(const Tile& tile, int row, const Range& range, int begin, int end) {
  float factors[kSub];
  score<T, M>(tile, row, range, begin, end);
  softmax<T, M>(tile, row, range, begin, end, factors);
  int column = 0;
  for (; column + kWide * kSub <= tile.v_dim; column += kWide * kSub)
    weigh_columns<T, M, kWide, false>(tile, row, range, begin, end, factors, column);
  if (kWide > 2 && column + 2 * kSub <= tile.v_dim) {
    weigh_columns<T, M, 2, false>(tile, row, range, begin, end, factors, column);
    column += 2 * kSub;
  }
  for (; column + kSub <= tile.v_dim; column += kSub)
    weigh_columns<T, M, 1, false>(tile, row, range, begin, end, factors, column);
  if (column < tile.v_dim) weigh_columns<T, M, 1, true>(tile, row, range, begin, end, factors, column);
}

// Brings all keys of the range that any row of the tile sees into the tile's sums.
template <typename T>
void attend_range(const Tile& tile, const Range& range) {
  for (int row = 0; row < tile.rows; row += kMicroRows) {
    const int count = std::min(kMicroRows, tile.rows - row);
    const int64_t first = std::max(tile.low[row], range.first_key) - range.first_key;
    const int64_t last = std::min(tile.high[row + count - 1] - range.first_key, int64_t(kRange - 1));
    if (first > last) continue;
    const int begin = int(first / kSub), end = int(last / kSub) + 1;
    switch (count) {
      case 1: update<T, 1>(tile, row, range, begin, end); break;
      case 2: update<T, 2>(tile, row, range, begin, end); break;
      case 3: update<T, 3>(tile, row, range, begin, end); break;
      case 4: update<T, 4>(tile, row, range, begin, end); break;
      case 5: update<T, 5>(tile, row, range, begin, end); break;
      default: update<T, 6>(tile, row, range, begin, end); break;
    }
  }
}

}  // namespace ds_serve
