// SPDX-License-Identifier: Apache-2.0
// Steps 1 to 4 of the matching of one item: head mean, norms, similarities and the best partner of every source.
//
// A's tokens lie row by row, B's in panels of one vector of tokens, channel by channel, so that the inner loop is one
// broadcast and a few fused multiply-adds. Every similarity sums its products in the same order, channel 0 first: tokens
// that are copies of each other tie exactly, wherever they stand.
#include "kernels.h"
#include "vec.h"

namespace stk {
namespace STK_ISA {
namespace {

// A tile of kRows tokens of A by two panels keeps its sums in registers: 16 of 32 with AVX-512 and NEON, 12 of 16
// elsewhere.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8;
#else
constexpr int kRows = 6;
#endif

STK_INLINE int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }

// Where things are in the scratch of one item, in elements of Real.
template <class Real>
struct Layout {
  static constexpr int64_t lanes = Vec<Real>::lanes;
  int64_t tiles, panels;  // of A, of B
  int64_t width;          // channels, rounded up to whole vectors
  int64_t a, b, bias, end;
  Layout(int64_t channels, int64_t sources, int64_t targets) {
    tiles = blocks_of(sources, kRows);
    panels = blocks_of(targets, lanes);
    width = blocks_of(channels, lanes) * lanes;
    a = 0;
    b = a + tiles * kRows * width;
    bias = b + panels * width * lanes;
    end = bias + panels * lanes;
  }
};

// Asks for the lines of `count` elements, `ahead` bytes from p; an address, not a pointer: it may lie after the tensor.
template <int count, class T>
STK_INLINE void fetch(const T *p, int64_t ahead) {
  for (int k = 0; k < count; k += 64 / int(sizeof(T)))
    __builtin_prefetch(reinterpret_cast<const void *>(reinterpret_cast<uintptr_t>(p + k) + uintptr_t(ahead)));
}

// The mean over heads is wanted up to a positive factor only (the similarity does not see it): heads are summed, times a
// power of two of at most 1 / heads, so that finite heads have a finite sum. Writes `channels` values and zeros up to
// `width`. A token's heads lie together or apart, and the next token of the same set is two strides on, or anywhere: too irregular
// for the processor to foresee, so its lines are asked for while this one is summed.
template <class T, class Real>
STK_INLINE void sum_heads(const T *token, int64_t heads, int64_t stride_head, int64_t channels, int64_t width,
                          int64_t ahead, Real *row) {
  constexpr int lanes = Vec<Real>::lanes;
  Real shrink = 1;
  while (shrink * heads > 1) shrink /= 2;
  int64_t c = 0;
  for (; c + 4 * lanes <= channels; c += 4 * lanes) {  // four sums at once, for as many loads in flight
    const T *p = token + c;
    fetch<4 * lanes>(p, ahead);
    auto s0 = shrink * load(p), s1 = shrink * load(p + lanes), s2 = shrink * load(p + 2 * lanes),
         s3 = shrink * load(p + 3 * lanes);
    for (int64_t h = 1; h < heads; ++h) {
      p += stride_head;
      fetch<4 * lanes>(p, ahead);
      s0 += shrink * load(p);
      s1 += shrink * load(p + lanes);
      s2 += shrink * load(p + 2 * lanes);
      s3 += shrink * load(p + 3 * lanes);
    }
    store(row + c, s0);
    store(row + c + lanes, s1);
    store(row + c + 2 * lanes, s2);
    store(row + c + 3 * lanes, s3);
  }
  for (; c < channels; ++c) {
    Real s = 0;
    for (int64_t h = 0; h < heads; ++h) s += shrink * widen(token[h * stride_head + c]);
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
    squares += v * v;
  }
  const Real sum = across<Add, Real, kBytes>(squares);
  const Real norm = sizeof(Real) == 4 ? Real(__builtin_sqrtf(float(sum))) : Real(__builtin_sqrt(double(sum)));
  if (width == V::lanes) {  // divided: a single channel then comes out as 1 or -1 exactly
    store(row, load(row) * scale / norm);
  } else {  // a product takes a tenth of the time, and long rows have no such ties to keep
    const Real inverse = Real(1) / norm;
    for (int64_t c = 0; c < width; c += V::lanes) store(row + c, load(row + c) * scale * inverse);
  }
  return true;
}

// Blocks [begin, end) of the tiles of A followed by the panels of B. `best` becomes 0, or −inf for a bad source;
// `rows` holds lanes x width numbers.
template <class T, class Real>
void prepare(const Metric &m, const Sets &sets, Real *scratch, Real *rows, Real *best, int64_t begin, int64_t end) {
  const Layout<Real> at(m.channels, sets.sources, sets.targets);
  constexpr int64_t lanes = Vec<Real>::lanes;
  const T *data = static_cast<const T *>(m.data);
  const int64_t bytes = m.stride_token * int64_t(sizeof(T));
  const Real never = -Real(__builtin_inff());
  for (int64_t block = begin; block < end && block < at.tiles; ++block) {
    for (int64_t i = block * kRows; i < (block + 1) * kRows; ++i) {
      Real *row = scratch + at.a + i * at.width;
      if (i < sets.sources) {
        const int64_t t = sets.source(i), next = i + 1 < sets.sources ? sets.source(i + 1) : t;
        sum_heads(data + t * m.stride_token, m.heads, m.stride_head, m.channels, at.width, (next - t) * bytes, row);
        best[i] = normalise(row, at.width) ? Real(0) : never;
      } else {
        for (int64_t c = 0; c < at.width; ++c) row[c] = 0;
      }
    }
  }
  for (int64_t block = begin < at.tiles ? at.tiles : begin; block < end; ++block) {
    const int64_t panel = block - at.tiles;
    for (int64_t l = 0; l < lanes; ++l) {
      const int64_t j = panel * lanes + l;
      Real *row = rows + l * at.width;
      bool good = false;
      if (j < sets.targets) {
        const int64_t t = sets.target(j), next = j + 1 < sets.targets ? sets.target(j + 1) : t;
        sum_heads(data + t * m.stride_token, m.heads, m.stride_head, m.channels, at.width, (next - t) * bytes, row);
        good = normalise(row, at.width);
      } else {
        for (int64_t c = 0; c < at.width; ++c) row[c] = 0;
      }
      scratch[at.bias + j] = good ? Real(0) : never;
    }
    Real *to = scratch + at.b + panel * at.width * lanes;
    for (int64_t c = 0; c < at.width; c += lanes) transpose(rows + c, at.width, to + c * lanes, lanes);
  }
}

template <class Real>
struct Best {
  typename Vec<Real>::type value[kRows];
  typename Vec<Real>::itype index[kRows];
};

// Sums of products of one tile of A and `columns` panels.
template <class Real, int columns>
struct Sums {
  typename Vec<Real>::type at[kRows][columns];
};

// Adds channels [begin, end) to the sums.
template <class Real, int columns>
STK_INLINE void multiply(const Real *a, int64_t width, const Real *panel, int64_t begin, int64_t end,
                         Sums<Real, columns> &sums) {
  constexpr int lanes = Vec<Real>::lanes;
  typename Vec<Real>::type sum[kRows][columns];  // in registers
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int k = 0; k < columns; ++k) sum[i][k] = begin ? sums.at[i][k] : typename Vec<Real>::type{};
  for (int64_t c = begin; c < end; ++c) {
    typename Vec<Real>::type right[columns];
#pragma GCC unroll 2
    for (int k = 0; k < columns; ++k) right[k] = load(panel + (k * width + c) * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Real left = a[i * width + c];
#pragma GCC unroll 2
      for (int k = 0; k < columns; ++k) sum[i][k] += left * right[k];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int k = 0; k < columns; ++k) sums.at[i][k] = sum[i][k];
}

// Takes finished sums of the panels whose first target is j into account.
template <class Real, int columns>
STK_INLINE void compare(const Sums<Real, columns> &sums, const Real *bias, int64_t j, Best<Real> &best) {
  using V = Vec<Real>;
  typename V::itype lane;
  for (int l = 0; l < V::lanes; ++l) lane[l] = l;
#pragma GCC unroll 2
  for (int k = 0; k < columns; ++k) {
    const typename V::type shift = load(bias + j + k * V::lanes);
    const typename V::itype index = lane + (typename V::bits)(j + k * V::lanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const typename V::type s = sums.at[i][k] + shift;
      const auto better = (typename V::itype)(s > best.value[i]);  // strict: the lowest index of a lane stays
      best.value[i] = better ? s : best.value[i];
      best.index[i] = better ? index : best.index[i];
    }
  }
}

// Channels that are multiplied at a time: two panels of so many fill 32 KiB of the first cache and serve a group of
// tiles before the next are fetched. Sums still run over the channels in order.
constexpr int64_t kDepth = 16384 / kBytes;
constexpr int64_t kGroup = 16;

template <class Real, int columns>
STK_INLINE void against(const Layout<Real> &at, int64_t channels, const Real *scratch, int64_t panel, int64_t begin,
                        int64_t end, Best<Real> *best) {
  Sums<Real, columns> sums[kGroup];
  const Real *b = scratch + at.b + panel * at.width * Vec<Real>::lanes;
  for (int64_t from = 0; from < channels; from += kDepth) {
    const int64_t to = from + kDepth < channels ? from + kDepth : channels;
    for (int64_t tile = begin; tile < end; ++tile) {
      multiply<Real, columns>(scratch + at.a + tile * kRows * at.width, at.width, b, from, to, sums[tile - begin]);
      if (to == channels)
        compare<Real, columns>(sums[tile - begin], scratch + at.bias, panel * at.lanes, best[tile - begin]);
    }
  }
}

// The best target of every source of tiles [begin, end).
template <class Real>
void propose(const Metric &m, const Sets &sets, const Real *scratch, Proposals<Real> out, int64_t begin, int64_t end) {
  using V = Vec<Real>;
  const Layout<Real> at(m.channels, sets.sources, sets.targets);
  for (int64_t first = begin; first < end; first += kGroup) {
    const int64_t last = first + kGroup < end ? first + kGroup : end;
    Best<Real> best[kGroup];
    for (int64_t t = 0; t < last - first; ++t) {
      for (int i = 0; i < kRows; ++i) {
        best[t].value[i] = typename V::type{} - Real(__builtin_inff());
        best[t].index[i] = typename V::itype{};
      }
    }
    int64_t p = 0;
    for (; p + 2 <= at.panels; p += 2) against<Real, 2>(at, m.channels, scratch, p, first, last, best);
    if (p < at.panels) against<Real, 1>(at, m.channels, scratch, p, first, last, best);

    for (int64_t source = first * kRows; source < last * kRows && source < sets.sources; ++source) {
      const Best<Real> &tile = best[source / kRows - first];
      const int64_t i = source % kRows;
      const Real value = across<Max, Real, kBytes>(tile.value[i]);
      const auto tied = (typename V::itype)(tile.value[i] == value);  // the lowest index of all lanes that reach it
      const auto candidates = tied ? tile.index[i] : V::abs_mask - typename V::itype{};
      const typename V::bits index = across<Min, typename V::bits, kBytes>(candidates);
      const bool bad = out.best[source] < 0;
      out.best[source] = bad ? out.best[source] : value;
      out.partner[source] = bad ? 0 : int32_t(index);
    }
  }
}

template <class Real>
void prepare_any(const Metric &m, const Sets &sets, void *scratch, void *rows, void *best, int64_t begin, int64_t end) {
  Real *s = static_cast<Real *>(scratch), *r = static_cast<Real *>(rows), *b = static_cast<Real *>(best);
  if constexpr (sizeof(Real) == 8) {
    prepare<double>(m, sets, s, r, b, begin, end);
  } else if (m.dtype == Dtype::bf16) {
    prepare<bf16>(m, sets, s, r, b, begin, end);
  } else if (m.dtype == Dtype::f16) {
    prepare<f16>(m, sets, s, r, b, begin, end);
  } else {
    prepare<float>(m, sets, s, r, b, begin, end);
  }
}

template <class Real>
MatchSizes sizes_as(int64_t channels, const Sets &sets) {
  const Layout<Real> at(channels, sets.sources, sets.targets);
  return {at.tiles, at.panels, at.end * int64_t(sizeof(Real)), at.width * kBytes};
}

MatchSizes sizes(Dtype dtype, int64_t channels, const Sets &sets) {
  return dtype == Dtype::f64 ? sizes_as<double>(channels, sets) : sizes_as<float>(channels, sets);
}

void prepare_dtype(const Metric &m, const Sets &sets, void *scratch, void *rows, void *best, int64_t begin,
                   int64_t end) {
  (m.dtype == Dtype::f64 ? prepare_any<double> : prepare_any<float>)(m, sets, scratch, rows, best, begin, end);
}

void propose_dtype(const Metric &m, const Sets &sets, const void *scratch, void *best, int32_t *partner, int64_t begin,
                   int64_t end) {
  if (m.dtype == Dtype::f64)
    propose<double>(m, sets, static_cast<const double *>(scratch), {static_cast<double *>(best), partner}, begin, end);
  else
    propose<float>(m, sets, static_cast<const float *>(scratch), {static_cast<float *>(best), partner}, begin, end);
}

}  // namespace

extern const MatchKernels match_kernels;
const MatchKernels match_kernels = {sizes, prepare_dtype, propose_dtype};

}  // namespace STK_ISA
}  // namespace stk
