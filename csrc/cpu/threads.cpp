// SPDX-License-Identifier: Apache-2.0
#include "threads.h"

#include <dlfcn.h>

namespace stk {
namespace {

// GNU's ABI, which LLVM's and Intel's runtimes export too.
struct OpenMP {
  void (*parallel)(void (*)(void *), void *, unsigned threads, unsigned flags) = nullptr;  // GOMP_parallel
  int (*thread)() = nullptr;
  int (*team)() = nullptr;
};
OpenMP openmp;

struct Loop {
  int64_t count;
  Body body;
  void *context;
};

void worker(void *data) {
  const Loop &loop = *static_cast<const Loop *>(data);
  // inside another parallel region the team has one thread: it takes the whole range
  const int64_t team = openmp.team(), thread = openmp.thread();
  const int64_t each = loop.count / team, rest = loop.count % team;
  const int64_t begin = thread * each + (thread < rest ? thread : rest);
  const int64_t end = begin + each + (thread < rest ? 1 : 0);
  if (begin < end) loop.body(loop.context, begin, end, int(thread));
}

}  // namespace

void use_openmp_of(const char *torch_library) {
  void *handle = dlopen(torch_library, RTLD_LAZY | RTLD_NOLOAD);
  if (!handle) return;
  OpenMP found;
  found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(handle, "GOMP_parallel"));
  found.thread = reinterpret_cast<decltype(found.thread)>(dlsym(handle, "omp_get_thread_num"));
  found.team = reinterpret_cast<decltype(found.team)>(dlsym(handle, "omp_get_num_threads"));
  if (found.parallel && found.thread && found.team) openmp = found;
  dlclose(handle);  // torch itself keeps it loaded
}

bool has_openmp() { return openmp.parallel != nullptr; }

void parallel_for(int64_t count, int64_t grain, int threads, Body body, void *context) {
  const int64_t most = count / (grain < 1 ? 1 : grain);
  const int64_t team = most < threads ? most : threads;
  if (count <= 0) return;
  if (team < 2 || !has_openmp()) return body(context, 0, count, 0);
  Loop loop{count, body, context};
  openmp.parallel(worker, &loop, unsigned(team), 0);
}

}  // namespace stk
