// SPDX-License-Identifier: Apache-2.0
// What the instruction-set specific kernels (match, merge, norm, conv, attention.cpp) offer to the rest. Shapes as in the Python docs:
// metric (N, H, T, C), rows (N, T, D), members (N, T), offsets (N, T_out + 1). Strides are in elements; the last axis of
// every tensor is contiguous. All sizes are 64-bit: tensors of more than 2^31 elements are addressed like any other.
#pragma once
#include <cstdint>

namespace stk {

enum class Dtype : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };
enum class Mode : int { mean = 0, sum = 1, max = 2, all = 3 };

// One item of the metric and where its prepared tokens go.
struct Metric {
  const void *data;
  Dtype dtype;
  int64_t heads, channels;
  int64_t stride_head, stride_token;
};

// Without an order A is the tokens first_a, first_a + 2, ... (sources), and B is first_b, first_b + 2, ... (targets).
// With one, A and B are what it holds from its places first_a and first_b on, each ascending; what lies before is in
// neither set.
struct Sets {
  int64_t first_a, sources, first_b, targets;
  const int32_t *order = nullptr;

  int64_t source(int64_t i) const { return order ? order[first_a + i] : first_a + 2 * i; }
  int64_t target(int64_t j) const { return order ? order[first_b + j] : first_b + 2 * j; }
};

// The proposals of one item: for each a in A the similarity to its most similar b, and that b's rank in B.
// `Real` is double for a float64 metric, else float.
template <class Real>
struct Proposals {
  Real *best;
  int32_t *partner;
};

// The kernels get copies that copy_groups has checked, and check nothing again.
struct Groups {
  const int32_t *members;  // ~i stands for a token i of weight 0
  const int32_t *offsets;
  int64_t items, tokens_in, tokens_out;
  const float *size;  // of each token; null: all ones
  int64_t size_stride_item, size_stride_token;
};

struct Rows {
  void *data;
  int64_t stride_item, stride_row;
};

struct ReduceArgs {
  Rows x, y;
  Dtype dtype;
  Mode mode;
  Groups groups;
  int64_t dim;
  float *size_out;  // (N, T_out) contiguous
  bool stream;      // write around the caches
};

struct SpreadArgs {
  Rows grad, out;
  Dtype dtype;
  Mode mode;
  Groups groups;
  int64_t dim;
  Rows x, y;  // Mode::max only
  bool stream;
};

// Residual add, merge (mode mean) and LayerNorm. `wide` is double for f64, else float.
struct NormArgs {
  Rows x, residual, y, normed;
  Dtype dtype;
  Groups groups;
  int64_t dim;
  float *size_out;            // (N, T_out) contiguous, as mean and rstd
  const void *weight, *bias;  // (D,) wide; null: none
  double eps;
  void *mean, *rstd;  // wide; null: not wanted
  bool stream;
};

struct NormGradArgs {
  Rows grad_normed, grad_y, y, out;  // grad_y may be null
  Dtype dtype;
  Groups groups;
  int64_t dim;
  const void *mean, *rstd, *weight;  // wide; weight may be null
  void *affine;                      // (2, D) wide, the gradients of weight and bias; null: not wanted
  void *partial;                     // (blocks, 2, D) wide, of block_rows rows each; null with affine
  int64_t block_rows;
  bool stream;
};

struct MatchSizes {
  int64_t tiles, panels;  // blocks of A and of B
  int64_t scratch, rows;  // bytes: what one item's prepared tokens take, and what `prepare` needs besides
};

// Steps 1 to 4 of the matching of one item: `prepare` blocks [0, tiles + panels), then `propose` for tiles [0, tiles).
// Blocks are independent of each other. `best` holds a double for each source if the metric is float64, else a float.
struct MatchKernels {
  MatchSizes (*sizes)(Dtype dtype, int64_t channels, const Sets &);
  void (*prepare)(const Metric &, const Sets &, void *scratch, void *rows, void *best, int64_t begin, int64_t end);
  void (*propose)(const Metric &, const Sets &, const void *scratch, void *best, int32_t *partner, int64_t begin,
                  int64_t end);
};

struct MergeKernels {
  // output rows [begin, end) of all N * T_out
  void (*reduce)(const ReduceArgs &, int64_t begin, int64_t end);
  void (*spread)(const SpreadArgs &, int64_t begin, int64_t end);
};

