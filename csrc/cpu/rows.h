// SPDX-License-Identifier: Apache-2.0
// What merge.cpp and norm.cpp share: the members of a group, and rows moved by vectors of one instruction set. As in
// vec.h everything is `static inline` inside STK_ISA's own namespace.
#pragma once
#include "kernels.h"
#include "vec.h"

namespace stk {
namespace STK_ISA {

// One vector or one scalar of a row, in the wide type.
template <class T, bool vector>
struct Span;
template <class T>
struct Span<T, true> {
  using wide = typename Vec<typename WideOf<T>::type>::type;
  static constexpr int step = Vec<typename WideOf<T>::type>::lanes;
  STK_INLINE wide get(const T *p) { return load(p); }
  STK_INLINE void put(T *p, wide v) { store(p, v); }
};
template <class T>
struct Span<T, false> {
  using wide = typename WideOf<T>::type;
  static constexpr int step = 1;
  STK_INLINE wide get(const T *p) { return widen(*p); }
  STK_INLINE void put(T *p, wide v) { *p = narrow(v, T{}); }
};

// Copies `bytes`; with `stream` around the caches, for outputs that no cache holds until they are read again: a plain
// store would first fetch the line that it overwrites.
STK_INLINE void copy_row(void *to, const void *from, int64_t bytes, bool stream) {
#if defined(__x86_64__)
  if (stream && ((uintptr_t)to | (uintptr_t)bytes) % kBytes == 0) {
    char *out = static_cast<char *>(to);
    const char *in = static_cast<const char *>(from);
    for (int64_t k = 0; k < bytes; k += kBytes) {
#if defined(__AVX512F__)
      _mm512_stream_si512((__m512i *)(out + k), load_bytes<__m512i>(in + k));
#elif defined(__AVX2__)
      _mm256_stream_si256((__m256i *)(out + k), load_bytes<__m256i>(in + k));
#else
      _mm_stream_si128((__m128i *)(out + k), load_bytes<__m128i>(in + k));
#endif
    }
    return;
  }
#endif
  (void)stream;
  if (bytes) __builtin_memcpy(to, from, bytes);  // rows of width 0 have no address
}

STK_INLINE void fence(bool stream) {
#if defined(__x86_64__)
  if (stream) _mm_sfence();  // streamed stores are not ordered by anything else
#else
  (void)stream;
#endif
}

struct Group {
  const int32_t *member;
  int64_t count;  // of all members
  int64_t valid;  // of those of weight 1
  int64_t only;   // a valid member; the only one if valid == 1
};

STK_INLINE int64_t token_of(int32_t member) { return member < 0 ? ~member : member; }

STK_INLINE const float *sizes_of(const Groups &groups, int64_t item) {
  return groups.size ? groups.size + item * groups.size_stride_item : nullptr;
}

STK_INLINE Group group_of(const Groups &g, int64_t item, int64_t output, bool all) {
  const int32_t *offset = g.offsets + item * (g.tokens_out + 1) + output;
  Group out{g.members + item * g.tokens_in + offset[0], offset[1] - offset[0], 0, 0};
  for (int64_t k = 0; k < out.count; ++k) {
    if (all || out.member[k] >= 0) {
      ++out.valid;
      out.only = token_of(out.member[k]);
    }
  }
  return out;
}

template <class T>
STK_INLINE T *row_of(const Rows &rows, int64_t item, int64_t row) {
  return static_cast<T *>(rows.data) + item * rows.stride_item + row * rows.stride_row;
}

// The sum of the members' sizes, in ascending order; without sizes each counts 1.
template <class Real>
STK_INLINE Real weight_of(const Group &g, const float *size, int64_t stride, bool all) {
  Real total = 0;
  for (int64_t k = 0; k < g.count; ++k)
    if (all || g.member[k] >= 0) total += size ? Real(size[token_of(g.member[k]) * stride]) : Real(1);
  return total;
}

}  // namespace STK_ISA
}  // namespace stk
