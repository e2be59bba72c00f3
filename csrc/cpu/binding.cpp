// SPDX-License-Identifier: Apache-2.0
// The Python module stoptome_kernels._native. It takes addresses, sizes and strides instead of tensors, so that it needs
// no torch header and one binary serves every torch version. stoptome_kernels/backends/native.py checks shapes, dtypes
// and devices before it calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <memory>
#include <new>
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
// An output larger than this is not in the caches when its reader comes: write it around them.
std::atomic<int64_t> stream_bytes{int64_t(8) << 20};

// A fresh output of this size comes from the kernel page by page. Asking for huge pages before the first touch makes that
// one fault for 2 MiB instead of 512: on one machine filling 53 MiB took 2.8 ms instead of 14.
std::atomic<int64_t> huge_bytes{int64_t(4) << 20};

void expect_writes(const Rows &out, int64_t bytes) {
#if defined(__linux__)
  if (bytes < huge_bytes) return;
  constexpr uintptr_t page = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(out.data) + page - 1) & ~(page - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(out.data) + uintptr_t(bytes)) & ~(page - 1);
  (void)madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);  // a hint: it may fail
#else
  (void)out, (void)bytes;
#endif
}

struct MatchJob {
  Metric metric;
  int64_t stride_item, item_bytes, tokens, protected_, r, sources, targets, first_a, first_b;
  int32_t *dest, *members, *offsets;
  const Kernels *kernels;
  char *memory;  // for each thread: best, partner, scratch of the two steps
  int64_t memory_per_thread, partner_at, scratch_at;
};

int64_t align64(int64_t n) { return (n + 63) / 64 * 64; }

template <class Real>
void match_items(const MatchJob &job, int64_t begin, int64_t end, int thread) {
  char *memory = job.memory + thread * job.memory_per_thread;
  Proposals<Real> proposals{reinterpret_cast<Real *>(memory), reinterpret_cast<int32_t *>(memory + job.partner_at)};
  for (int64_t n = begin; n < end; ++n) {
    Metric item = job.metric;
    item.data = static_cast<const char *>(job.metric.data) + n * job.item_bytes;
    if constexpr (sizeof(Real) == 8)
      job.kernels->match->propose64(item, job.first_a, job.sources, job.first_b, job.targets, memory + job.scratch_at,
                                    proposals);
    else
      job.kernels->match->propose32(item, job.first_a, job.sources, job.first_b, job.targets, memory + job.scratch_at,
                                    proposals);
    plan_item<Real>(proposals, job.tokens, job.protected_, job.sources, job.targets, job.r, memory + job.scratch_at,
                    job.dest + n * job.tokens, job.members + n * job.tokens, job.offsets + n * (job.tokens - job.r + 1));
  }
}

int64_t element_bytes(int dtype) { return dtype == int(Dtype::f64) ? 8 : dtype == int(Dtype::f32) ? 4 : 2; }

