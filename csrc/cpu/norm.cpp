// SPDX-License-Identifier: Apache-2.0
// Residual add, merge and LayerNorm in one pass over the rows, and the gradient of all three in another. A merged row
// stays in the first-level cache from its sum to its normalised copy. Compiled without contraction like merge.cpp: the
// merged rows are the same bit for bit on every instruction set; the normalised ones differ by the order of the sums
// over a row, which depends on the instruction set alone.
#include "kernels.h"
#include "rows.h"

namespace stk {
namespace STK_ISA {
namespace {

STK_INLINE float root(float v) { return __builtin_sqrtf(v); }
STK_INLINE double root(double v) { return __builtin_sqrt(v); }

// The sum over a row: the lanes of every other vector on their own, so that additions need not wait for each other, then
// across the lanes, then the scalars of the row's end.
template <class Real>
struct Sum {
  typename Vec<Real>::type lanes[2] = {};
  Real rest = 0;
  STK_INLINE void add(Sum &s, typename Vec<Real>::type v, int part) { s.lanes[part] += v; }
  STK_INLINE void add(Sum &s, Real v, int) { s.rest += v; }
  STK_INLINE Real of(const Sum &s) { return across<Add, Real, kBytes>(s.lanes[0] + s.lanes[1]) + s.rest; }
};

// Calls body(d, Span, part) for the vectors and then the scalars of a row; part is the Sum's to add to.
template <class T, class Body>
STK_INLINE void along(int64_t dim, Body body) {
  constexpr int step = Span<T, true>::step;
  int64_t d = 0;
  for (; d + 2 * step <= dim; d += 2 * step) {
    body(d, Span<T, true>{}, 0);
    body(d + step, Span<T, true>{}, 1);
  }
  for (; d + step <= dim; d += step) body(d, Span<T, true>{}, 0);
  for (; d < dim; ++d) body(d, Span<T, false>{}, 0);
}

template <class T>
int64_t row_bytes(int64_t dim) {
  return (dim * int64_t(sizeof(T)) + 63) / 64 * 64;
}

// -- forward ----------------------------------------------------------------------------------------------------------

// y, rounded to T, and the sum over it.
template <class T>
STK_INLINE typename WideOf<T>::type merged_row(const NormArgs &args, const Group &g, int64_t item, T *y) {
  using Real = typename WideOf<T>::type;
  const T *x = row_of<T>(args.x, item, 0), *residual = row_of<T>(args.residual, item, 0);
  const float *size = sizes_of(args.groups, item);
  const int64_t x_stride = args.x.stride_row, residual_stride = args.residual.stride_row;
  Sum<Real> sum;
  if (g.valid == 1) {
    x += g.only * x_stride;
    residual += g.only * residual_stride;
    along<T>(args.dim, [&](int64_t d, auto span, int part) __attribute__((always_inline)) {
      span.put(y + d, span.get(x + d) + span.get(residual + d));
      Sum<Real>::add(sum, span.get(y + d), part);
    });
    return Sum<Real>::of(sum);
  }
  const Real total = weight_of<Real>(g, size, args.groups.size_stride_token, false);
  along<T>(args.dim, [&](int64_t d, auto span, int part) __attribute__((always_inline)) {
    typename decltype(span)::wide v = {};
    for (int64_t k = 0; k < g.count; ++k) {
      const int64_t token = g.member[k];
      if (token < 0) continue;
      const auto h = span.get(x + token * x_stride + d) + span.get(residual + token * residual_stride + d);
      v += size ? Real(size[token * args.groups.size_stride_token]) * h : h;
    }
    v /= total;
    span.put(y + d, v);
    Sum<Real>::add(sum, span.get(y + d), part);
  });
  return Sum<Real>::of(sum);
}

template <class T>
void forward_rows(const NormArgs &args, void *scratch, int64_t begin, int64_t end) {
  using Real = typename WideOf<T>::type;
  const int64_t dim = args.dim, bytes = dim * int64_t(sizeof(T));
  const Real *weight = static_cast<const Real *>(args.weight), *bias = static_cast<const Real *>(args.bias);
  T *const y_scratch = static_cast<T *>(scratch);
  T *const normed_scratch = reinterpret_cast<T *>(static_cast<char *>(scratch) + row_bytes<T>(dim));
  int64_t item = begin / args.groups.tokens_out, output = begin % args.groups.tokens_out;
  for (int64_t row = begin; row < end; ++row) {
    const Group g = group_of(args.groups, item, output, false);
    const float *size = sizes_of(args.groups, item);
    args.size_out[row] = float(weight_of<Real>(g, size, args.groups.size_stride_token, false));

    // rows that go around the caches are made in the scratch, which never leaves them
    T *const y_out = row_of<T>(args.y, item, output), *const normed_out = row_of<T>(args.normed, item, output);
    T *const y = args.stream ? y_scratch : y_out, *const normed = args.stream ? normed_scratch : normed_out;
    const Real mean = merged_row<T>(args, g, item, y) / Real(dim);
    Sum<Real> squares;
    along<T>(dim, [&](int64_t d, auto span, int part) __attribute__((always_inline)) {
      const auto centered = span.get(y + d) - mean;
      Sum<Real>::add(squares, centered * centered, part);
    });
    const Real rstd = Real(1) / root(Sum<Real>::of(squares) / Real(dim) + Real(args.eps));
    along<T>(dim, [&](int64_t d, auto span, int) __attribute__((always_inline)) {
      using Wide = Span<Real, decltype(span)::step != 1>;
      auto v = (span.get(y + d) - mean) * rstd;
      if (weight) v *= Wide::get(weight + d);
      if (bias) v += Wide::get(bias + d);
      span.put(normed + d, v);
    });
    if (args.mean) {
      static_cast<Real *>(args.mean)[row] = mean;
      static_cast<Real *>(args.rstd)[row] = rstd;
    }
    if (args.stream) {
      copy_row(y_out, y, bytes, true);
      copy_row(normed_out, normed, bytes, true);
    }
    if (++output == args.groups.tokens_out) {
      output = 0;
      ++item;
    }
  }
  fence(args.stream);
}

// -- backward ---------------------------------------------------------------------------------------------------------

// The gradient of one merged row, and what it adds to those of weight and bias (null: not wanted).
template <class T, class Real>
STK_INLINE void row_gradient(const NormGradArgs &args, int64_t item, int64_t output, int64_t row, Real *out,
                             Real *to_weight, Real *to_bias) {
  const T *y = row_of<T>(args.y, item, output), *grad = row_of<T>(args.grad_normed, item, output);
  const T *straight = args.grad_y.data ? row_of<T>(args.grad_y, item, output) : nullptr;
  const Real mean = static_cast<const Real *>(args.mean)[row], rstd = static_cast<const Real *>(args.rstd)[row];
  const Real *weight = static_cast<const Real *>(args.weight);
  Sum<Real> sum, product;
  along<T>(args.dim, [&](int64_t d, auto span, int part) __attribute__((always_inline)) {
    using Wide = Span<Real, decltype(span)::step != 1>;
    const auto hat = (span.get(y + d) - mean) * rstd;
    auto up = span.get(grad + d);
    if (to_weight) {
      Wide::put(to_weight + d, Wide::get(to_weight + d) + up * hat);
      Wide::put(to_bias + d, Wide::get(to_bias + d) + up);
    }
    if (weight) up *= Wide::get(weight + d);
    Sum<Real>::add(sum, up, part);
    Sum<Real>::add(product, up * hat, part);
  });
  const Real shift = Sum<Real>::of(sum) / Real(args.dim), slope = Sum<Real>::of(product) / Real(args.dim);
  along<T>(args.dim, [&](int64_t d, auto span, int) __attribute__((always_inline)) {
    using Wide = Span<Real, decltype(span)::step != 1>;
    const auto hat = (span.get(y + d) - mean) * rstd;
    auto up = span.get(grad + d);
    if (weight) up *= Wide::get(weight + d);
    auto v = (up - shift - hat * slope) * rstd;
    if (straight) v += span.get(straight + d);
    Wide::put(out + d, v);
  });
}

template <class T>
void backward_rows(const NormGradArgs &args, void *scratch, int64_t begin, int64_t end) {
  using Real = typename WideOf<T>::type;
  const int64_t dim = args.dim, bytes = dim * int64_t(sizeof(T)), all = args.groups.items * args.groups.tokens_out;
  Real *const given = static_cast<Real *>(scratch);
  T *const narrowed = reinterpret_cast<T *>(static_cast<char *>(scratch) + row_bytes<Real>(dim));
  for (int64_t block = begin; block < end; ++block) {
    Real *to_weight = nullptr;
    if (args.partial) {
      to_weight = static_cast<Real *>(args.partial) + block * 2 * dim;
      __builtin_memset(to_weight, 0, 2 * dim * sizeof(Real));
    }
    const int64_t first = block * args.block_rows, last = first + args.block_rows < all ? first + args.block_rows : all;
    int64_t item = first / args.groups.tokens_out, output = first % args.groups.tokens_out;
    for (int64_t row = first; row < last; ++row) {
      const Group g = group_of(args.groups, item, output, false);
      const float *size = sizes_of(args.groups, item);
      const Real total = weight_of<Real>(g, size, args.groups.size_stride_token, false);
      row_gradient<T, Real>(args, item, output, row, given, to_weight, to_weight ? to_weight + dim : nullptr);
      for (int64_t k = 0; k < g.count; ++k) {
        T *const out = row_of<T>(args.out, item, token_of(g.member[k]));
        if (g.member[k] < 0) {
          __builtin_memset(out, 0, bytes);
          continue;
        }
        Real share = 1;
        if (g.valid != 1) share = (size ? Real(size[g.member[k] * args.groups.size_stride_token]) : Real(1)) / total;
        T *const made = args.stream ? narrowed : out;
        along<T>(dim, [&](int64_t d, auto span, int) __attribute__((always_inline)) {
          using Wide = Span<Real, decltype(span)::step != 1>;
          span.put(made + d, share * Wide::get(given + d));
        });
        if (args.stream) copy_row(out, made, bytes, true);
      }
      if (++output == args.groups.tokens_out) {
        output = 0;
        ++item;
      }
    }
  }
  fence(args.stream);
}

// The gradients of weight and bias: the sum over the blocks, whose number does not depend on the threads.
template <class Real>
void add_blocks(const NormGradArgs &args, int64_t blocks) {
  const int64_t width = 2 * args.dim;
  Real *out = static_cast<Real *>(args.affine);
  const Real *partial = static_cast<const Real *>(args.partial);
  if (width) __builtin_memset(out, 0, width * sizeof(Real));
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t d = 0; d < width; ++d) out[d] += partial[block * width + d];
}

// -- dtype ------------------------------------------------------------------------------------------------------------

int64_t scratch(Dtype dtype, int64_t dim) {
  // forward: y and its normalised copy; backward: a gradient in the wide type and one in T
  return 2 * (dtype == Dtype::f64 ? row_bytes<double>(dim) : row_bytes<float>(dim));
}

void forward(const NormArgs &args, void *scratch, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case Dtype::f32: return forward_rows<float>(args, scratch, begin, end);
    case Dtype::f64: return forward_rows<double>(args, scratch, begin, end);
    case Dtype::bf16: return forward_rows<bf16>(args, scratch, begin, end);
    case Dtype::f16: return forward_rows<f16>(args, scratch, begin, end);
  }
}

void backward(const NormGradArgs &args, void *scratch, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case Dtype::f32: return backward_rows<float>(args, scratch, begin, end);
    case Dtype::f64: return backward_rows<double>(args, scratch, begin, end);
    case Dtype::bf16: return backward_rows<bf16>(args, scratch, begin, end);
    case Dtype::f16: return backward_rows<f16>(args, scratch, begin, end);
  }
}

void affine(const NormGradArgs &args, int64_t blocks) {
  if (args.dtype == Dtype::f64) return add_blocks<double>(args, blocks);
  add_blocks<float>(args, blocks);
}

}  // namespace

extern const NormKernels norm_kernels;
const NormKernels norm_kernels = {scratch, forward, backward, affine};

}  // namespace STK_ISA
}  // namespace stk
