// SPDX-License-Identifier: Apache-2.0
// Vectors of one instruction set by the compilers' vector extensions, and conversion from and to 16-bit floats.
// Included by the sources that are compiled once per set; everything is `static inline` inside STK_ISA's own namespace
// and nothing of the standard library is used, so that no function compiled for a wider set can be picked by the linker
// for a narrower one.
#pragma once
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define STK_INLINE static inline __attribute__((always_inline))

namespace stk {
namespace STK_ISA {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;  // SSE2, NEON
#endif

template <class Real>
struct Vec;
template <>
struct Vec<float> {
  static constexpr int lanes = kBytes / 4;
  using type __attribute__((vector_size(kBytes))) = float;
  using itype __attribute__((vector_size(kBytes))) = int32_t;
  using bits = int32_t;
  static constexpr bits abs_mask = 0x7fffffff, infinity = 0x7f800000;
  static constexpr int mantissa = 23, bias2 = 254;
};
template <>
struct Vec<double> {
  static constexpr int lanes = kBytes / 8;
  using type __attribute__((vector_size(kBytes))) = double;
  using itype __attribute__((vector_size(kBytes))) = int64_t;
  using bits = int64_t;
  static constexpr bits abs_mask = 0x7fffffffffffffff, infinity = 0x7ff0000000000000;
  static constexpr int mantissa = 52, bias2 = 2046;
};

// Vectors are kept in std::array-like plain arrays; unaligned access goes through memcpy, which compiles to one move.
template <class V>
STK_INLINE V load_bytes(const void *p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
STK_INLINE void store_bytes(void *p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}
template <class To, class From>
STK_INLINE To bitcast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bitcast");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

struct bf16 {
  uint16_t raw;
};
struct f16 {
  uint16_t raw;
};

// -- across the lanes of one vector: halves are combined until one lane is left, in the same order every time ------------

struct Add {
  template <class V>
  STK_INLINE V of(V a, V b) {
    return a + b;
  }
};
struct Max {
  template <class V>
  STK_INLINE V of(V a, V b) {
    return a > b ? a : b;
  }
};
struct Min {
  template <class V>
  STK_INLINE V of(V a, V b) {
    return a < b ? a : b;
  }
};

template <class Op, class Lane, int bytes, class V>
STK_INLINE Lane across(V v) {
  if constexpr (bytes == sizeof(Lane)) {
    return bitcast<Lane>(v);
  } else if constexpr (bytes == 2 * sizeof(Lane)) {
    struct Two {
      Lane low, high;
    };
    const Two t = bitcast<Two>(v);
    return Op::of(t.low, t.high);
  } else {
    using Half __attribute__((vector_size(bytes / 2))) = Lane;
    struct Two {
      Half low, high;
    };
    const Two t = bitcast<Two>(v);
    return across<Op, Lane, bytes / 2>(Op::of(t.low, t.high));
  }
}

// -- scalars ----------------------------------------------------------------------------------------------------------

STK_INLINE float widen(float v) { return v; }
STK_INLINE double widen(double v) { return v; }
STK_INLINE float widen(bf16 v) { return bitcast<float>(uint32_t(v.raw) << 16); }
STK_INLINE float widen(f16 v) {
  const uint32_t sign = uint32_t(v.raw & 0x8000u) << 16, rest = v.raw & 0x7fffu;
  if (rest >= 0x7c00u) return bitcast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // inf, NaN
  // subnormals are multiples of 2^-24; no float32 subnormal comes up, which a flushing processor would take for 0
  if (rest < 0x400u) return bitcast<float>(sign | bitcast<uint32_t>(float(rest) * 5.9604644775390625e-8f));
  return bitcast<float>(sign | ((rest << 13) + (112u << 23)));
}

STK_INLINE double narrow(double v, double) { return v; }
STK_INLINE float narrow(float v, float) { return v; }
STK_INLINE bf16 narrow(float v, bf16) {
  const uint32_t b = bitcast<uint32_t>(v);
  if ((b & 0x7fffffffu) > 0x7f800000u) return {uint16_t(b >> 16 | 0x40)};  // NaN stays one
  return {uint16_t((b + 0x7fffu + (b >> 16 & 1u)) >> 16)};                 // to nearest, ties to even
}
STK_INLINE f16 narrow(float v, f16) {
  const uint32_t b = bitcast<uint32_t>(v), sign = b >> 16 & 0x8000u, rest = b & 0x7fffffffu;
  if (rest > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (rest >= 0x47800000u) return {uint16_t(sign | 0x7c00u)};  // 2^16 and beyond
  if (rest < 0x38800000u)  // below 2^-14: let an addition round to the subnormals' grid of 2^-24
    return {uint16_t(sign | (bitcast<uint32_t>(bitcast<float>(rest) + 0.5f) - 0x3f000000u))};
  return {uint16_t(sign | (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13)};
}

template <class T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};

// -- vectors of the wide type from and to memory ----------------------------------------------------------------------

using vfloat = Vec<float>::type;
using vdouble = Vec<double>::type;

STK_INLINE vfloat load(const float *p) { return load_bytes<vfloat>(p); }
STK_INLINE vdouble load(const double *p) { return load_bytes<vdouble>(p); }
STK_INLINE vfloat load(const bf16 *p) {
  using half __attribute__((vector_size(kBytes / 2))) = uint16_t;
  using whole __attribute__((vector_size(kBytes))) = uint32_t;
  return bitcast<vfloat>(__builtin_convertvector(load_bytes<half>(p), whole) << 16);
}
STK_INLINE vfloat load(const f16 *p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(load_bytes<__m256i>(p));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(load_bytes<__m128i>(p));
#else
  vfloat v;
  for (int i = 0; i < Vec<float>::lanes; ++i) v[i] = widen(p[i]);
  return v;
#endif
}

STK_INLINE void store(float *p, vfloat v) { store_bytes(p, v); }
STK_INLINE void store(double *p, vdouble v) { store_bytes(p, v); }
STK_INLINE void store(bf16 *p, vfloat v) {
  using half __attribute__((vector_size(kBytes / 2))) = uint16_t;
  using whole __attribute__((vector_size(kBytes))) = uint32_t;
  const whole b = bitcast<whole>(v);
  const whole rounded = (b + 0x7fffu + (b >> 16 & 1u)) >> 16;
  const whole nan = (whole)((b & 0x7fffffffu) > 0x7f800000u);
  store_bytes(p, __builtin_convertvector((nan & (b >> 16 | 0x40u)) | (~nan & rounded), half));
}
STK_INLINE void store(f16 *p, vfloat v) {
#if defined(__AVX512F__)
  store_bytes(p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  store_bytes(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < Vec<float>::lanes; ++i) p[i] = narrow(v[i], f16{});
#endif
}

// -- rows turned into columns -------------------------------------------------------------------------------------------

// What swaps the off-diagonal squares of size 1, 2, 4, ... of two rows: lane l of the first is l, of the second lanes + l.
template <class Real>
struct Swaps {
  static constexpr int lanes = Vec<Real>::lanes;
  typename Vec<Real>::bits low[4][lanes] = {}, high[4][lanes] = {};
  constexpr Swaps() {
    for (int step = 0; step < 4; ++step) {
      const int half = 1 << step;
      for (int l = 0; l < lanes; ++l) {
        low[step][l] = l & half ? lanes + l - half : l;
        high[step][l] = l & half ? lanes + l : l + half;
      }
    }
  }
};

// Turns a square of lanes x lanes: element [i][k] of `from` becomes element [k][i] of `to`.
template <class Real>
STK_INLINE void transpose(const Real *from, int64_t stride, Real *to, int64_t to_stride) {
  constexpr int lanes = Vec<Real>::lanes;
#if defined(__GNUC__) && !defined(__clang__)
  using ivec = typename Vec<Real>::itype;
  static constexpr Swaps<Real> swaps;
  typename Vec<Real>::type v[lanes];
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) v[i] = load(from + i * stride);
#pragma GCC unroll 4
  for (int step = 0; 1 << step < lanes; ++step) {
    const int half = 1 << step;
    const ivec low = load_bytes<ivec>(swaps.low[step]), high = load_bytes<ivec>(swaps.high[step]);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      if (i & half) continue;
      const auto upper = v[i], lower = v[i | half];
      v[i] = __builtin_shuffle(upper, lower, low);
      v[i | half] = __builtin_shuffle(upper, lower, high);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) store(to + i * to_stride, v[i]);
#else
  for (int i = 0; i < lanes; ++i)
    for (int k = 0; k < lanes; ++k) to[k * to_stride + i] = from[i * stride + k];
#endif
}

// -- complex numbers: (re, im) pairs in memory, real and imaginary parts in two vectors ---------------------------------

template <class Real>
STK_INLINE void load_pairs(const Real *p, typename Vec<Real>::type &re, typename Vec<Real>::type &im) {
  for (int j = 0; j < Vec<Real>::lanes; ++j) re[j] = p[2 * j], im[j] = p[2 * j + 1];
}

template <class Real>
STK_INLINE void store_pairs(Real *p, typename Vec<Real>::type re, typename Vec<Real>::type im) {
  for (int j = 0; j < Vec<Real>::lanes; ++j) p[2 * j] = re[j], p[2 * j + 1] = im[j];
}

}  // namespace STK_ISA
}  // namespace stk
