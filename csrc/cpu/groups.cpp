// SPDX-License-Identifier: Apache-2.0
// A plan's groups, copied out of the caller's tensors and checked. The kernels index rows by the copies alone: whatever
// the tensors hold, and whatever another thread writes into them during a call, no index leaves its item and every
// token of an item is in one group.
#include <atomic>
#include <cstring>

#include "kernels.h"

namespace stk {
namespace {

// Copies what another thread may write meanwhile: after it the compiler must not read `from` again in place of `to`.
void copy_once(int32_t *to, const int32_t *from, int64_t count) {
  if (count) std::memcpy(to, from, size_t(count) * sizeof(int32_t));
  std::atomic_signal_fence(std::memory_order_seq_cst);
}

// Offsets of tokens_out groups, none of them empty, that end where the next begins.
bool are_offsets(const int32_t *offsets, int64_t tokens_out, int64_t tokens_in) {
  int32_t rising = 1;
  for (int64_t o = 0; o < tokens_out; ++o) rising &= offsets[o] < offsets[o + 1];
  return rising && offsets[0] == 0 && offsets[tokens_out] == tokens_in;
}

// Each token once. `seen` has bytes, not bits, so that no store waits for the one before.
bool are_members(const int32_t *members, int64_t tokens_in, uint8_t *seen) {
  if (!tokens_in) return true;
  std::memset(seen, 0, size_t(tokens_in));
  for (int64_t k = 0; k < tokens_in; ++k) {
    const int32_t token = members[k] < 0 ? ~members[k] : members[k];
    if (token >= tokens_in) return false;
    seen[token] = 1;
  }
  return !std::memchr(seen, 0, size_t(tokens_in));
}

}  // namespace

int64_t copy_groups(const Groups &from, int32_t *members, int32_t *offsets, uint8_t *seen, int64_t begin, int64_t end) {
  const int64_t in = from.tokens_in, out = from.tokens_out;
  copy_once(members + begin * in, from.members + begin * in, (end - begin) * in);
  copy_once(offsets + begin * (out + 1), from.offsets + begin * (out + 1), (end - begin) * (out + 1));
  for (int64_t n = begin; n < end; ++n)
    if (!are_offsets(offsets + n * (out + 1), out, in) || !are_members(members + n * in, in, seen)) return n;
  return end;
}

}  // namespace stk