struct NormKernels {
  int64_t (*scratch)(Dtype dtype, int64_t dim);  // bytes that a thread needs
  // output rows [begin, end) of all N * T_out, and blocks of them
  void (*forward)(const NormArgs &, void *scratch, int64_t begin, int64_t end);
  void (*backward)(const NormGradArgs &, void *scratch, int64_t begin, int64_t end);
  void (*affine)(const NormGradArgs &, int64_t blocks);  // adds the parts up
};

constexpr int kQueries = 6;  // of a tile, which share what is loaded of keys and values

// What an (N, H, tokens, d) tensor is read by.
struct Heads {
  const void *data;
  int64_t stride_item, stride_head, stride_token;
};

// Shapes as in the Python docs: q (N, H, Tq, d), k and v (N, H, T, d), prefixes (M, H, G, d), M dividing N.
struct AttentionArgs {
  Heads q, k, v, prefix_k, prefix_v;  // the prefixes stand in front of k and v; null if ahead is 0
  int64_t items, heads, queries, tokens, dim, prefixes, ahead;
  Dtype dtype;
  const float *size;  // (N, T); null: all ones
  int64_t size_stride_item, size_stride_token;
  double scale;
  void *out;  // (N, Tq, H, d) contiguous
  void *lse;  // (N, H, Tq) contiguous, double for f64, else float; null: not wanted

  int64_t keys() const { return ahead + tokens; }
  int64_t tiles() const { return (queries + kQueries - 1) / kQueries; }  // of an item's head
};

struct AttentionKernels {
  int64_t (*scratch)(const AttentionArgs &);  // bytes that a thread needs
  // tiles [begin, end) of all N * H * tiles()
  void (*forward)(const AttentionArgs &, void *scratch, int64_t begin, int64_t end);
};

constexpr int kConvBlock = 16;  // frequencies along the width that a block of filters holds

// Planes of frequencies of one piece of a video: x (inputs, frames_in, rows, columns), y (outputs, frames_out, rows,
// columns), and a filter of taps x height for each pair of channels. Frame t of y and tap k meet frame t + k + shift of x;
// there are zeros before the first frame and after the last.
struct ConvSizes {
  int64_t inputs, outputs, taps, height;
  int64_t frames_in, frames_out, shift;
  int64_t rows, columns;
};

struct ConvArgs {
  ConvSizes sizes;
  Dtype dtype;         // f32 or f64
  const void *x;       // complex, contiguous
  void *y;             // complex, contiguous; the gradient of y where that of the filters is wanted
  const void *cosine;  // (rows / 2 + 1, height / 2 + 1), of 2 pi u a / rows
  const void *sine;
  const void *filters;  // folded: (blocks, outputs, inputs, taps, height, 2, kConvBlock)
  void *filters_grad;   // as filters, added to; null: y is wanted
  int64_t groups;       // of output channels, for the gradient of the filters
};

struct ConvKernels {
  int64_t (*scratch)(const ConvArgs &);  // bytes that a thread needs
  // [begin, end) of all blocks * (rows / 2 + 1)
  void (*product)(const ConvArgs &, void *scratch, int64_t begin, int64_t end);
  // [begin, end) of all blocks * groups
  void (*gradient)(const ConvArgs &, void *scratch, int64_t begin, int64_t end);
};

// One of these for each instruction set; dispatch.cpp picks the best that the processor has.
struct Kernels {
  const char *name;
  const MatchKernels *match;
  const MergeKernels *merge;
  const NormKernels *norm;
  const ConvKernels *conv;
  const AttentionKernels *attention;
};

const Kernels &kernels();                    // the best set that this processor runs
const Kernels *kernels_named(const char *);  // null: not in this build or not on this processor
void use_kernels(const Kernels *);           // for tests; null: the best again

// Copies members and offsets of items [begin, end), each element read once, and checks the copies: offsets rise from 0 to
// tokens_in, and members hold each token once. Gives the first item that is damaged, else end. `seen` holds
// tokens_in bytes.
int64_t copy_groups(const Groups &from, int32_t *members, int32_t *offsets, uint8_t *seen, int64_t begin, int64_t end);

// Steps 5 and 6: choose the r best proposals of one item and write its dest, members and offsets. `protected_` counts the
// tokens in neither set. `scratch` holds plan_scratch(sets) bytes.
int64_t plan_scratch(const Sets &);
template <class Real>
void plan_item(Proposals<Real>, const Sets &, int64_t tokens, int64_t protected_, int64_t r, void *scratch,
               int32_t *dest, int32_t *members, int32_t *offsets);

}  // namespace stk
