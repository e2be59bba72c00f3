// SPDX-License-Identifier: Apache-2.0
// The Python module stoptome_kernels._native. It takes addresses, sizes and strides instead of tensors, so that it needs
// no torch header and one binary serves every torch version. stoptome_kernels/checks.py checks shapes, dtypes and
// devices before _backends/native.py calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"
#include "threads.h"

namespace py = pybind11;

namespace stk {
namespace {

// Below this many bytes of work a second thread costs more than it brings.
constexpr int64_t kBytesPerThread = 32 * 1024;
// The gradients of weight and bias are summed over blocks of this many rows at least, this many blocks at most.
constexpr int64_t kBlockRows = 32, kMostBlocks = 128;
// An output larger than this is not in the caches when its reader comes: write it around them.
std::atomic<int64_t> stream_bytes{int64_t(8) << 20};

// A fresh output of this size comes from the kernel page by page. Asking for huge pages before the first touch makes that
// one fault for 2 MiB instead of 512: on one machine filling 53 MiB took 2.8 ms instead of 14.
std::atomic<int64_t> huge_bytes{int64_t(4) << 20};

template <class T>
T *pointer(uintptr_t address) {
  return reinterpret_cast<T *>(address);
}

void expect_writes(uintptr_t out, int64_t bytes) {
#if defined(__linux__)
  if (bytes < huge_bytes) return;
  constexpr uintptr_t page = 4096;
  const uintptr_t begin = (out + page - 1) & ~(page - 1), end = (out + uintptr_t(bytes)) & ~(page - 1);
  (void)madvise(pointer<void>(begin), end - begin, MADV_HUGEPAGE);  // a hint: it may fail
#else
  (void)out, (void)bytes;
#endif
}

void expect_writes(const Rows &out, int64_t bytes) { expect_writes(reinterpret_cast<uintptr_t>(out.data), bytes); }

int64_t element_bytes(int dtype) { return dtype == int(Dtype::f64) ? 8 : dtype == int(Dtype::f32) ? 4 : 2; }
int64_t align64(int64_t n) { return (n + 63) / 64 * 64; }

// Python's MemoryError, with the bytes that were wanted.
class NoMemory : public std::bad_alloc {
 public:
  explicit NoMemory(int64_t bytes) {
    std::snprintf(text_, sizeof(text_), "stoptome_kernels can't allocate %lld bytes of memory to work in",
                  static_cast<long long>(bytes));
  }
  const char *what() const noexcept override { return text_; }

 private:
  char text_[96];
};

// Aligned memory that frees itself.
class Buffer {
 public:
  explicit Buffer(int64_t bytes)
      : data_(static_cast<char *>(::operator new(size_t(bytes), std::align_val_t(64), std::nothrow))) {
    if (!data_) throw NoMemory(bytes);
  }
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  Buffer(const Buffer &) = delete;
  Buffer &operator=(const Buffer &) = delete;
  char *data() const { return data_; }

 private:
  char *data_;
};

struct MatchJob {
  Metric metric;
  Sets sets;
  MatchSizes sizes;
  const MatchKernels *run;
  int64_t item_bytes, tokens, protected_, r;
  int32_t *dest, *members, *offsets;
  // a piece of memory for each thread: similarities, partners, prepared tokens, rows or (afterwards) the plan's scratch
  char *memory;
  int64_t partner_at, scratch_at, rows_at, piece;

  Metric item(int64_t n) const {
    Metric m = metric;
    m.data = static_cast<const char *>(metric.data) + n * item_bytes;
    return m;
  }
  char *of(int thread) const { return memory + thread * piece; }
  int32_t *partner(char *p) const { return reinterpret_cast<int32_t *>(p + partner_at); }

