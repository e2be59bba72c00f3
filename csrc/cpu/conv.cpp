// SPDX-License-Identifier: Apache-2.0
// Convolution over (time, height, width) in the frequency domain: what stands between the transforms of the planes.
//
// A block of 16 frequencies along the width is kept as 16 real and 16 imaginary parts. The filters come transformed along
// the width alone. Along the height their taps are folded about the middle one, into sums S and differences D, so that
// one pass over them gives the responses of two rows of frequencies:
//   W(u) = P + i Q, W(-u) = P - i Q  with  P = sum of cos(2 pi u a / rows) S_a,  Q = sum of sin(2 pi u a / rows) D_a.
// Whole responses would be larger than the planes of a video, and no cheaper to read than these are to compute.
#include "kernels.h"
#include "vec.h"

namespace stk {
namespace STK_ISA {
namespace {

constexpr int kBlock = kConvBlock;

// A tile of kOutputs output channels by kFrames frames keeps its complex sums in registers: 16 of 32 with AVX-512 and
// NEON, 8 of 16 elsewhere.
constexpr int kOutputs = 2;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kFrames = 4;
#else
constexpr int kFrames = 2;
#endif

// n ≤ 16 complex numbers ⇄ a block; those that lie past the end of a row are 0
template <class Real>
STK_INLINE void read_block(const Real *from, int n, Real *block) {
  if (n == kBlock) {
    constexpr int lanes = Vec<Real>::lanes;
    for (int j = 0; j < kBlock; j += lanes) {
      typename Vec<Real>::type re, im;
      load_pairs(from + 2 * j, re, im);
      store(block + j, re);
      store(block + kBlock + j, im);
    }
    return;
  }
  for (int j = 0; j < kBlock; ++j) {
    block[j] = j < n ? from[2 * j] : Real(0);
    block[kBlock + j] = j < n ? from[2 * j + 1] : Real(0);
  }
}

template <class Real>
STK_INLINE void write_block(const Real *block, int n, Real *to) {
  if (n == kBlock) {
    constexpr int lanes = Vec<Real>::lanes;
    for (int j = 0; j < kBlock; j += lanes) store_pairs(to + 2 * j, load(block + j), load(block + kBlock + j));
    return;
  }
  for (int j = 0; j < n; ++j) to[2 * j] = block[j], to[2 * j + 1] = block[kBlock + j];
}

// One block of frequencies of one row: where it is in a plane, and how many of its 16 there are.
struct Place {
  int64_t at;  // in complex numbers
  int count;
};

STK_INLINE Place place_of(const ConvSizes &s, int64_t block, int64_t row) {
  const int64_t left = s.columns - block * kBlock;
  return {row * s.columns + block * kBlock, int(left < kBlock ? left : kBlock)};
}

// Blocks of all input channels and of the frames that the taps reach, (inputs, frames, 2, 16); zeros before the first
// frame and after the last.
template <class Real>
STK_INLINE void read_frames(const ConvSizes &s, const Real *x, Place place, Real *blocks) {
  const int64_t plane = s.rows * s.columns, frames = s.frames_out + s.taps - 1;
  for (int64_t i = 0; i < s.inputs; ++i) {
    for (int64_t f = 0; f < frames; ++f, blocks += 2 * kBlock) {
      const int64_t frame = f + s.shift;
      if (frame >= 0 && frame < s.frames_in)
        read_block(x + 2 * ((i * s.frames_in + frame) * plane + place.at), place.count, blocks);
      else
        for (int j = 0; j < 2 * kBlock; ++j) blocks[j] = 0;
    }
  }
}

// Asks for one block of each of `count` planes, which lie too far apart for the processor to foresee; an address, not a
// pointer: it may lie after the tensor.
template <int write, class Real>
STK_INLINE void fetch(const ConvSizes &s, const Real *planes, int64_t count, Place place) {
  const int64_t plane = s.rows * s.columns * 2 * int64_t(sizeof(Real));
  uintptr_t p = reinterpret_cast<uintptr_t>(planes + 2 * place.at);
  for (int64_t c = 0; c < count; ++c, p += uintptr_t(plane))
    for (uintptr_t j = 0; j <= 2 * kBlock * sizeof(Real); j += 64)
      __builtin_prefetch(reinterpret_cast<const void *>(p + j), write, 2);
}

// The responses of `count` folded filters for the rows u and -u, (count, 2, 16) each.
template <class Real>
STK_INLINE void respond(const ConvSizes &s, const Real *filters, int64_t count, const Real *cosine, const Real *sine,
                        Real *up, Real *down) {
  using V = typename Vec<Real>::type;
  constexpr int lanes = Vec<Real>::lanes;
  const int64_t half = s.height / 2;
  for (int64_t w = 0; w < count; ++w, filters += s.height * 2 * kBlock, up += 2 * kBlock, down += 2 * kBlock) {
    for (int j = 0; j < kBlock; j += lanes) {
      const Real *even = filters + j, *odd = filters + (half + 1) * 2 * kBlock + j;
      V p_re = load(even), p_im = load(even + kBlock), q_re = p_re - p_re, q_im = q_re;
      for (int64_t a = 1; a <= half; ++a) {
        even += 2 * kBlock;
        p_re += cosine[a] * load(even);
        p_im += cosine[a] * load(even + kBlock);
        q_re += sine[a] * load(odd);
        q_im += sine[a] * load(odd + kBlock);
        odd += 2 * kBlock;
      }
      store(up + j, p_re - q_im);
      store(up + kBlock + j, p_im + q_re);
      store(down + j, p_re + q_im);
      store(down + kBlock + j, p_im - q_re);
    }
  }
}

// One row of frequencies: all output channels and frames.
template <class Real>
struct Row {
  const ConvSizes &sizes;
  const Real *x;          // (inputs, frames_out + taps - 1, 2, 16)
  const Real *responses;  // (outputs, inputs, taps, 2, 16)
  Real *y;                // (outputs, frames_out, rows, columns) complex
  Place place;
};

template <class Real, int outputs, int frames>
STK_INLINE void product_tile(const Row<Real> &row, int64_t output, int64_t frame) {
  using V = typename Vec<Real>::type;
  constexpr int lanes = Vec<Real>::lanes;
  const ConvSizes &s = row.sizes;
  const int64_t each = s.inputs * s.taps * 2 * kBlock, reach = s.frames_out + s.taps - 1;
  Real sums[outputs][frames][2 * kBlock];
  for (int j = 0; j < kBlock; j += lanes) {
    V re[outputs][frames], im[outputs][frames];
    const V zero = {};
    for (int o = 0; o < outputs; ++o)
      for (int f = 0; f < frames; ++f) re[o][f] = im[o][f] = zero;
    const Real *w = row.responses + output * each + j;
    for (int64_t i = 0; i < s.inputs; ++i) {
      const Real *x = row.x + (i * reach + frame) * 2 * kBlock + j;
      for (int64_t k = 0; k < s.taps; ++k, w += 2 * kBlock, x += 2 * kBlock) {
        V w_re[outputs], w_im[outputs];
        for (int o = 0; o < outputs; ++o) w_re[o] = load(w + o * each), w_im[o] = load(w + o * each + kBlock);
        for (int f = 0; f < frames; ++f) {
          const V x_re = load(x + f * 2 * kBlock), x_im = load(x + f * 2 * kBlock + kBlock);
          for (int o = 0; o < outputs; ++o) {
            re[o][f] += w_re[o] * x_re;
            im[o][f] += w_re[o] * x_im;
            re[o][f] -= w_im[o] * x_im;
            im[o][f] += w_im[o] * x_re;
          }
        }
      }
    }
    for (int o = 0; o < outputs; ++o)
      for (int f = 0; f < frames; ++f) store(sums[o][f] + j, re[o][f]), store(sums[o][f] + kBlock + j, im[o][f]);
  }
  for (int o = 0; o < outputs; ++o)
    for (int f = 0; f < frames; ++f)
      write_block(sums[o][f], row.place.count,
                  row.y + 2 * (((output + o) * s.frames_out + frame + f) * s.rows * s.columns + row.place.at));
}

template <class Real, int outputs, int frames>
STK_INLINE void product_frames(const Row<Real> &row, int64_t output, int64_t frame, int64_t left) {
  if constexpr (frames > 1) {
    if (left < frames) return product_frames<Real, outputs, frames - 1>(row, output, frame, left);
  }
  product_tile<Real, outputs, frames>(row, output, frame);
}

template <class Real>
void product_row(const Row<Real> &row) {
  const ConvSizes &s = row.sizes;
  int64_t o = 0;
  for (; o + kOutputs <= s.outputs; o += kOutputs)
    for (int64_t f = 0; f < s.frames_out; f += kFrames)
      product_frames<Real, kOutputs, kFrames>(row, o, f, s.frames_out - f);
  for (; o < s.outputs; ++o)
    for (int64_t f = 0; f < s.frames_out; f += kFrames)
      product_frames<Real, 1, kFrames>(row, o, f, s.frames_out - f);
}

template <class Real>
void product(const ConvArgs &args, Real *scratch, int64_t begin, int64_t end) {
  const ConvSizes &s = args.sizes;
  const int64_t half = s.height / 2, pairs = s.rows / 2 + 1, filters = s.outputs * s.inputs * s.taps;
  const Real *cosine = static_cast<const Real *>(args.cosine), *sine = static_cast<const Real *>(args.sine);
  const Real *planes = static_cast<const Real *>(args.x);
  Real *up = scratch, *down = up + filters * 2 * kBlock, *x = down + filters * 2 * kBlock;
  Real *y = static_cast<Real *>(args.y);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t block = item / pairs, u = item % pairs;
    const Real *folded = static_cast<const Real *>(args.filters) + block * filters * s.height * 2 * kBlock;
    const int64_t mirror = (s.rows - u) % s.rows;
    const Place place[2] = {place_of(s, block, u), place_of(s, block, mirror)};
    for (const Place &at : place) fetch<1>(s, y, s.outputs * s.frames_out, at);
    respond(s, folded, filters, cosine + u * (half + 1), sine + u * (half + 1), up, down);
    if (u + 1 < pairs) {
      fetch<0>(s, planes, s.inputs * s.frames_in, place_of(s, block, u + 1));
      fetch<0>(s, planes, s.inputs * s.frames_in, place_of(s, block, s.rows - u - 1));
    }
    for (int r = 0; r < (mirror == u ? 1 : 2); ++r) {
      read_frames(s, planes, place[r], x);
      product_row<Real>({s, x, r ? down : up, y, place[r]});
    }
  }
}

// The gradient of one response: the sum over frames of conj(x) · grad, for `taps` taps that follow each other.
template <class Real, int taps>
STK_INLINE void correlate(const Real *x, const Real *grad, int64_t frames, Real *out) {
  using V = typename Vec<Real>::type;
  constexpr int lanes = Vec<Real>::lanes;
  for (int j = 0; j < kBlock; j += lanes) {
    V re[taps], im[taps];
    const V zero = {};
    for (int k = 0; k < taps; ++k) re[k] = im[k] = zero;
    for (int64_t f = 0; f < frames; ++f) {
      const V g_re = load(grad + f * 2 * kBlock + j), g_im = load(grad + f * 2 * kBlock + kBlock + j);
      for (int k = 0; k < taps; ++k) {
        const Real *at = x + (f + k) * 2 * kBlock + j;
        const V x_re = load(at), x_im = load(at + kBlock);
        re[k] += x_re * g_re;
        im[k] += x_re * g_im;
        re[k] += x_im * g_im;
        im[k] -= x_im * g_re;
      }
    }
    for (int k = 0; k < taps; ++k) store(out + k * 2 * kBlock + j, re[k]), store(out + k * 2 * kBlock + kBlock + j, im[k]);
  }
}

// Adds the gradients of the responses for u and -u to that of the folded filter.
template <class Real>
STK_INLINE void fold_back(const ConvSizes &s, const Real *up, const Real *down, const Real *cosine, const Real *sine,
                          Real *filter) {
  using V = typename Vec<Real>::type;
  constexpr int lanes = Vec<Real>::lanes;
  const int64_t half = s.height / 2;
  for (int j = 0; j < kBlock; j += lanes) {
    const V up_re = load(up + j), up_im = load(up + kBlock + j);
    const V down_re = load(down + j), down_im = load(down + kBlock + j);
    const V p_re = up_re + down_re, p_im = up_im + down_im, q_re = up_im - down_im, q_im = down_re - up_re;
    Real *even = filter + j, *odd = filter + (half + 1) * 2 * kBlock + j;
    store(even, load(even) + p_re);
    store(even + kBlock, load(even + kBlock) + p_im);
    for (int64_t a = 1; a <= half; ++a) {
      even += 2 * kBlock;
      store(even, load(even) + cosine[a] * p_re);
      store(even + kBlock, load(even + kBlock) + cosine[a] * p_im);
      store(odd, load(odd) + sine[a] * q_re);
      store(odd + kBlock, load(odd + kBlock) + sine[a] * q_im);
      odd += 2 * kBlock;
    }
  }
}

// Items are pairs of a block and a group of output channels: each filter's gradient is summed by one thread, in one order.
template <class Real>
void gradient(const ConvArgs &args, Real *scratch, int64_t begin, int64_t end) {
  constexpr int kTaps = 3;
  const ConvSizes &s = args.sizes;
  const int64_t half = s.height / 2, reach = s.frames_out + s.taps - 1, per_output = s.inputs * s.taps;
  const int64_t x_size = s.inputs * reach * 2 * kBlock, g_size = s.frames_out * 2 * kBlock;
  const int64_t r_size = s.taps * 2 * kBlock, plane = s.rows * s.columns;
  const Real *planes = static_cast<const Real *>(args.x), *grad = static_cast<const Real *>(args.y);
  Real *x[2] = {scratch, scratch + x_size}, *g[2], *out[2];
  g[0] = x[1] + x_size, g[1] = g[0] + g_size, out[0] = g[1] + g_size, out[1] = out[0] + r_size;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t block = item / args.groups, group = item % args.groups;
    const int64_t first = group * s.outputs / args.groups, last = (group + 1) * s.outputs / args.groups;
    for (int64_t u = 0; u <= s.rows / 2; ++u) {
      const Real *cosine = static_cast<const Real *>(args.cosine) + u * (half + 1);
      const Real *sine = static_cast<const Real *>(args.sine) + u * (half + 1);
      const int64_t mirror = (s.rows - u) % s.rows, sides = mirror == u ? 1 : 2;
      if (sides == 1)
        for (int64_t j = 0; j < r_size; ++j) out[1][j] = 0;
      const Place place[2] = {place_of(s, block, u), place_of(s, block, mirror)};
      for (int64_t r = 0; r < sides; ++r) read_frames(s, planes, place[r], x[r]);
      if (u < s.rows / 2) {
        const Place next[2] = {place_of(s, block, u + 1), place_of(s, block, s.rows - u - 1)};
        for (const Place &at : next) {
          fetch<0>(s, planes, s.inputs * s.frames_in, at);
          fetch<0>(s, grad + 2 * first * s.frames_out * plane, (last - first) * s.frames_out, at);
        }
      }
      for (int64_t o = first; o < last; ++o) {
        for (int64_t r = 0; r < sides; ++r)
          for (int64_t f = 0; f < s.frames_out; ++f)
            read_block(grad + 2 * ((o * s.frames_out + f) * plane + place[r].at), place[r].count,
                       g[r] + f * 2 * kBlock);
        Real *filter = static_cast<Real *>(args.filters_grad) + (block * s.outputs + o) * per_output * s.height * 2 * kBlock;
        for (int64_t i = 0; i < s.inputs; ++i) {
          for (int64_t r = 0; r < sides; ++r) {
            const Real *at = x[r] + i * reach * 2 * kBlock;
            int64_t k = 0;
            for (; k + kTaps <= s.taps; k += kTaps)
              correlate<Real, kTaps>(at + k * 2 * kBlock, g[r], s.frames_out, out[r] + k * 2 * kBlock);
            for (; k < s.taps; ++k)
              correlate<Real, 1>(at + k * 2 * kBlock, g[r], s.frames_out, out[r] + k * 2 * kBlock);
          }
          for (int64_t k = 0; k < s.taps; ++k, filter += s.height * 2 * kBlock)
            fold_back(s, out[0] + k * 2 * kBlock, out[1] + k * 2 * kBlock, cosine, sine, filter);
        }
      }
    }
  }
}

int64_t scratch(const ConvArgs &args) {
  const ConvSizes &s = args.sizes;
  const int64_t reach = s.frames_out + s.taps - 1;
  const int64_t blocks = args.filters_grad ? 2 * (s.inputs * reach + s.frames_out + s.taps)
                                           : 2 * s.outputs * s.inputs * s.taps + s.inputs * reach;
  return blocks * 2 * kBlock * (args.dtype == Dtype::f64 ? 8 : 4);
}

void run_product(const ConvArgs &args, void *scratch, int64_t begin, int64_t end) {
  if (args.dtype == Dtype::f64) return product<double>(args, static_cast<double *>(scratch), begin, end);
  product<float>(args, static_cast<float *>(scratch), begin, end);
}

void run_gradient(const ConvArgs &args, void *scratch, int64_t begin, int64_t end) {
  if (args.dtype == Dtype::f64) return gradient<double>(args, static_cast<double *>(scratch), begin, end);
  gradient<float>(args, static_cast<float *>(scratch), begin, end);
}

}  // namespace

extern const ConvKernels conv_kernels = {scratch, run_product, run_gradient};

}  // namespace STK_ISA
}  // namespace stk
