// SPDX-License-Identifier: Apache-2.0
// In place of csrc/cpu/threads.cpp under ThreadSanitizer, which can't see how OpenMP's threads wait for each other.
#include "threads.h"

#include <thread>
#include <vector>

namespace stk {

void use_openmp_of(const char *) {}
bool has_openmp() { return true; }

void parallel_for(int64_t count, int64_t grain, int threads, Body body, void *context) {
  const int64_t most = count / (grain < 1 ? 1 : grain);
  const int64_t team = most < threads ? most : threads;
  if (count <= 0) return;
  if (team < 2) return body(context, 0, count, 0);
  std::vector<std::thread> workers;
  for (int64_t t = 0; t < team; ++t)
    workers.emplace_back(body, context, count * t / team, count * (t + 1) / team, int(t));
  for (std::thread &worker : workers) worker.join();
}

}  // namespace stk
