// Sixteen floats at a time: the small set of vector operations that ds_serve's CPU ops are written in.
//
// Vec16 is 16 fp32 lanes, Word16 is 16 32-bit words, each one fp32 or two bf16. With AVX512 they are
// registers; elsewhere GCC/Clang vector extensions, which any x86-64 or ARM compiler lowers to what the
// processor has. dot<T> is the heart: acc + a*b for fp32 words, acc + a.lo*b.lo + a.hi*b.hi for bf16.
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

#else  // vector extensions

typedef float Vec16 __attribute__((vector_size(64)));
typedef uint32_t Word16 __attribute__((vector_size(64)));
typedef int32_t Int16 __attribute__((vector_size(64)));
typedef uint16_t Half16 __attribute__((vector_size(32)));

DS_INLINE Vec16 set1(float x) { return Vec16{} + x; }
DS_INLINE Word16 set1_word(uint32_t x) { return Word16{} + x; }
template <typename V, typename P>
DS_INLINE V load_bytes(const P* p, int n) {
  V out{};
  std::memcpy(&out, p, sizeof(P) * (n < 16 ? n : 16));
  return out;
}
DS_INLINE Vec16 load(const float* p) { return load_bytes<Vec16>(p, 16); }
DS_INLINE Vec16 load(const float* p, int n) { return load_bytes<Vec16>(p, n); }
DS_INLINE void store(float* p, Vec16 x) { std::memcpy(p, &x, 64); }
DS_INLINE void store(float* p, Vec16 x, int n) { std::memcpy(p, &x, 4 * (n < 16 ? n : 16)); }
DS_INLINE Word16 load_words(const uint32_t* p) { return load_bytes<Word16>(p, 16); }
DS_INLINE Word16 load_words(const uint32_t* p, int n) { return load_bytes<Word16>(p, n); }
DS_INLINE Vec16 widen(Half16 x) { return (Vec16)(__builtin_convertvector(x, Word16) << 16); }
DS_INLINE Vec16 load(const bf16* p) { return widen(load_bytes<Half16>(p, 16)); }
DS_INLINE Vec16 load(const bf16* p, int n) { return widen(load_bytes<Half16>(p, n)); }
DS_INLINE Half16 narrow(Vec16 x) {
  Word16 bits = (Word16)x;
  Word16 rounded = bits + 0x7fff + ((bits >> 16) & 1);
  Word16 nan = (Word16)(x != x);
  return __builtin_convertvector(((rounded & ~nan) | ((bits | 0x400000) & nan)) >> 16, Half16);
}
DS_INLINE void store(bf16* p, Vec16 x) {
  Half16 h = narrow(x);
  std::memcpy(p, &h, 32);
}
DS_INLINE void store(bf16* p, Vec16 x, int n) {
  Half16 h = narrow(x);
  std::memcpy(p, &h, 2 * (n < 16 ? n : 16));
}
DS_INLINE Vec16 fma(Vec16 a, Vec16 b, Vec16 c) { return a * b + c; }
DS_INLINE Vec16 max(Vec16 a, Vec16 b) { return a > b ? a : b; }
DS_INLINE Vec16 min(Vec16 a, Vec16 b) { return a < b ? a : b; }
DS_INLINE Vec16 abs(Vec16 a) { return (Vec16)((Word16)a & 0x7fffffffu); }
DS_INLINE Vec16 copy_sign(Vec16 magnitude, Vec16 sign) {
  return (Vec16)(((Word16)magnitude & 0x7fffffffu) | ((Word16)sign & 0x80000000u));
}
DS_INLINE float reduce_max(Vec16 a) {
  float out = a[0];
  for (int i = 1; i < 16; i++) out = a[i] > out ? a[i] : out;
  return out;
}
DS_INLINE float reduce_add(Vec16 a) {
  float part[4] = {};
  for (int i = 0; i < 16; i++) part[i % 4] += a[i];
  return (part[0] + part[1]) + (part[2] + part[3]);
}
DS_INLINE Vec16 keep_lanes(Vec16 x, int begin, int end, float replacement) {
  const Int16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return ((lane >= begin) & (lane < end)) ? x : set1(replacement);
}

template <typename T>
DS_INLINE Vec16 dot(Vec16 acc, Word16 a, Word16 b);
template <>
DS_INLINE Vec16 dot<float>(Vec16 acc, Word16 a, Word16 b) {
  return acc + (Vec16)a * (Vec16)b;
}
template <>
DS_INLINE Vec16 dot<bf16>(Vec16 acc, Word16 a, Word16 b) {
  acc = dot<float>(acc, a << 16, b << 16);
  return dot<float>(acc, a & 0xffff0000u, b & 0xffff0000u);
}

template <bool Short = false>
DS_INLINE Vec16 exp2(Vec16 x) {
  Vec16 bounded = min(max(x, set1(-127.0f)), set1(128.0f));
  Int16 n = __builtin_convertvector(bounded, Int16);
  n += (__builtin_convertvector(n, Vec16) > bounded);  // the comparison is -1 where it holds: floor
  Vec16 f = bounded - __builtin_convertvector(n, Vec16);
  Vec16 p = set1(kExp2[5]);
  for (int i = 4; i >= 0; i--) p = fma(p, f, set1(kExp2[i]));
  Vec16 result = p * (Vec16)((n + 127) << 23);  // 2^-127 is written as 0, 2^128 as infinity
  return x != x ? x : result;
}

#endif

DS_INLINE Vec16 exp(Vec16 x) { return exp2(x * set1(kLog2e)); }

// tanh with an absolute error of about 1e-7.
DS_INLINE Vec16 tanh(Vec16 x) {
  Vec16 t = exp2(abs(x) * set1(-2.0f * kLog2e));
  return copy_sign((set1(1.0f) - t) / (set1(1.0f) + t), x);
}

}  // namespace ds_serve::vec