  void plan(int64_t n, char *p) const {
    int32_t *d = dest + n * tokens, *m = members + n * tokens, *o = offsets + n * (tokens - r + 1);
    if (metric.dtype == Dtype::f64)
      plan_item<double>({reinterpret_cast<double *>(p), partner(p)}, sets, tokens, protected_, r, p + rows_at, d, m, o);
    else
      plan_item<float>({reinterpret_cast<float *>(p), partner(p)}, sets, tokens, protected_, r, p + rows_at, d, m, o);
  }
};

// Enough items for every thread: each takes whole items, whose tokens stay in its cache.
void match_items(void *context, int64_t begin, int64_t end, int thread) {
  const MatchJob &job = *static_cast<const MatchJob *>(context);
  char *p = job.of(thread);
  for (int64_t n = begin; n < end; ++n) {
    const Metric m = job.item(n);
    job.run->prepare(m, job.sets, p + job.scratch_at, p + job.rows_at, p, 0, job.sizes.tiles + job.sizes.panels);
    job.run->propose(m, job.sets, p + job.scratch_at, p, job.partner(p), 0, job.sizes.tiles);
    job.plan(n, p);
  }
}

// Few long items: the threads share each of them.
struct SharedItem {
  const MatchJob &job;
  Metric metric;
};

void prepare_blocks(void *context, int64_t begin, int64_t end, int thread) {
  const SharedItem &s = *static_cast<const SharedItem *>(context);
  char *shared = s.job.of(0);
  s.job.run->prepare(s.metric, s.job.sets, shared + s.job.scratch_at, s.job.of(thread) + s.job.rows_at, shared, begin,
                     end);
}

void propose_tiles(void *context, int64_t begin, int64_t end, int) {
  const SharedItem &s = *static_cast<const SharedItem *>(context);
  char *shared = s.job.of(0);
  s.job.run->propose(s.metric, s.job.sets, shared + s.job.scratch_at, shared, s.job.partner(shared), begin, end);
}

// Of the metric: address, strides of an item, a head and a token; and items, heads, tokens, channels.
using MetricAt = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;
using MetricShape = std::tuple<int64_t, int64_t, int64_t, int64_t>;
// Of a plan that is written: dest, members, offsets.
using PlanAt = std::tuple<uintptr_t, uintptr_t, uintptr_t>;

void match(MetricAt at, MetricShape shape, int dtype, int64_t r, int64_t protected_, uintptr_t order, int64_t sources,
           PlanAt plan, int threads) {
  py::gil_scoped_release released;
  const auto [metric, stride_item, stride_head, stride_token] = at;
  const auto [items, heads, tokens, channels] = shape;
  const auto [dest, members, offsets] = plan;
  MatchJob job;
  job.metric = {reinterpret_cast<const void *>(metric), Dtype(dtype), heads, channels, stride_head, stride_token};
  job.item_bytes = stride_item * element_bytes(dtype);
  job.tokens = tokens;
  job.protected_ = protected_;
  job.r = r;
  Sets &sets = job.sets;
  if (order) {
    sets = {protected_, sources, protected_ + sources, tokens - protected_ - sources,
            reinterpret_cast<const int32_t *>(order)};
  } else {
    sets.first_a = protected_ + protected_ % 2;
    sets.first_b = protected_ + 1 - protected_ % 2;
    sets.sources = tokens > sets.first_a ? (tokens - sets.first_a + 1) / 2 : 0;
    sets.targets = tokens > sets.first_b ? (tokens - sets.first_b + 1) / 2 : 0;
  }
  if (r < 1 || r > sets.sources || sets.targets < 1) throw std::invalid_argument("r is out of range");
  job.dest = reinterpret_cast<int32_t *>(dest);
  job.members = reinterpret_cast<int32_t *>(members);
  job.offsets = reinterpret_cast<int32_t *>(offsets);
  job.run = kernels().match;
  job.sizes = job.run->sizes(Dtype(dtype), channels, sets);

  const int64_t real = dtype == int(Dtype::f64) ? 8 : 4;
  job.partner_at = align64(real * sets.sources);
  job.scratch_at = job.partner_at + align64(4 * sets.sources);
  job.rows_at = job.scratch_at + align64(job.sizes.scratch);
  job.piece = job.rows_at + align64(std::max(job.sizes.rows, plan_scratch(sets)));
  const int team = std::max(threads, 1);
  const int64_t bytes = tokens * heads * channels * element_bytes(dtype);
  // fewer items than threads: shared, if a thread's part of the similarities is worth the two more barriers
  const bool share = items < team && double(sets.sources) * sets.targets / team * channels >= double(1 << 20);
  const Buffer memory(job.piece * (share ? team : std::min<int64_t>(team, items)));
  job.memory = memory.data();
  if (!share) return parallel_for(items, kBytesPerThread / (bytes + 1) + 1, team, match_items, &job);
  for (int64_t n = 0; n < items; ++n) {
    SharedItem item{job, job.item(n)};
    parallel_for(job.sizes.tiles + job.sizes.panels, 1, team, prepare_blocks, &item);
    parallel_for(job.sizes.tiles, 1, team, propose_tiles, &item);
    job.plan(n, job.of(0));
  }
}

// Calls run(begin, end, thread) on ranges that cover [0, count), where one step moves `bytes`, without the GIL.
template <class Run>
void in_ranges(int64_t count, int64_t bytes, int threads, Run run) {
  py::gil_scoped_release released;
  parallel_for(
      count, kBytesPerThread / (bytes + 1) + 1, threads,
      [](void *context, int64_t begin, int64_t end, int thread) { (*static_cast<Run *>(context))(begin, end, thread); },
      &run);
}

using Strided = std::tuple<uintptr_t, int64_t, int64_t>;  // address, stride of an item, stride of a row
// members, offsets; items, tokens in, tokens out; sizes
using GroupsAt = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, int64_t, Strided>;

Rows rows(const Strided &s) { return {pointer<void>(std::get<0>(s)), std::get<1>(s), std::get<2>(s)}; }

// The groups of a plan, copied and checked; raises IndexError for a plan that is damaged.
class CheckedGroups {
 public:
  CheckedGroups(const GroupsAt &at, int threads) : CheckedGroups(given(at), threads) {}
  operator const Groups &() const { return groups_; }

