// Sixteen floats at a time: the small set of vector operations that ds_serve's CPU ops are written in.
//
// Vec16 is 16 fp32 lanes, Word16 is 16 32-bit words, each one fp32 or two bf16. With AVX512 they are
// registers; elsewhere a few shorter vectors (GCC/Clang extensions), which any x86-64 or ARM compiler
// knows. dot<T> is the heart: acc + a*b for fp32 words, acc + a.lo*b.lo + a.hi*b.hi for bf16.
// Rows in memory need no alignment. Nothing here knows attention or tensors.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include <immintrin.h>
#define DS_SERVE_AVX512 1
#endif

namespace ds_serve::vec {

constexpr int kLanes = 16;
using bf16 = uint16_t;  // bits of a bfloat16
#define DS_INLINE inline __attribute__((always_inline))

inline float bf16_to_float(bf16 x) {
  uint32_t bits = uint32_t(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline bf16 float_to_bf16(float x) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return bf16((bits >> 16) | 0x40);
  return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// 2^f for f in [0, 1), exactly 1 at 0: relative error 8.3e-8 (degree 5) or 8.6e-5 (degree 3, for bf16).
constexpr float kExp2[6] = {1.0f,
                            6.931513118e-01f,
                            2.401644501e-01f,
                            5.579991312e-02f,
                            9.017030305e-03f,
                            1.867130076e-03f};
constexpr float kExp2Short[4] = {1.0f, 6.951167866e-01f, 2.276449907e-01f, 7.706704231e-02f};
constexpr float kLog2e = 1.4426950408889634f;

#ifdef DS_SERVE_AVX512

using Vec16 = __m512;
using Word16 = __m512i;

DS_INLINE __mmask16 first_lanes(int n) { return n >= 16 ? __mmask16(0xffff) : __mmask16((1u << n) - 1); }
DS_INLINE Vec16 set1(float x) { return _mm512_set1_ps(x); }
DS_INLINE Vec16 load(const float* p) { return _mm512_loadu_ps(p); }
DS_INLINE Vec16 load(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
DS_INLINE void store(float* p, Vec16 x) { _mm512_storeu_ps(p, x); }
DS_INLINE void store(float* p, Vec16 x, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }
DS_INLINE Word16 load_words(const uint32_t* p) { return _mm512_loadu_si512(p); }
DS_INLINE Word16 load_words(const uint32_t* p, int n) { return _mm512_maskz_loadu_epi32(first_lanes(n), p); }
DS_INLINE Word16 set1_word(uint32_t x) { return _mm512_set1_epi32(int(x)); }

DS_INLINE Vec16 widen(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
DS_INLINE Vec16 load(const bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
DS_INLINE Vec16 load(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }

DS_INLINE __m256i narrow(Vec16 x) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  __m512i bits = _mm512_castps_si512(x);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
}
DS_INLINE void store(bf16* p, Vec16 x) { _mm256_storeu_si256((__m256i*)p, narrow(x)); }
DS_INLINE void store(bf16* p, Vec16 x, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(x)); }

DS_INLINE void store_words(uint32_t* p, Word16 x) { _mm512_storeu_si512(p, x); }

// Word j of x[i] becomes word i of x[j].
DS_INLINE void transpose(Word16 (&x)[kLanes]) {
  Word16 y[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)  // x[i + c]: of each group of 4 words the c-th, of 4 rows
#pragma GCC unroll 2
    for (int c = 0; c < 2; c++) {
      x[i + 2 * c] = _mm512_unpacklo_epi64(y[i + c], y[i + 2 + c]);
      x[i + 2 * c + 1] = _mm512_unpackhi_epi64(y[i + c], y[i + 2 + c]);
    }
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {  // then groups 0 and 2, or 1 and 3, of 8 rows
    y[c] = _mm512_shuffle_i32x4(x[c], x[4 + c], 0x88);
    y[4 + c] = _mm512_shuffle_i32x4(x[c], x[4 + c], 0xdd);
    y[8 + c] = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0x88);
    y[12 + c] = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0xdd);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {
    x[c] = _mm512_shuffle_i32x4(y[c], y[8 + c], 0x88);
    x[4 + c] = _mm512_shuffle_i32x4(y[4 + c], y[12 + c], 0x88);
    x[8 + c] = _mm512_shuffle_i32x4(y[c], y[8 + c], 0xdd);
    x[12 + c] = _mm512_shuffle_i32x4(y[4 + c], y[12 + c], 0xdd);
  }
}

// The bf16 of a and b in turn: of words 0..7, or 8..15.
template <bool Last>
DS_INLINE Word16 interleave(Word16 a, Word16 b) {
  const __m512i words = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i second = _mm512_slli_epi32(_mm512_add_epi32(words, _mm512_set1_epi32(32)), 16);
  const __m512i pairs = _mm512_or_si512(words, second);
  return _mm512_permutex2var_epi16(a, _mm512_add_epi16(pairs, _mm512_set1_epi16(Last ? 16 : 0)), b);
}

DS_INLINE Vec16 fma(Vec16 a, Vec16 b, Vec16 c) { return _mm512_fmadd_ps(a, b, c); }
DS_INLINE Vec16 max(Vec16 a, Vec16 b) { return _mm512_max_ps(a, b); }
DS_INLINE Vec16 min(Vec16 a, Vec16 b) { return _mm512_min_ps(a, b); }
DS_INLINE Vec16 abs(Vec16 a) { return _mm512_abs_ps(a); }
DS_INLINE Vec16 copy_sign(Vec16 magnitude, Vec16 sign) {
  return _mm512_or_ps(_mm512_abs_ps(magnitude), _mm512_and_ps(sign, _mm512_set1_ps(-0.0f)));
}
DS_INLINE float reduce_max(Vec16 a) { return _mm512_reduce_max_ps(a); }
DS_INLINE float reduce_add(Vec16 a) { return _mm512_reduce_add_ps(a); }
// Lanes [begin, end) of x, the others replaced.
DS_INLINE Vec16 keep_lanes(Vec16 x, int begin, int end, float replacement) {
  __mmask16 mask = __mmask16(first_lanes(end > 0 ? end : 0) & ~first_lanes(begin > 0 ? begin : 0));
  return _mm512_mask_mov_ps(_mm512_set1_ps(replacement), mask, x);
}

template <typename T>
DS_INLINE Vec16 dot(Vec16 acc, Word16 a, Word16 b);
template <>
DS_INLINE Vec16 dot<float>(Vec16 acc, Word16 a, Word16 b) {
  return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), acc);
}
template <>
DS_INLINE Vec16 dot<bf16>(Vec16 acc, Word16 a, Word16 b) {
#ifdef __AVX512BF16__
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
#else
  const __m512i high = _mm512_set1_epi32(int(0xffff0000));
  acc = dot<float>(acc, _mm512_slli_epi32(a, 16), _mm512_slli_epi32(b, 16));
  return dot<float>(acc, _mm512_and_si512(a, high), _mm512_and_si512(b, high));
#endif
}

// 2^x; exact enough for fp32, or, with Short, for a result that is rounded to bf16. 2^-inf is 0.
template <bool Short = false>
DS_INLINE Vec16 exp2(Vec16 x) {
  Vec16 f = _mm512_reduce_ps(x, 0x09);  // x - floor(x)
  Vec16 p;
  if constexpr (Short) {
    p = fma(set1(kExp2Short[3]), f, set1(kExp2Short[2]));
    p = fma(fma(p, f, set1(kExp2Short[1])), f, set1(kExp2Short[0]));
  } else {
    p = fma(set1(kExp2[5]), f, set1(kExp2[4]));
    p = fma(fma(p, f, set1(kExp2[3])), f, set1(kExp2[2]));
    p = fma(fma(p, f, set1(kExp2[1])), f, set1(kExp2[0]));
  }
  return _mm512_scalef_ps(p, x);  // p * 2^floor(x)
}

#else  // vector extensions, as wide as the processor's registers

#ifdef __AVX__
constexpr int kPartLanes = 8;
#else
constexpr int kPartLanes = 4;
#endif
constexpr int kParts = kLanes / kPartLanes;
typedef float FloatPart __attribute__((vector_size(4 * kPartLanes)));
typedef uint32_t WordPart __attribute__((vector_size(4 * kPartLanes)));
typedef int32_t IntPart __attribute__((vector_size(4 * kPartLanes)));
typedef uint16_t HalfPart __attribute__((vector_size(2 * kPartLanes)));

// An array of registers, not one long vector: compilers keep such vectors in memory.
struct Vec16 {
  FloatPart part[kParts];
};
struct Word16 {
  WordPart part[kParts];
};
#define DS_EACH _Pragma("GCC unroll 4") for (int i = 0; i < kParts; i++)

#define DS_OPERATOR(op)                                    \
  DS_INLINE Vec16 operator op(Vec16 a, Vec16 b) {          \
    DS_EACH a.part[i] = a.part[i] op b.part[i];            \
    return a;                                              \
  }
DS_OPERATOR(+)
DS_OPERATOR(-)
DS_OPERATOR(*)
DS_OPERATOR(/)
#undef DS_OPERATOR

DS_INLINE Vec16 set1(float x) {
  Vec16 out;
  DS_EACH out.part[i] = FloatPart{} + x;
  return out;
}
DS_INLINE Word16 set1_word(uint32_t x) {
  Word16 out;
  DS_EACH out.part[i] = WordPart{} + x;
  return out;
}
template <typename V, typename P>
DS_INLINE V load_parts(const P* p) {
  V out;
  DS_EACH std::memcpy(&out.part[i], p + i * kPartLanes, sizeof(out.part[i]));
  return out;
}
DS_INLINE Vec16 load(const float* p) { return load_parts<Vec16>(p); }
DS_INLINE Word16 load_words(const uint32_t* p) { return load_parts<Word16>(p); }
DS_INLINE Vec16 load(const bf16* p) {
  Vec16 out;
  DS_EACH {
    HalfPart half;
    std::memcpy(&half, p + i * kPartLanes, sizeof half);
    out.part[i] = (FloatPart)(__builtin_convertvector(half, WordPart) << 16);
  }
  return out;
}
DS_INLINE void store(float* p, Vec16 x) {
  DS_EACH std::memcpy(p + i * kPartLanes, &x.part[i], sizeof x.part[i]);
}
DS_INLINE void store(bf16* p, Vec16 x) {
  DS_EACH {
    WordPart bits = (WordPart)x.part[i];
    WordPart rounded = bits + 0x7fff + ((bits >> 16) & 1);
    WordPart nan = (WordPart)(x.part[i] != x.part[i]);
    HalfPart half = __builtin_convertvector(((rounded & ~nan) | ((bits | 0x400000) & nan)) >> 16, HalfPart);
    std::memcpy(p + i * kPartLanes, &half, sizeof half);
  }
}
// The first n lanes only.
template <typename P>
DS_INLINE auto load_first(const P* p, int n) {
  P copy[kLanes] = {};
  std::memcpy(copy, p, sizeof(P) * (n < kLanes ? n : kLanes));
  if constexpr (sizeof(P) == 4 && P(-1) > P(0)) {
    return load_words(copy);
  } else {
    return load(copy);
  }
}
DS_INLINE Vec16 load(const float* p, int n) { return load_first(p, n); }
DS_INLINE Vec16 load(const bf16* p, int n) { return load_first(p, n); }
DS_INLINE Word16 load_words(const uint32_t* p, int n) { return load_first(p, n); }
template <typename P>
DS_INLINE void store(P* p, Vec16 x, int n) {
  P copy[kLanes];
  store(copy, x);
  std::memcpy(p, copy, sizeof(P) * (n < kLanes ? n : kLanes));
}

DS_INLINE Vec16 fma(Vec16 a, Vec16 b, Vec16 c) { return a * b + c; }
DS_INLINE Vec16 max(Vec16 a, Vec16 b) {
  DS_EACH a.part[i] = a.part[i] > b.part[i] ? a.part[i] : b.part[i];
  return a;
}
DS_INLINE Vec16 min(Vec16 a, Vec16 b) {
  DS_EACH a.part[i] = a.part[i] < b.part[i] ? a.part[i] : b.part[i];
  return a;
}
DS_INLINE Vec16 abs(Vec16 a) {
  DS_EACH a.part[i] = (FloatPart)((WordPart)a.part[i] & 0x7fffffffu);
  return a;
}
DS_INLINE Vec16 copy_sign(Vec16 magnitude, Vec16 sign) {
  Vec16 out = abs(magnitude);
  DS_EACH out.part[i] = (FloatPart)((WordPart)out.part[i] | ((WordPart)sign.part[i] & 0x80000000u));
  return out;
}
DS_INLINE float reduce_max(Vec16 a) {
  float out = a.part[0][0];
  for (int i = 1; i < kLanes; i++) {
    const float x = a.part[i / kPartLanes][i % kPartLanes];
    out = x > out ? x : out;
  }
  return out;
}
DS_INLINE float reduce_add(Vec16 a) {
  float sums[4] = {};
  for (int i = 0; i < kLanes; i++) sums[i % 4] += a.part[i / kPartLanes][i % kPartLanes];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}
DS_INLINE Vec16 keep_lanes(Vec16 x, int begin, int end, float replacement) {
  for (int i = 0; i < kLanes; i++)
    if (i < begin || i >= end) x.part[i / kPartLanes][i % kPartLanes] = replacement;
  return x;
}

template <typename T>
DS_INLINE Vec16 dot(Vec16 acc, Word16 a, Word16 b) {
  DS_EACH {
    if constexpr (sizeof(T) == 4) {
      acc.part[i] += (FloatPart)a.part[i] * (FloatPart)b.part[i];
    } else {
      acc.part[i] += (FloatPart)(a.part[i] << 16) * (FloatPart)(b.part[i] << 16);
      acc.part[i] += (FloatPart)(a.part[i] & 0xffff0000u) * (FloatPart)(b.part[i] & 0xffff0000u);
    }
  }
  return acc;
}

template <bool Short = false>
DS_INLINE Vec16 exp2(Vec16 x) {
  const Vec16 bounded = min(max(x, set1(-127.0f)), set1(128.0f));
  DS_EACH {
    IntPart n = __builtin_convertvector(bounded.part[i], IntPart);
    n += __builtin_convertvector(n, FloatPart) > bounded.part[i];  // -1 where it holds: floor
    FloatPart f = bounded.part[i] - __builtin_convertvector(n, FloatPart);
    FloatPart p = FloatPart{} + kExp2[5];
#pragma GCC unroll 5
    for (int k = 4; k >= 0; k--) p = p * f + kExp2[k];
    p *= (FloatPart)((n + 127) << 23);  // 2^-127 is written as 0, 2^128 as infinity
    x.part[i] = x.part[i] != x.part[i] ? x.part[i] : p;
  }
  return x;
}

#undef DS_EACH
#endif

DS_INLINE Vec16 exp(Vec16 x) { return exp2(x * set1(kLog2e)); }

// tanh with an absolute error of about 1e-7.
DS_INLINE Vec16 tanh(Vec16 x) {
  Vec16 t = exp2(abs(x) * set1(-2.0f * kLog2e));
  return copy_sign((set1(1.0f) - t) / (set1(1.0f) + t), x);
}

}  // namespace ds_serve::vec
