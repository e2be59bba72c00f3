# SPDX-License-Identifier: Apache-2.0
"""The operators ``torch.ops.stoptome.*``: schema, implementation, fake kernel and gradient of each."""

from . import attention, augment, conv, library, match_merge, merge_norm

__all__ = ["attention", "augment", "conv", "library", "match_merge", "merge_norm"]