 private:
  static Groups given(const GroupsAt &at) {
    const auto [members, offsets, items, tokens_in, tokens_out, sizes] = at;
    const auto [size, item, token] = sizes;
    return {pointer<const int32_t>(members),
            pointer<const int32_t>(offsets),
            items,
            tokens_in,
            tokens_out,
            pointer<const float>(size),
            item,
            token};
  }

  CheckedGroups(const Groups &from, int threads)
      : seen_at_(align64(4 * from.items * (from.tokens_in + from.tokens_out + 1))),
        memory_(seen_at_ + std::max(threads, 1) * align64(from.tokens_in)),
        groups_(from) {
    int32_t *const members = reinterpret_cast<int32_t *>(memory_.data());
    int32_t *const offsets = members + from.items * from.tokens_in;
    std::atomic<int64_t> damaged{from.items};
    in_ranges(from.items, 4 * (from.tokens_in + from.tokens_out), threads, [&](int64_t begin, int64_t end, int thread) {
      uint8_t *const seen = reinterpret_cast<uint8_t *>(memory_.data()) + seen_at_ + thread * align64(from.tokens_in);
      const int64_t found = copy_groups(from, members, offsets, seen, begin, end);
      int64_t first = damaged;  // of all items, whatever the threads
      while (found < end && found < first && !damaged.compare_exchange_weak(first, found)) {
      }
    });
    if (damaged < from.items)
      throw py::index_error("plan is damaged: the groups of item " + std::to_string(damaged) +
                            " don't hold each of its " + std::to_string(from.tokens_in) +
                            " tokens once; it was changed after match(), or was not made by it");
    groups_.members = members;
    groups_.offsets = offsets;
  }

