// SPDX-License-Identifier: Apache-2.0
// Proportional attention, softmax(scale * q k^T + log size) v, whose first keys and values may come from a prefix.
//
// Keys and values of one head are packed into the scratch once: keys turned, so that in both products a row of numbers
// meets rows of vectors. A tile of queries then takes the scores of all keys, their softmax and the values' sums, all in
// the first cache. Every sum runs over channels or keys in order, whatever tile a query is in and however many threads
// there are.
#include "kernels.h"
#include "rows.h"

namespace stk {
namespace STK_ISA {
namespace {

// A tile by a panel of so many vectors keeps its sums in registers: 24 of 32 with AVX-512 and NEON, 12 of 16 elsewhere.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kColumns = 4;
#else
constexpr int kColumns = 2;
#endif

STK_INLINE int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }

// -- exponential ------------------------------------------------------------------------------------------------------

// exp x = 2^n exp r for r = x - n ln 2, at most ln 2 / 2 away from 0, where the terms of a polynomial follow 1 + r. Adding
// `shift` leaves n and the exponent's bias in the lowest bits. n * ln2 is exact, rest is what ln2 lacks. What lies below
// the least normal number becomes 0.
template <class Real>
struct Exp;
template <>
struct Exp<float> {
  static constexpr float per_ln2 = 1.44269504f, ln2 = 0.693359375f, rest = -2.12194440e-4f;
  static constexpr float shift = 12582912 + 127, least = -87.3365402f;
  static constexpr int count = 5;
  // the largest relative error of these is 3.1e-9
  static constexpr float terms[] = {1.381459878757596e-3f, 8.368716575205326e-3f, 4.166838899254799e-2f,
                                    1.666652113199234e-1f, 4.999999403953552e-1f};
};
template <>
struct Exp<double> {
  static constexpr double per_ln2 = 1.4426950408889634, ln2 = 0.693145751953125, rest = 1.4286068203094173e-6;
  static constexpr double shift = 6755399441055744 + 1023, least = -708.396418532264;
  static constexpr int count = 12;
  // 1 / 13!, ..., 1 / 2!
  static constexpr double terms[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800,
                                     1.0 / 362880,     1.0 / 40320,     1.0 / 5040,     1.0 / 720,
                                     1.0 / 120,        1.0 / 24,        1.0 / 6,        1.0 / 2};
};

// Of x <= 0; also NaN of NaN and of +inf.
template <class Real>
STK_INLINE typename Vec<Real>::type exponential(typename Vec<Real>::type x) {
  using E = Exp<Real>;
  using V = typename Vec<Real>::type;
  using I = typename Vec<Real>::itype;
  const V shifted = x * E::per_ln2 + E::shift, n = shifted - E::shift;
  const V r = x - n * E::ln2 - n * E::rest;
  V y = V{} + E::terms[0];
#pragma GCC unroll 12
  for (int k = 1; k < E::count; ++k) y = y * r + E::terms[k];
  y = (y * r + Real(1)) * r + Real(1);
  y *= bitcast<V>(bitcast<I>(shifted) << Vec<Real>::mantissa);
  return x < E::least ? V{} : y;
}

STK_INLINE float logarithm(float v) { return __builtin_logf(v); }
STK_INLINE double logarithm(double v) { return __builtin_log(v); }

// -- products ---------------------------------------------------------------------------------------------------------

// A matrix of `vectors` vectors to a row lies in panels of kColumns vectors, the last one narrower, each row after row.
template <class Real>
struct Panels {
  static constexpr int64_t lanes = Vec<Real>::lanes;
  Real *data;
  int64_t rows, vectors;

