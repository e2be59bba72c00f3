// SPDX-License-Identifier: Apache-2.0
// Merging as a gather over the members of each output token, and its adjoint. Every input row is read once and every
// output row written once. Compiled without contraction of a*b+c: each product and each sum is rounded on its own, in
// ascending member order, so that the result is the same bit for bit on every instruction set and backend.
#include "kernels.h"
#include "rows.h"

namespace stk {
namespace STK_ISA {
namespace {

// -- reduce -----------------------------------------------------------------------------------------------------------

template <class T, bool vector, Mode mode>
STK_INLINE void reduce_span(const Group &g, const T *x, int64_t stride, const float *size, int64_t size_stride,
                            typename WideOf<T>::type total, int64_t at, T *y) {
  using S = Span<T, vector>;
  using Real = typename WideOf<T>::type;
  typename S::wide sum = {};
  bool first = true;
  for (int64_t k = 0; k < g.count; ++k) {
    if (mode != Mode::all && g.member[k] < 0) continue;
    const int64_t token = token_of(g.member[k]);
    const typename S::wide v = S::get(x + token * stride + at);
    if (mode == Mode::max) {
      sum = first ? v : ((v > sum) | (v != v)) ? v : sum;  // NaN wins
      first = false;
    } else if (mode == Mode::mean && size != nullptr) {
      sum += Real(size[token * size_stride]) * v;
    } else {
      sum += v;
    }
  }
  if (mode == Mode::mean) sum /= total;
  S::put(y + at, sum);
}

// The group after this one starts elsewhere in the item: have its row on the way.
template <class T>
STK_INLINE void prefetch_after(const ReduceArgs &args, const Group &g, int64_t item) {
  const int32_t *next = g.member + g.count;
  if (next >= args.groups.members + (item + 1) * args.groups.tokens_in) return;
  const char *line = reinterpret_cast<const char *>(row_of<T>(args.x, item, token_of(*next)));
  for (int64_t k = 0; k < args.dim * int64_t(sizeof(T)); k += 64) __builtin_prefetch(line + k);
}

template <class T, Mode mode>
void reduce_rows(const ReduceArgs &args, int64_t begin, int64_t end) {
  using Real = typename WideOf<T>::type;
  constexpr int step = Span<T, true>::step;
  int64_t item = begin / args.groups.tokens_out, output = begin % args.groups.tokens_out;
  for (int64_t row = begin; row < end; ++row) {
    const Group g = group_of(args.groups, item, output, mode == Mode::all);
    const T *x = row_of<T>(args.x, item, 0);
    T *y = row_of<T>(args.y, item, output);
    const float *size = sizes_of(args.groups, item);
    const Real total = weight_of<Real>(g, size, args.groups.size_stride_token, mode == Mode::all);
    args.size_out[row] = float(total);
    prefetch_after<T>(args, g, item);
    if (g.valid == 1) {
      copy_row(y, x + g.only * args.x.stride_row, args.dim * int64_t(sizeof(T)), args.stream);
    } else {
      int64_t d = 0;
      for (; d + step <= args.dim; d += step)
        reduce_span<T, true, mode>(g, x, args.x.stride_row, size, args.groups.size_stride_token, total, d, y);
      for (; d < args.dim; ++d)
        reduce_span<T, false, mode>(g, x, args.x.stride_row, size, args.groups.size_stride_token, total, d, y);
    }
    if (++output == args.groups.tokens_out) {
      output = 0;
      ++item;
    }
  }
  fence(args.stream);
}

// -- spread -----------------------------------------------------------------------------------------------------------

STK_INLINE bool same(float a, float b) { return a == b || (a != a && b != b); }
STK_INLINE bool same(double a, double b) { return a == b || (a != a && b != b); }

// The first member, in ascending order, that reached the maximum gets the gradient.
template <class T>
STK_INLINE void spread_max(const SpreadArgs &args, const Group &g, int64_t item, int64_t output, const T *grad) {
  const T *y = row_of<T>(args.y, item, output);
  for (int64_t d = 0; d < args.dim; ++d) {
    bool taken = false;
    for (int64_t k = 0; k < g.count; ++k) {
      const int64_t token = token_of(g.member[k]);
      const bool wins = !taken && g.member[k] >= 0 && same(widen(row_of<T>(args.x, item, token)[d]), widen(y[d]));
      row_of<T>(args.out, item, token)[d] = wins ? grad[d] : T{};
      taken |= wins;
    }
  }
}

template <class T, Mode mode>
void spread_rows(const SpreadArgs &args, int64_t begin, int64_t end) {
  using Real = typename WideOf<T>::type;
  constexpr int step = Span<T, true>::step;
  const int64_t bytes = args.dim * int64_t(sizeof(T));
  int64_t item = begin / args.groups.tokens_out, output = begin % args.groups.tokens_out;
  for (int64_t row = begin; row < end; ++row) {
    const Group g = group_of(args.groups, item, output, mode == Mode::all);
    const T *grad = row_of<T>(args.grad, item, output);
    const float *size = sizes_of(args.groups, item);
    if (mode == Mode::max && g.count > 1) {
      spread_max<T>(args, g, item, output, grad);
    } else {
      const Real total = weight_of<Real>(g, size, args.groups.size_stride_token, false);
      for (int64_t k = 0; k < g.count; ++k) {
        const int64_t token = token_of(g.member[k]);
        T *out = row_of<T>(args.out, item, token);
        if (mode != Mode::all && g.member[k] < 0) {
          if (bytes) __builtin_memset(out, 0, bytes);
        } else if (mode != Mode::mean || g.valid == 1) {
          copy_row(out, grad, bytes, args.stream);
        } else {
          const Real share = (size ? Real(size[token * args.groups.size_stride_token]) : Real(1)) / total;
          int64_t d = 0;
          for (; d + step <= args.dim; d += step) store(out + d, share * load(grad + d));
          for (; d < args.dim; ++d) out[d] = narrow(share * widen(grad[d]), T{});
        }
      }
    }
    if (++output == args.groups.tokens_out) {
      output = 0;
      ++item;
    }
  }
  fence(args.stream);
}

// -- dtype and mode ---------------------------------------------------------------------------------------------------

template <class T>
void reduce_mode(const ReduceArgs &args, int64_t begin, int64_t end) {
  switch (args.mode) {
    case Mode::mean: return reduce_rows<T, Mode::mean>(args, begin, end);
    case Mode::sum: return reduce_rows<T, Mode::sum>(args, begin, end);
    case Mode::max: return reduce_rows<T, Mode::max>(args, begin, end);
    case Mode::all: return reduce_rows<T, Mode::all>(args, begin, end);
  }
}

template <class T>
void spread_mode(const SpreadArgs &args, int64_t begin, int64_t end) {
  switch (args.mode) {
    case Mode::mean: return spread_rows<T, Mode::mean>(args, begin, end);
    case Mode::sum: return spread_rows<T, Mode::sum>(args, begin, end);
    case Mode::max: return spread_rows<T, Mode::max>(args, begin, end);
    case Mode::all: return spread_rows<T, Mode::all>(args, begin, end);
  }
}

void reduce(const ReduceArgs &args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case Dtype::f32: return reduce_mode<float>(args, begin, end);
    case Dtype::f64: return reduce_mode<double>(args, begin, end);
    case Dtype::bf16: return reduce_mode<bf16>(args, begin, end);
    case Dtype::f16: return reduce_mode<f16>(args, begin, end);
  }
}

void spread(const SpreadArgs &args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case Dtype::f32: return spread_mode<float>(args, begin, end);
    case Dtype::f64: return spread_mode<double>(args, begin, end);
    case Dtype::bf16: return spread_mode<bf16>(args, begin, end);
    case Dtype::f16: return spread_mode<f16>(args, begin, end);
  }
}

}  // namespace

extern const MergeKernels merge_kernels;
const MergeKernels merge_kernels = {reduce, spread};

}  // namespace STK_ISA
}  // namespace stk