  const int64_t seen_at_;
  const Buffer memory_;
  Groups groups_;
};

// Runs reduce or spread over all output rows.
template <class Args>
void over_rows(const Args &args, void (*run)(const Args &, int64_t, int64_t), int threads) {
  in_ranges(args.groups.items * args.groups.tokens_out, args.dim * element_bytes(int(args.dtype)), threads,
            [&](int64_t begin, int64_t end, int) { run(args, begin, end); });
}

void reduce(Strided x, Strided y, int dtype, int mode, GroupsAt at, int64_t dim, uintptr_t size_out, bool fresh,
            int threads) {
  const CheckedGroups checked(at, threads);
  const Groups &groups = checked;
  const int64_t bytes = groups.items * groups.tokens_out * dim * element_bytes(dtype);
  ReduceArgs args{
      rows(x), rows(y), Dtype(dtype), Mode(mode), groups, dim, pointer<float>(size_out), bytes > stream_bytes};
  if (fresh) expect_writes(args.y, bytes);  // leave caller-owned memory alone
  over_rows(args, kernels().merge->reduce, threads);
}

void spread(Strided grad, Strided out, int dtype, int mode, GroupsAt at, int64_t dim, Strided x, Strided y,
            int threads) {
  const CheckedGroups checked(at, threads);
  const Groups &groups = checked;
  const int64_t bytes = groups.items * groups.tokens_in * dim * element_bytes(dtype);
  SpreadArgs args{rows(grad), rows(out), Dtype(dtype), Mode(mode), groups, dim, rows(x), rows(y), bytes > stream_bytes};
  expect_writes(args.out, bytes);
  over_rows(args, kernels().merge->spread, threads);
}

void merge_norm(Strided x, Strided residual, Strided y, Strided normed, int dtype, GroupsAt at, int64_t dim,
                uintptr_t size_out, uintptr_t weight, uintptr_t bias, double eps, uintptr_t mean, uintptr_t rstd,
                int threads) {
  const CheckedGroups checked(at, threads);
  const Groups &groups = checked;
  const int64_t bytes = groups.items * groups.tokens_out * dim * element_bytes(dtype);
  NormArgs args{rows(x),
                rows(residual),
                rows(y),
                rows(normed),
                Dtype(dtype),
                groups,
                dim,
                pointer<float>(size_out),
                pointer<const void>(weight),
                pointer<const void>(bias),
                eps,
                pointer<void>(mean),
                pointer<void>(rstd),
                bytes > stream_bytes};
  expect_writes(args.y, bytes);
  expect_writes(args.normed, bytes);
  const NormKernels &run = *kernels().norm;
  const int64_t count = groups.items * groups.tokens_out;
  const int64_t piece = count ? run.scratch(args.dtype, dim) : 0;  // no rows: any width
  const Buffer scratch(piece * std::max(threads, 1));
  in_ranges(count, 2 * dim * element_bytes(dtype), threads, [&](int64_t begin, int64_t end, int thread) {
    run.forward(args, scratch.data() + thread * piece, begin, end);
  });
}

void merge_norm_backward(Strided grad_normed, Strided grad_y, Strided y, Strided out, int dtype, GroupsAt at,
                         int64_t dim, uintptr_t mean, uintptr_t rstd, uintptr_t weight, uintptr_t affine, int threads) {
  const CheckedGroups checked(at, threads);
  const Groups &groups = checked;
  // how rows are added up to the gradients of weight and bias must not depend on the number of threads
  const int64_t count = groups.items * groups.tokens_out;
  const int64_t block_rows = std::max(kBlockRows, (count + kMostBlocks - 1) / kMostBlocks);
  const int64_t blocks = (count + block_rows - 1) / block_rows;
  const int64_t real = dtype == int(Dtype::f64) ? 8 : 4;
  const int64_t bytes = groups.items * groups.tokens_in * dim * element_bytes(dtype);
  const NormKernels &run = *kernels().norm;
  const int64_t piece = count ? run.scratch(Dtype(dtype), dim) : 0;
  const int64_t parts = affine ? align64(blocks * 2 * dim * real) : 0;
  const Buffer memory(parts + piece * std::max(threads, 1));
  NormGradArgs args{rows(grad_normed),
                    rows(grad_y),
                    rows(y),
                    rows(out),
                    Dtype(dtype),
                    groups,
                    dim,
                    pointer<const void>(mean),
                    pointer<const void>(rstd),
                    pointer<const void>(weight),
                    pointer<void>(affine),
                    affine ? memory.data() : nullptr,
                    block_rows,
                    bytes > stream_bytes};
  expect_writes(args.out, bytes);
  in_ranges(blocks, block_rows * dim * element_bytes(dtype), threads, [&](int64_t begin, int64_t end, int thread) {
    run.backward(args, memory.data() + parts + thread * piece, begin, end);
  });
  if (affine) run.affine(args, blocks);
}

// (inputs, outputs, taps, height), (frames_in, frames_out, shift), (rows, columns)
using ConvShape = std::tuple<std::tuple<int64_t, int64_t, int64_t, int64_t>, std::tuple<int64_t, int64_t, int64_t>,
                             std::tuple<int64_t, int64_t>>;

// Products of planes and filters, or, where filters_grad is given, its sums over the frames of y.
void conv(ConvShape shape, int dtype, uintptr_t x, uintptr_t y, std::tuple<uintptr_t, uintptr_t> waves,
          uintptr_t filters, uintptr_t filters_grad, int threads) {
  const auto [inputs, outputs, taps, height] = std::get<0>(shape);
  const auto [frames_in, frames_out, shift] = std::get<1>(shape);
  const auto [rows, columns] = std::get<2>(shape);
  const int64_t blocks = (columns + kConvBlock - 1) / kConvBlock;
  // as many groups of output channels as give each thread two items
  const int64_t team = std::max(threads, 1);
  const int64_t groups = std::clamp<int64_t>(2 * team / std::max<int64_t>(blocks, 1), 1, std::max<int64_t>(outputs, 1));
  const ConvArgs args{{inputs, outputs, taps, height, frames_in, frames_out, shift, rows, columns},
                      Dtype(dtype),
                      pointer<const void>(x),
                      pointer<void>(y),
                      pointer<const void>(std::get<0>(waves)),
                      pointer<const void>(std::get<1>(waves)),
                      pointer<const void>(filters),
                      pointer<void>(filters_grad),
                      groups};
  const ConvKernels &run = *kernels().conv;
  const int64_t piece = align64(run.scratch(args));
  const Buffer scratch(piece * team);
  const int64_t bytes = (inputs * frames_in + outputs * frames_out) * 2 * kConvBlock * element_bytes(dtype);
  if (filters_grad)
    return in_ranges(blocks * groups, rows * bytes, threads, [&](int64_t begin, int64_t end, int thread) {
      run.gradient(args, scratch.data() + thread * piece, begin, end);
    });
  in_ranges(blocks * (rows / 2 + 1), 2 * bytes, threads, [&](int64_t begin, int64_t end, int thread) {
    run.product(args, scratch.data() + thread * piece, begin, end);
  });
}

using HeadsAt = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;  // address, strides of an item, a head and a token
// items, heads, queries, tokens, channels; items and tokens of the prefix
using AttentionShape = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

Heads heads(const HeadsAt &at) {
  return {pointer<const void>(std::get<0>(at)), std::get<1>(at), std::get<2>(at), std::get<3>(at)};
}

void attention(HeadsAt q, HeadsAt k, HeadsAt v, HeadsAt prefix_k, HeadsAt prefix_v, AttentionShape shape, int dtype,
               Strided sizes, double scale, uintptr_t out, uintptr_t lse, int threads) {
  const auto [items, count, queries, tokens, dim, prefixes, ahead] = shape;
  const AttentionArgs args{heads(q),
                           heads(k),
                           heads(v),
                           heads(prefix_k),
                           heads(prefix_v),
                           items,
                           count,
                           queries,
                           tokens,
                           dim,
                           prefixes,
                           ahead,
                           Dtype(dtype),
                           pointer<const float>(std::get<0>(sizes)),
                           std::get<1>(sizes),
                           std::get<2>(sizes),
                           scale,
                           pointer<void>(out),
                           pointer<void>(lse)};
  expect_writes(out, items * count * queries * dim * element_bytes(dtype));
  const AttentionKernels &run = *kernels().attention;
  const int64_t piece = align64(run.scratch(args)), bytes = piece * std::max(threads, 1);
  // a small call takes its scratch from the stack
  alignas(64) char few[16 * 1024];
  std::optional<Buffer> many;
  if (bytes > int64_t(sizeof(few))) many.emplace(bytes);
  char *const scratch = many ? many->data() : few;
  // a tile multiplies more than it moves: as long as for this many bytes
  const int64_t moved = kQueries * args.keys() * dim / 2;
  in_ranges(items * count * args.tiles(), moved, threads,
            [&](int64_t begin, int64_t end, int thread) { run.forward(args, scratch + thread * piece, begin, end); });
}

}  // namespace
}  // namespace stk

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  m.doc() = "Native CPU kernels of stoptome_kernels; private, see stoptome_kernels._backends.";
  m.attr("INTERFACE") = 6;  // of the arguments below; _backends/native.py asks for it
  m.def("match", &stk::match);
  m.def("reduce", &stk::reduce);
  m.def("spread", &stk::spread);
  m.def("merge_norm", &stk::merge_norm);
  m.def("merge_norm_backward", &stk::merge_norm_backward);
  m.def("expect_writes", [](uintptr_t out, int64_t bytes) { stk::expect_writes(out, bytes); });
  m.def("conv", &stk::conv);
  m.def("attention", &stk::attention);
  m.attr("CONV_BLOCK") = stk::kConvBlock;
  m.def("use_openmp_of", [](const std::string &path) {
    stk::use_openmp_of(path.c_str());
    return stk::has_openmp();
  });
  m.def("instruction_set", [] { return stk::kernels().name; });
  m.def("use_instruction_set", [](const std::string &name) {
    const stk::Kernels *k = name.empty() ? nullptr : stk::kernels_named(name.c_str());
    if (!name.empty() && !k) throw py::value_error("instruction set '" + name + "' is not in this build or processor");
    stk::use_kernels(k);
  });
  m.def("set_stream_bytes", [](int64_t bytes) { return stk::stream_bytes.exchange(bytes); });
  m.def("set_huge_bytes", [](int64_t bytes) { return stk::huge_bytes.exchange(bytes); });
}