  STK_INLINE int64_t columns(const Panels &p, int64_t first) {
    return p.vectors - first < kColumns ? p.vectors - first : kColumns;
  }
  // the vector at row 0; the next row's is `stride` on
  STK_INLINE Real *at(const Panels &p, int64_t vector, int64_t &stride) {
    const int64_t first = vector / kColumns * kColumns;
    stride = columns(p, first) * lanes;
    return p.data + first * lanes * p.rows + (vector - first) * lanes;
  }
};

// Rows of `left`, `stride` apart, times one panel; then(i, k, sum) gets each vector of the product.
template <class Real, int count, int columns, class Then>
STK_INLINE void multiply(const Real *left, int64_t stride, const Real *panel, int64_t depth, Then then) {
  constexpr int lanes = Vec<Real>::lanes;
  typename Vec<Real>::type sum[count][columns];  // in registers
#pragma GCC unroll 8
  for (int i = 0; i < count; ++i)
#pragma GCC unroll 4
    for (int k = 0; k < columns; ++k) sum[i][k] = typename Vec<Real>::type{};
  for (int64_t c = 0; c < depth; ++c) {
    typename Vec<Real>::type right[columns];
#pragma GCC unroll 4
    for (int k = 0; k < columns; ++k) right[k] = load(panel + k * lanes);
    panel += columns * lanes;
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) {
      const Real factor = left[i * stride + c];
#pragma GCC unroll 4
      for (int k = 0; k < columns; ++k) sum[i][k] += factor * right[k];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < count; ++i)
#pragma GCC unroll 4
    for (int k = 0; k < columns; ++k) then(i, k, sum[i][k]);
}

// Times all panels; then(i, vector, sum).
template <class Real, int count, class Then>
STK_INLINE void product(const Real *left, int64_t stride, const Panels<Real> &right, Then then) {
  const Real *panel = right.data;
  int64_t v = 0;
  const auto shifted = [&](int i, int k, typename Vec<Real>::type sum)
                           __attribute__((always_inline)) { then(i, v + k, sum); };
  for (; v + kColumns <= right.vectors; v += kColumns) {
    multiply<Real, count, kColumns>(left, stride, panel, right.rows, shifted);
    panel += kColumns * Vec<Real>::lanes * right.rows;
  }
  const int64_t more = right.vectors - v;
  if constexpr (kColumns > 2) {
    if (more == 3) multiply<Real, count, 3>(left, stride, panel, right.rows, shifted);
    if (more == 2) multiply<Real, count, 2>(left, stride, panel, right.rows, shifted);
  }
  if (more == 1) multiply<Real, count, 1>(left, stride, panel, right.rows, shifted);
}

// -- one head ---------------------------------------------------------------------------------------------------------

// Where things are in a thread's scratch, in elements of Real.
template <class Real>
struct Layout {
  static constexpr int64_t lanes = Vec<Real>::lanes;
  int64_t count, width, channels;  // keys; keys and channels, rounded up to whole vectors
  int64_t values, bias, scores, queries, rows, end;
  explicit Layout(const AttentionArgs &args) {
    count = args.keys();
    width = blocks_of(count, lanes) * lanes;
    channels = blocks_of(args.dim, lanes) * lanes;
    values = args.dim * width;
    bias = values + count * channels;
    scores = bias + width;
    queries = scores + kQueries * width;
    rows = queries + kQueries * channels;
    end = rows + lanes * channels;
  }
};

template <class Real>
struct Workspace {
  int64_t count, width, channels;
  Panels<Real> keys, values;
  Real *bias, *scores;
  Real *queries;  // a tile, and then what becomes of it
  Real *rows;     // a vector of keys before they are turned
  Workspace(const AttentionArgs &args, void *scratch) {
    const Layout<Real> at(args);
    Real *const start = static_cast<Real *>(scratch);
    count = at.count;
    width = at.width;
    channels = at.channels;
    keys = {start, args.dim, width / at.lanes};
    values = {start + at.values, count, channels / at.lanes};
    bias = start + at.bias;
    scores = start + at.scores;
    queries = start + at.queries;
    rows = start + at.rows;
  }
};

// Copies a row, and writes zeros behind it up to `width`.
template <class T, class Real>
STK_INLINE void widen_row(const T *from, int64_t dim, int64_t width, Real *to) {
  constexpr int64_t lanes = Vec<Real>::lanes;
  int64_t c = 0;
  for (; c + lanes <= dim; c += lanes) store(to + c, load(from + c));
  for (; c < dim; ++c) to[c] = widen(from[c]);
  for (; c < width; ++c) to[c] = 0;
}

// The way back, each number rounded once.
template <class T, class Real>
STK_INLINE void narrow_row(const Real *from, int64_t dim, T *to) {
  constexpr int64_t lanes = Vec<Real>::lanes;
  int64_t c = 0;
  for (; c + lanes <= dim; c += lanes) store(to + c, load(from + c));
  for (; c < dim; ++c) to[c] = narrow(from[c], T{});
}

// Queries, keys or values of an item's head, those of a prefix of some length first.
template <class T>
struct Tokens {
  const T *ahead, *rest;
  int64_t count, stride_ahead, stride_rest;
  Tokens(const AttentionArgs &args, int64_t length, const Heads &prefix, const Heads &own, int64_t item, int64_t head) {
    count = length;
    ahead = nullptr;
    if (count) {
      const int64_t shared = item / (args.items / args.prefixes);
      ahead = static_cast<const T *>(prefix.data) + shared * prefix.stride_item + head * prefix.stride_head;
    }
    rest = static_cast<const T *>(own.data);
    if (rest) rest += item * own.stride_item + head * own.stride_head;  // no tokens have no address
    stride_ahead = prefix.stride_token;
    stride_rest = own.stride_token;
  }
  STK_INLINE const T *row(const Tokens &t, int64_t j) {
    return j < t.count ? t.ahead + j * t.stride_ahead : t.rest + (j - t.count) * t.stride_rest;
  }
};

// The logarithms of an item's sizes; -inf behind the last key.
template <class Real>
void pack_sizes(const AttentionArgs &args, int64_t item, const Workspace<Real> &w) {
  const float *size = args.size ? args.size + item * args.size_stride_item : nullptr;
  for (int64_t j = 0; j < w.count; ++j)
    w.bias[j] = size && j >= args.ahead ? logarithm(Real(size[(j - args.ahead) * args.size_stride_token])) : Real(0);
  for (int64_t j = w.count; j < w.width; ++j) w.bias[j] = -Real(__builtin_inff());
}

template <class T, class Real>
void pack_keys(const AttentionArgs &args, const Tokens<T> &from, const Workspace<Real> &w) {
  constexpr int64_t lanes = Vec<Real>::lanes;
  for (int64_t v = 0; v < w.keys.vectors; ++v) {
    const int64_t first = v * lanes;
    const Real *rows = w.rows;
    int64_t step = w.channels, stride, c = 0;
    bool straight = false;
    if constexpr (sizeof(T) == sizeof(Real)) straight = first >= args.ahead && first + lanes <= w.count;
    if (straight) {
      rows = reinterpret_cast<const Real *>(Tokens<T>::row(from, first));
      step = from.stride_rest;
    } else {
      // behind the last key stand copies of it: with a bias of -inf they count nothing, and bring no NaN of their own
      for (int64_t l = 0; l < lanes; ++l)
        widen_row(Tokens<T>::row(from, first + l < w.count ? first + l : w.count - 1), args.dim, args.dim,
                  w.rows + l * step);
    }
    Real *to = Panels<Real>::at(w.keys, v, stride);
    for (; c + lanes <= args.dim; c += lanes) transpose(rows + c, step, to + c * stride, stride);
    for (; c < args.dim; ++c)
      for (int64_t l = 0; l < lanes; ++l) to[c * stride + l] = rows[l * step + c];
  }
}

template <class T, class Real>
void pack_values(const AttentionArgs &args, const Tokens<T> &from, const Workspace<Real> &w) {
  constexpr int64_t lanes = Vec<Real>::lanes;
  for (int64_t v = 0; v < w.values.vectors; v += kColumns) {
    int64_t stride;
    Real *to = Panels<Real>::at(w.values, v, stride);
    const int64_t left = args.dim - v * lanes, dim = left < stride ? left : stride;
    for (int64_t j = 0; j < w.count; ++j) widen_row(Tokens<T>::row(from, j) + v * lanes, dim, stride, to + j * stride);
  }
}

// Softmax of a row but for the division; gives the divisor, and the logarithm of the sum in `lse` if that is wanted.
template <class Real>
STK_INLINE Real exponentials(Real *row, int64_t count, int64_t width, Real top, Real *lse) {
  constexpr int64_t lanes = Vec<Real>::lanes;
  constexpr Real infinity = Real(__builtin_inff());
  bool bad = false;  // NaN beside an infinite score
  if (top == infinity)
    for (int64_t j = 0; j < count; ++j) bad |= row[j] != row[j];
  const Real shift = top == infinity || top == -infinity ? Real(0) : top;
  typename Vec<Real>::type sums = {};
  for (int64_t j = 0; j < width; j += lanes) {
    const auto e = exponential<Real>(load(row + j) - shift);
    store(row + j, e);
    sums += e;
  }
  const Real sum = across<Add, Real, kBytes>(sums);
  if (lse) *lse = top == infinity && !bad ? infinity : shift + logarithm(sum);
  return sum == 0 ? Real(1) : sum;  // no key of a size above 0
}

// Asks for the lines of a row that comes next: the strides are too long for the processor to foresee.
template <class T>
STK_INLINE void fetch_row(const T *row, int64_t dim) {
  const char *bytes = reinterpret_cast<const char *>(row);
  for (int64_t at = 0; at < dim * int64_t(sizeof(T)); at += 64) __builtin_prefetch(bytes + at, 0, 2);
}

template <class T>
STK_INLINE void fetch_rows(const Tokens<T> &from, int64_t begin, int64_t end, int64_t dim) {
  for (int64_t j = begin; j < end; ++j) fetch_row(Tokens<T>::row(from, j), dim);
}

template <class T>
struct OneHead {
  int64_t item, head;
  Tokens<T> q, k, v;
  OneHead(const AttentionArgs &args, int64_t which)
      : item(which / args.heads),
        head(which % args.heads),
        q(args, 0, {}, args.q, item, head),
        k(args, args.ahead, args.prefix_k, args.k, item, head),
        v(args, args.ahead, args.prefix_v, args.v, item, head) {}
};

// A tile of queries, of which `there` are wanted: their rows become those of the output, and of `lse` unless it is null.
// Not inlined: one function serves all types that are computed in Real.
template <class Real, int count>
__attribute__((noinline)) void attend(const AttentionArgs &args, const Workspace<Real> &work, int there, Real *lse) {
  using V = typename Vec<Real>::type;
  constexpr int64_t lanes = Vec<Real>::lanes;
  const Workspace<Real> w = work;  // in registers, whatever is written meanwhile
  const Real scale = Real(args.scale);
  V top[count];
  for (int i = 0; i < count; ++i) top[i] = V{} - Real(__builtin_inff());
  product<Real, count>(w.queries, w.channels, w.keys, [&](int i, int64_t v, V sum) __attribute__((always_inline)) {
    const V score = sum * scale + load(w.bias + v * lanes);
    store(w.scores + i * w.width + v * lanes, score);
    top[i] = score > top[i] ? score : top[i];
  });
  Real factor[count];
  for (int i = 0; i < count; ++i)
    factor[i] = Real(1) / exponentials<Real>(w.scores + i * w.width, w.count, w.width,
                                             across<Max, Real, kBytes>(top[i]), lse && i < there ? lse + i : nullptr);
  product<Real, count>(w.scores, w.width, w.values, [&](int i, int64_t v, V sum) __attribute__((always_inline)) {
    store(w.queries + i * w.channels + v * lanes, sum * factor[i]);
  });
}

template <class T>
void forward_tiles(const AttentionArgs &args, void *scratch, int64_t begin, int64_t end) {
  using Real = typename WideOf<T>::type;
  const Workspace<Real> w(args, scratch);
  const int64_t tiles = args.tiles();
  for (int64_t which = begin / tiles, sized = -1; which * tiles < end; ++which) {
    const OneHead<T> now(args, which);
    if (now.item != sized) pack_sizes(args, now.item, w);
    sized = now.item;
    pack_keys<T, Real>(args, now.k, w);
    pack_values<T, Real>(args, now.v, w);
    const bool more = (which + 1) * tiles < end;
    const OneHead<T> next(args, more ? which + 1 : which);
    const int64_t last = more ? tiles : end - which * tiles;
    for (int64_t tile = begin > which * tiles ? begin - which * tiles : 0; tile < last; ++tile) {
      const int64_t first = tile * kQueries, left = args.queries - first;
      const int there = left < kQueries ? int(left) : kQueries;
      const int count = there == 1 ? 1 : there <= kQueries / 2 ? kQueries / 2 : kQueries;
      for (int i = 0; i < count; ++i)  // copies of the last make up the number
        widen_row(Tokens<T>::row(now.q, first + (i < there ? i : there - 1)), args.dim, args.dim,
                  w.queries + i * w.channels);
      if (more) {
        fetch_rows(next.k, tile * w.count / tiles, (tile + 1) * w.count / tiles, args.dim);
        fetch_rows(next.v, tile * w.count / tiles, (tile + 1) * w.count / tiles, args.dim);
        fetch_rows(next.q, first, first + there, args.dim);
      }
      T *out = static_cast<T *>(args.out) + ((now.item * args.queries + first) * args.heads + now.head) * args.dim;
      for (int i = 0; i < there; ++i) fetch_row(out + i * args.heads * args.dim, args.dim);
      Real *lse = static_cast<Real *>(args.lse);
      if (lse) lse += which * args.queries + first;
      if (count == 1)
        attend<Real, 1>(args, w, there, lse);
      else if (count < kQueries)
        attend<Real, kQueries / 2>(args, w, there, lse);
      else
        attend<Real, kQueries>(args, w, there, lse);
      for (int i = 0; i < there; ++i) narrow_row(w.queries + i * w.channels, args.dim, out + i * args.heads * args.dim);
    }
  }
}

// -- dtype ------------------------------------------------------------------------------------------------------------

int64_t scratch(const AttentionArgs &args) {
  if (args.dtype == Dtype::f64) return Layout<double>(args).end * int64_t(sizeof(double));
  return Layout<float>(args).end * int64_t(sizeof(float));
}

void forward(const AttentionArgs &args, void *scratch, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case Dtype::f32: return forward_tiles<float>(args, scratch, begin, end);
    case Dtype::f64: return forward_tiles<double>(args, scratch, begin, end);
    case Dtype::bf16: return forward_tiles<bf16>(args, scratch, begin, end);
    case Dtype::f16: return forward_tiles<f16>(args, scratch, begin, end);
  }
}

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {scratch, forward};

}  // namespace STK_ISA
}  // namespace stk
