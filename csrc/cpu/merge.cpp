// SPDX-License-Identifier: Apache-2.0
// Merging as a gather over the members of each output token, and its adjoint. Every input row is read once and every
// output row written once. Compiled without contraction of a*b+c: each product and each sum is rounded on its own, in
// ascending member order, so that the result is the same bit for bit on every instruction set and backend.
#include "kernels.h"
#include "vec.h"

namespace stk {
namespace STK_ISA {
namespace {

// One vector or one scalar of a row, in the wide type.
template <class T, bool vector>
struct Span;
template <class T>
struct Span<T, true> {
  typedef typename Vec<typename WideOf<T>::type>::type wide;
  static constexpr int step = Vec<typename WideOf<T>::type>::lanes;
  STK_INLINE wide get(const T *p) { return load(p); }
  STK_INLINE void put(T *p, wide v) { store(p, v); }
};
template <class T>
struct Span<T, false> {
  typedef typename WideOf<T>::type wide;
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

// The members of one group, checked: a corrupt plan is reported, never followed out of its item.
struct Group {
  const int32_t *member;
  int64_t count;  // of all members
  int64_t valid;  // of those of weight 1
  int64_t only;   // a valid member; the only one if valid == 1
};

STK_INLINE int64_t token_of(int32_t member) { return member < 0 ? ~member : member; }

STK_INLINE bool find_group(const Groups &g, int64_t item, int64_t output, bool all, Group &out) {
  const int32_t *offset = g.offsets + item * (g.tokens_out + 1) + output;
  const int64_t lo = offset[0], hi = offset[1];
  if (lo < 0 || hi <= lo || hi > g.tokens_in) return false;
  out.member = g.members + item * g.tokens_in + lo;
  out.count = hi - lo;
  out.valid = 0;
  out.only = 0;
  for (int64_t k = 0; k < out.count; ++k) {
    const int64_t token = token_of(out.member[k]);
    if (token >= g.tokens_in) return false;
    if (all || out.member[k] >= 0) {
      ++out.valid;
      out.only = token;
    }
  }
  return true;
}

template <class T>
STK_INLINE T *row_of(const Rows &rows, int64_t item, int64_t row) {
  return static_cast<T *>(rows.data) + item * rows.stride_item + row * rows.stride_row;
}

// -- reduce -----------------------------------------------------------------------------------------------------------

template <class T, bool vector, Mode mode>
STK_INLINE void reduce_span(const Group &g, const T *x, int64_t stride, const float *size, int64_t size_stride,
                            typename WideOf<T>::type total, int64_t at, T *y) {
  using S = Span<T, vector>;
  typedef typename WideOf<T>::type Real;
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
  const int64_t token = token_of(*next);
  if (token >= args.groups.tokens_in) return;  // a corrupt plan: found when its turn comes
  const char *line = reinterpret_cast<const char *>(row_of<T>(args.x, item, token));
  for (int64_t k = 0; k < args.dim * int64_t(sizeof(T)); k += 64) __builtin_prefetch(line + k);
}

template <class T, Mode mode>
bool reduce_rows(const ReduceArgs &args, int64_t begin, int64_t end) {
  typedef typename WideOf<T>::type Real;
  constexpr int step = Span<T, true>::step;
  int64_t item = begin / args.groups.tokens_out, output = begin % args.groups.tokens_out;
  for (int64_t row = begin; row < end; ++row) {
    Group g;
    if (!find_group(args.groups, item, output, mode == Mode::all, g)) return false;
    const T *x = row_of<T>(args.x, item, 0);
    T *y = row_of<T>(args.y, item, output);
    const float *size = args.size ? args.size + item * args.size_stride_item : nullptr;
    Real total = 0;
    for (int64_t k = 0; k < g.count; ++k)
      if (mode == Mode::all || g.member[k] >= 0)
        total += size ? Real(size[token_of(g.member[k]) * args.size_stride_token]) : Real(1);
    args.size_out[row] = float(total);
    prefetch_after<T>(args, g, item);
    if (g.valid == 1) {
      copy_row(y, x + g.only * args.x.stride_row, args.dim * int64_t(sizeof(T)), args.stream);
    } else {
      int64_t d = 0;
      for (; d + step <= args.dim; d += step)
        reduce_span<T, true, mode>(g, x, args.x.stride_row, size, args.size_stride_token, total, d, y);
      for (; d < args.dim; ++d)
        reduce_span<T, false, mode>(g, x, args.x.stride_row, size, args.size_stride_token, total, d, y);
    }
    if (++output == args.groups.tokens_out) {
      output = 0;
      ++item;
    }
  }
  fence(args.stream);
  return true;
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
      const bool wins =
          !taken && g.member[k] >= 0 && same(widen(row_of<T>(args.x, item, token)[d]), widen(y[d]));
      row_of<T>(args.out, item, token)[d] = wins ? grad[d] : T{};
      taken |= wins;
    }
  }
}

template <class T, Mode mode>
bool spread_rows(const SpreadArgs &args, int64_t begin, int64_t end) {
  typedef typename WideOf<T>::type Real;
  constexpr int step = Span<T, true>::step;
  const int64_t bytes = args.dim * int64_t(sizeof(T));
  int64_t item = begin / args.groups.tokens_out, output = begin % args.groups.tokens_out;
  for (int64_t row = begin; row < end; ++row) {
    Group g;
    if (!find_group(args.groups, item, output, mode == Mode::all, g)) return false;
    const T *grad = row_of<T>(args.grad, item, output);
    const float *size = args.size ? args.size + item * args.size_stride_item : nullptr;
    if (mode == Mode::max && g.count > 1) {
      spread_max<T>(args, g, item, output, grad);
    } else {
      Real total = 0;
      for (int64_t k = 0; k < g.count; ++k)
        if (g.member[k] >= 0) total += size ? Real(size[g.member[k] * args.size_stride_token]) : Real(1);
      for (int64_t k = 0; k < g.count; ++k) {
        const int64_t token = token_of(g.member[k]);
        T *out = row_of<T>(args.out, item, token);
        if (mode != Mode::all && g.member[k] < 0) {
          if (bytes) __builtin_memset(out, 0, bytes);
        } else if (mode != Mode::mean || g.valid == 1) {
          copy_row(out, grad, bytes, args.stream);
        } else {
          const Real share = (size ? Real(size[token * args.size_stride_token]) : Real(1)) / total;
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
  return true;
}

// -- dtype and mode ---------------------------------------------------------------------------------------------------

template <class T>
bool reduce_mode(const ReduceArgs &args, int64_t begin, int64_t end) {
  switch (args.mode) {
    case Mode::mean: return reduce_rows<T, Mode::mean>(args, begin, end);
    case Mode::sum: return reduce_rows<T, Mode::sum>(args, begin, end);
    case Mode::max: return reduce_rows<T, Mode::max>(args, begin, end);
    case Mode::all: return reduce_rows<T, Mode::all>(args, begin, end);
  }
  return false;
}

template <class T>
bool spread_mode(const SpreadArgs &args, int64_t begin, int64_t end) {
  switch (args.mode) {
    case Mode::mean: return spread_rows<T, Mode::mean>(args, begin, end);
    case Mode::sum: return spread_rows<T, Mode::sum>(args, begin, end);
    case Mode::max: return spread_rows<T, Mode::max>(args, begin, end);
    case Mode::all: return spread_rows<T, Mode::all>(args, begin, end);
  }
  return false;
}

bool reduce(const ReduceArgs &args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case Dtype::f32: return reduce_mode<float>(args, begin, end);
    case Dtype::f64: return reduce_mode<double>(args, begin, end);
    case Dtype::bf16: return reduce_mode<bf16>(args, begin, end);
    case Dtype::f16: return reduce_mode<f16>(args, begin, end);
  }
  return false;
}

bool spread(const SpreadArgs &args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case Dtype::f32: return spread_mode<float>(args, begin, end);
    case Dtype::f64: return spread_mode<double>(args, begin, end);
    case Dtype::bf16: return spread_mode<bf16>(args, begin, end);
    case Dtype::f16: return spread_mode<f16>(args, begin, end);
  }
  return false;
}

}  // namespace

extern const MergeKernels merge_kernels;
const MergeKernels merge_kernels = {reduce, spread};

}  // namespace STK_ISA
}  // namespace stk