void match(uintptr_t metric, int dtype, int64_t items, int64_t heads, int64_t tokens, int64_t channels, int64_t stride_item,
           int64_t stride_head, int64_t stride_token, int64_t r, int64_t protected_, uintptr_t dest, uintptr_t members,
           uintptr_t offsets, int threads) {
  py::gil_scoped_release released;
  MatchJob job;
  job.metric = {reinterpret_cast<const void *>(metric), Dtype(dtype), heads, channels, stride_head, stride_token};
  job.item_bytes = stride_item * element_bytes(dtype);
  job.tokens = tokens;
  job.protected_ = protected_;
  job.r = r;
  job.first_a = protected_ + protected_ % 2;
  job.first_b = protected_ + 1 - protected_ % 2;
  job.sources = tokens > job.first_a ? (tokens - job.first_a + 1) / 2 : 0;
  job.targets = tokens > job.first_b ? (tokens - job.first_b + 1) / 2 : 0;
  if (r < 1 || r > job.sources || job.targets < 1) throw std::invalid_argument("r is out of range");
  job.dest = reinterpret_cast<int32_t *>(dest);
  job.members = reinterpret_cast<int32_t *>(members);
  job.offsets = reinterpret_cast<int32_t *>(offsets);
  job.kernels = &kernels();
  const int64_t real = dtype == int(Dtype::f64) ? 8 : 4;
  int64_t scratch = job.kernels->match->scratch(Dtype(dtype), channels, job.sources, job.targets);
  if (scratch < plan_scratch(job.sources, job.targets)) scratch = plan_scratch(job.sources, job.targets);
  job.partner_at = align64(real * job.sources);
  job.scratch_at = job.partner_at + align64(4 * job.sources);
  job.memory_per_thread = job.scratch_at + align64(scratch);
  const int team = threads < items ? threads : int(items);
  struct Free {
    void operator()(char *p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<char, Free> memory(static_cast<char *>(::operator new(job.memory_per_thread * team, std::align_val_t(64))));
  job.memory = memory.get();
  const int64_t bytes = tokens * heads * channels * element_bytes(dtype);
  parallel_for(
      items, kBytesPerThread / (bytes + 1) + 1, team,
      [](void *context, int64_t begin, int64_t end, int thread) {
        const MatchJob &j = *static_cast<const MatchJob *>(context);
        if (j.metric.dtype == Dtype::f64)
          match_items<double>(j, begin, end, thread);
        else
          match_items<float>(j, begin, end, thread);
      },
      &job);
}

// Runs reduce or spread over all output rows.
template <class Args>
void over_rows(const Args &args, bool (*run)(const Args &, int64_t, int64_t), int threads) {
  struct Job {
    const Args *args;
    bool (*run)(const Args &, int64_t, int64_t);
    std::atomic<bool> good{true};
  } job{&args, run};
  const int64_t row_bytes = args.dim * element_bytes(int(args.dtype));
  {
    py::gil_scoped_release released;
    parallel_for(
        args.groups.items * args.groups.tokens_out, kBytesPerThread / (row_bytes + 1) + 1, threads,
        [](void *context, int64_t begin, int64_t end, int) {
          Job &j = *static_cast<Job *>(context);
          if (!j.run(*j.args, begin, end)) j.good.store(false, std::memory_order_relaxed);
        },
        &job);
  }
  if (!job.good) throw py::index_error("plan points outside of its items: it was changed after match(), or is no plan");
}

typedef std::tuple<uintptr_t, int64_t, int64_t> Strided;  // address, stride of an item, stride of a row

Rows rows(const Strided &s) { return {reinterpret_cast<void *>(std::get<0>(s)), std::get<1>(s), std::get<2>(s)}; }

Groups groups(uintptr_t members, uintptr_t offsets, int64_t items, int64_t tokens_in, int64_t tokens_out) {
  return {reinterpret_cast<const int32_t *>(members), reinterpret_cast<const int32_t *>(offsets), items, tokens_in,
          tokens_out};
}

void reduce(Strided x, Strided y, int dtype, int mode, uintptr_t members, uintptr_t offsets, int64_t items,
            int64_t tokens_in, int64_t tokens_out, int64_t dim, Strided size, uintptr_t size_out, int threads) {
  const int64_t bytes = items * tokens_out * dim * element_bytes(dtype);
  ReduceArgs args{rows(x), rows(y), Dtype(dtype), Mode(mode), groups(members, offsets, items, tokens_in, tokens_out), dim,
                  reinterpret_cast<const float *>(std::get<0>(size)), std::get<1>(size), std::get<2>(size),
                  reinterpret_cast<float *>(size_out), bytes > stream_bytes};
  expect_writes(args.y, bytes);
  over_rows(args, kernels().merge->reduce, threads);
}

void spread(Strided grad, Strided out, int dtype, int mode, uintptr_t members, uintptr_t offsets, int64_t items,
            int64_t tokens_in, int64_t tokens_out, int64_t dim, Strided size, Strided x, Strided y, int threads) {
  const int64_t bytes = items * tokens_in * dim * element_bytes(dtype);
  SpreadArgs args{rows(grad), rows(out), Dtype(dtype), Mode(mode), groups(members, offsets, items, tokens_in, tokens_out),
                  dim, reinterpret_cast<const float *>(std::get<0>(size)), std::get<1>(size), std::get<2>(size), rows(x),
                  rows(y), bytes > stream_bytes};
  expect_writes(args.out, bytes);
  over_rows(args, kernels().merge->spread, threads);
}

}  // namespace
}  // namespace stk

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  m.doc() = "Native CPU kernels of stoptome_kernels; private, see stoptome_kernels.backends.";
  m.def("match", &stk::match);
  m.def("reduce", &stk::reduce);
  m.def("spread", &stk::spread);
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
