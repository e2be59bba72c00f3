// SPDX-License-Identifier: Apache-2.0
// Picks the widest instruction set that both this build and this processor have.
#include <atomic>
#include <cstring>

#include "kernels.h"

namespace stk {

#define STK_DECLARE(isa)                           \
  namespace isa {                                  \
  extern const MatchKernels match_kernels;         \
  extern const MergeKernels merge_kernels;         \
  extern const NormKernels norm_kernels;           \
  extern const ConvKernels conv_kernels;           \
  extern const AttentionKernels attention_kernels; \
  }
STK_DECLARE(baseline)
#ifdef STK_HAVE_AVX2
STK_DECLARE(avx2)
#endif
#ifdef STK_HAVE_AVX512
STK_DECLARE(avx512)
#endif

namespace {

struct Candidate {
  Kernels kernels;
  bool runs;
};

// widest first
const Candidate *candidates(int &count) {
  static const Candidate all[] = {
#ifdef STK_HAVE_AVX512
      {{"avx512", &avx512::match_kernels, &avx512::merge_kernels, &avx512::norm_kernels, &avx512::conv_kernels,
        &avx512::attention_kernels},
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")},
#endif
#ifdef STK_HAVE_AVX2
      {{"avx2", &avx2::match_kernels, &avx2::merge_kernels, &avx2::norm_kernels, &avx2::conv_kernels,
        &avx2::attention_kernels},
       // every processor with AVX2 has F16C; older compilers can't ask for it
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {{"baseline", &baseline::match_kernels, &baseline::merge_kernels, &baseline::norm_kernels,
        &baseline::conv_kernels, &baseline::attention_kernels},
       true},
  };
  count = int(sizeof(all) / sizeof(all[0]));
  return all;
}

std::atomic<const Kernels *> forced{nullptr};

}  // namespace

const Kernels &kernels() {
  if (const Kernels *k = forced.load(std::memory_order_relaxed)) return *k;
  int count;
  const Candidate *all = candidates(count);
  for (int i = 0; i < count; ++i)
    if (all[i].runs) return all[i].kernels;
  return all[count - 1].kernels;
}

const Kernels *kernels_named(const char *name) {
  int count;
  const Candidate *all = candidates(count);
  for (int i = 0; i < count; ++i)
    if (all[i].runs && std::strcmp(all[i].kernels.name, name) == 0) return &all[i].kernels;
  return nullptr;
}

void use_kernels(const Kernels *k) { forced.store(k, std::memory_order_relaxed); }

}  // namespace stk
