// SPDX-License-Identifier: Apache-2.0
// Steps 1 to 4 of the matching of one item: head mean, norms, similarities and the best partner of every source.
//
// A's tokens lie row by row, B's in panels of kPanel lanes, channel by channel, so that the inner loop is one broadcast
// and a few fused multiply-adds. Every similarity sums its products in the same order, channel 0 first: tokens that are
// copies of each other tie exactly, wherever they stand.
#include "kernels.h"
#include "vec.h"

namespace stk {
namespace STK_ISA {
namespace {

// A tile of kRows x kColumns vectors keeps its sums in registers: 16 of 32 with AVX-512 and NEON, 12 of 16 elsewhere.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8;
#else
constexpr int kRows = 6;
#endif
constexpr int kColumns = 2;

template <class Real>
constexpr int kPanel = kColumns *Vec<Real>::lanes;

STK_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class Real>
struct Layout {  // of the scratch, in elements of Real
  int64_t width, row, a, b, bias, end;
  Layout(int64_t channels, int64_t sources, int64_t targets) {
    width = round_up(channels, Vec<Real>::lanes);
    const int64_t panels = round_up(targets, kPanel<Real>);
    row = 0;
    a = row + width;
    b = a + round_up(sources, kRows) * width;
    bias = b + panels * channels;
    end = bias + panels;
  }
};

// The mean over heads is wanted up to a positive factor only (the similarity does not see it), so heads are summed.
// Writes `channels` values and zeros up to `width`.
// A token's heads lie together or apart, and the next token of the same set is two strides on: too irregular for the
// processor to foresee, so the lines of the token after next are asked for while this one is summed.
template <class T, class Real>
STK_INLINE void sum_heads(const T *token, int64_t heads, int64_t stride_head, int64_t channels, int64_t width, int64_t ahead,
                          Real *row) {
  constexpr int lanes = Vec<Real>::lanes;
  int64_t c = 0;
  for (; c + 4 * lanes <= channels; c += 4 * lanes) {  // four sums at once, for as many loads in flight
    const T *p = token + c;
    auto s0 = load(p), s1 = load(p + lanes), s2 = load(p + 2 * lanes), s3 = load(p + 3 * lanes);
    for (int64_t h = 1; h < heads; ++h) {
      p += stride_head;
      s0 += load(p);
      s1 += load(p + lanes);
      s2 += load(p + 2 * lanes);
      s3 += load(p + 3 * lanes);
      for (int64_t k = 0; k < 4 * lanes; k += 64 / int64_t(sizeof(T))) __builtin_prefetch(reinterpret_cast<const void *>(reinterpret_cast<uintptr_t>(p + k) + uintptr_t(ahead)));
    }
    store(row + c, s0);
    store(row + c + lanes, s1);
    store(row + c + 2 * lanes, s2);
    store(row + c + 3 * lanes, s3);
  }
  for (; c < channels; ++c) {
    Real s = 0;
    for (int64_t h = 0; h < heads; ++h) s += widen(token[h * stride_head + c]);
    row[c] = s;
  }
  for (; c < width; ++c) row[c] = 0;
}

// Scales a row to norm 1 (0 stays 0). False, and zeros, if it holds a NaN or an infinity.
template <class Real>
STK_INLINE bool normalise(Real *row, int64_t width) {
  using V = Vec<Real>;
  typename V::itype top = {};
  for (int64_t c = 0; c < width; c += V::lanes) {
    const auto magnitude = bitcast<typename V::itype>(load(row + c)) & V::abs_mask;
    top = magnitude > top ? magnitude : top;
  }
  const typename V::bits largest = across<Max, typename V::bits, kBytes>(top);
  if (largest >= V::infinity || largest == 0) {
    for (int64_t c = 0; c < width; ++c) row[c] = 0;
    return largest == 0;
  }
  // a power of two costs no accuracy and keeps the squares of tiny and huge tokens in range
  typename V::bits exponent = V::bias2 - (largest >> V::mantissa);
  if (exponent < 1) exponent = 1;
  const Real scale = bitcast<Real>(exponent << V::mantissa);
  typename V::type squares = {};
  for (int64_t c = 0; c < width; c += V::lanes) {
    const auto v = load(row + c) * scale;
    store(row + c, v);
    squares += v * v;
  }
  const Real sum = across<Add, Real, kBytes>(squares);
  // divided, not multiplied by a reciprocal: with one channel every token then comes out as 1 or -1 exactly
  const Real norm = sizeof(Real) == 4 ? Real(__builtin_sqrtf(float(sum))) : Real(__builtin_sqrt(double(sum)));
  for (int64_t c = 0; c < width; c += V::lanes) store(row + c, load(row + c) / norm);
  return true;
}

template <class T, class Real>
void prepare(const Metric &m, int64_t first_a, int64_t sources, int64_t first_b, int64_t targets, Real *scratch,
             Real *best) {
  const Layout<Real> at(m.channels, sources, targets);
  const T *data = static_cast<const T *>(m.data);
  const int64_t padded = round_up(sources, kRows), panels = round_up(targets, kPanel<Real>);
  const int64_t ahead = 2 * m.stride_token * int64_t(sizeof(T));
  const Real never = -Real(__builtin_inff());
  for (int64_t i = 0; i < sources; ++i) {
    Real *a = scratch + at.a + i * at.width;
    sum_heads(data + (first_a + 2 * i) * m.stride_token, m.heads, m.stride_head, m.channels, at.width, ahead, a);
    best[i] = normalise(a, at.width) ? Real(0) : never;
  }
  for (int64_t k = sources * at.width; k < padded * at.width; ++k) scratch[at.a + k] = 0;
  Real *row = scratch + at.row;
  for (int64_t j = 0; j < panels; ++j) {
    Real *lane = scratch + at.b + j / kPanel<Real> * kPanel<Real> * m.channels + j % kPanel<Real>;
    bool good = false;
    if (j < targets) {
      sum_heads(data + (first_b + 2 * j) * m.stride_token, m.heads, m.stride_head, m.channels, at.width, ahead, row);
      good = normalise(row, at.width);
    } else if (j == targets) {
      for (int64_t c = 0; c < at.width; ++c) row[c] = 0;
    }
    for (int64_t c = 0; c < m.channels; ++c) lane[c * kPanel<Real>] = row[c];
    scratch[at.bias + j] = good ? Real(0) : never;
  }
}

// The best target of each of kRows sources; `best` comes in as 0 or, for a bad source, −inf.
template <class Real>
STK_INLINE void best_of_tile(const Real *a, int64_t width, const Real *b, const Real *bias, int64_t channels,
                             int64_t targets, int64_t rows, Real *best, int32_t *partner) {
  using V = Vec<Real>;
  typedef typename V::type vec;
  typedef typename V::itype ivec;
  vec top[kRows];
  ivec who[kRows];
  ivec lane;
  for (int i = 0; i < V::lanes; ++i) lane[i] = i;
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    top[i] = vec{} - Real(__builtin_inff());
    who[i] = ivec{};
  }
  for (int64_t j = 0; j < targets; j += kPanel<Real>) {
    vec sum[kRows][kColumns] = {};
    const Real *panel = b + j * channels;
    for (int64_t c = 0; c < channels; ++c) {
      vec right[kColumns];
#pragma GCC unroll 2
      for (int k = 0; k < kColumns; ++k) right[k] = load(panel + c * kPanel<Real> + k * V::lanes);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const Real left = a[i * width + c];
#pragma GCC unroll 2
        for (int k = 0; k < kColumns; ++k) sum[i][k] += left * right[k];
      }
    }
#pragma GCC unroll 2
    for (int k = 0; k < kColumns; ++k) {
      const vec shift = load(bias + j + k * V::lanes);
      const ivec index = lane + (typename V::bits)(j + k * V::lanes);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const vec s = sum[i][k] + shift;
        const ivec better = (ivec)(s > top[i]);  // strict: the lowest index of a lane stays
        top[i] = better ? s : top[i];
        who[i] = better ? index : who[i];
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    const Real value = across<Max, Real, kBytes>(top[i]);
    const ivec tied = (ivec)(top[i] == value);  // the lowest index of all lanes that reach the maximum
    const typename V::bits index = across<Min, typename V::bits, kBytes>(tied ? who[i] : V::abs_mask - ivec{});
    const bool bad = best[i] < 0;
    best[i] = bad ? best[i] : value;
    partner[i] = bad ? 0 : int32_t(index);
  }
}

template <class Real>
void propose(const Metric &m, int64_t first_a, int64_t sources, int64_t first_b, int64_t targets, void *memory,
             Proposals<Real> out) {
  Real *scratch = static_cast<Real *>(memory);
  if constexpr (sizeof(Real) == 8) {
    prepare<double, double>(m, first_a, sources, first_b, targets, scratch, out.best);
  } else if (m.dtype == Dtype::bf16) {
    prepare<bf16, float>(m, first_a, sources, first_b, targets, scratch, out.best);
  } else if (m.dtype == Dtype::f16) {
    prepare<f16, float>(m, first_a, sources, first_b, targets, scratch, out.best);
  } else {
    prepare<float, float>(m, first_a, sources, first_b, targets, scratch, out.best);
  }
  const Layout<Real> at(m.channels, sources, targets);
  for (int64_t i = 0; i < sources; i += kRows) {
    const int64_t rows = sources - i < kRows ? sources - i : kRows;
    best_of_tile(scratch + at.a + i * at.width, at.width, scratch + at.b, scratch + at.bias, m.channels, targets, rows,
                 out.best + i, out.partner + i);
  }
}

int64_t scratch(Dtype dtype, int64_t channels, int64_t sources, int64_t targets) {
  return dtype == Dtype::f64 ? 8 * Layout<double>(channels, sources, targets).end
                             : 4 * Layout<float>(channels, sources, targets).end;
}

}  // namespace

extern const MatchKernels match_kernels;
const MatchKernels match_kernels = {scratch, propose<float>, propose<double>};

}  // namespace STK_ISA
}  // namespace stk
