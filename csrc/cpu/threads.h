// SPDX-License-Identifier: Apache-2.0
// Parallel loops on the OpenMP runtime that torch has loaded: one pool of threads in the process, and no OpenMP library
// of our own to ship or to link.
#pragma once
#include <cstdint>

namespace stk {

// Looks the runtime up among the libraries that `torch_library` (a path, already loaded) depends on. Without one, or if
// it lacks GNU's entry point, loops run on the calling thread.
void use_openmp_of(const char *torch_library);
bool has_openmp();

using Body = void (*)(void *context, int64_t begin, int64_t end, int thread);

// Calls body on ranges that cover [0, count), at most one for each of `threads` threads, each at least `grain` long.
// Ranges depend on the thread count alone. `body` must not throw.
void parallel_for(int64_t count, int64_t grain, int threads, Body body, void *context);

}  // namespace stk
