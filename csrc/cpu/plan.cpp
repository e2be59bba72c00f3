// SPDX-License-Identifier: Apache-2.0
// Steps 5 and 6 of the matching of one item: the r best proposals, the output order, and the members by destination.
#include <algorithm>
#include <limits>

#include "kernels.h"

namespace stk {

int64_t plan_scratch(const Sets &sets) { return int64_t(sizeof(int32_t)) * (2 * sets.sources + sets.targets); }

template <class Real>
void plan_item(Proposals<Real> proposals, const Sets &sets, int64_t tokens, int64_t protected_, int64_t r,
               void *scratch, int32_t *dest, int32_t *members, int32_t *offsets) {
  const Real *best = proposals.best;
  const int32_t *partner = proposals.partner;
  const int64_t sources = sets.sources, targets = sets.targets;
  int32_t *order = static_cast<int32_t *>(scratch), *merged = order + sources, *count = merged + sources;
  const int64_t base = protected_ + sources - r;  // output of the first b

  // a total order (similarity down, index up), so that what nth_element leaves in front is determined
  for (int64_t i = 0; i < sources; ++i) {
    order[i] = int32_t(i);
    merged[i] = 0;
  }
  if (r < sources)
    std::nth_element(order, order + r, order + sources,
                     [best](int32_t i, int32_t j) { return best[i] > best[j] || (best[i] == best[j] && i < j); });
  for (int64_t k = 0; k < r; ++k) merged[order[k]] = 1;

  // how many members each output has, then where each group begins
  for (int64_t j = 0; j < targets; ++j) count[j] = 1;
  for (int64_t i = 0; i < sources; ++i)
    if (merged[i]) ++count[partner[i]];
  for (int64_t o = 0; o <= base; ++o) offsets[o] = int32_t(o);
  for (int64_t j = 0; j < targets; ++j) offsets[base + j + 1] = offsets[base + j] + count[j];

  // tokens in ascending order fill their groups in ascending order
  for (int64_t j = 0; j < targets; ++j) count[j] = offsets[base + j];
  int64_t kept = 0, stays = protected_;
  int64_t i = 0, source = sources ? sets.source(0) : tokens;
  int64_t j = 0, target = targets ? sets.target(0) : tokens;
  for (int64_t t = 0; t < tokens; ++t) {
    if (t == target) {
      dest[t] = int32_t(base + j);
      members[count[j]++] = int32_t(t);
      if (++j < targets) target = sets.target(j);
    } else if (t == source) {
      if (merged[i]) {
        // a proposal of similarity −inf is carried out with weight 0
        const bool weightless = best[i] < std::numeric_limits<Real>::lowest();
        dest[t] = int32_t(base + partner[i]);
        members[count[partner[i]]++] = weightless ? ~int32_t(t) : int32_t(t);
      } else {
        dest[t] = int32_t(stays);
        members[stays++] = int32_t(t);
      }
      if (++i < sources) source = sets.source(i);
    } else {
      dest[t] = int32_t(kept);
      members[kept++] = int32_t(t);
    }
  }
}

template void plan_item<float>(Proposals<float>, const Sets &, int64_t, int64_t, int64_t, void *, int32_t *, int32_t *,
                               int32_t *);
template void plan_item<double>(Proposals<double>, const Sets &, int64_t, int64_t, int64_t, void *, int32_t *,
                                int32_t *, int32_t *);

}  // namespace stk
