# SPDX-License-Identifier: Apache-2.0
"""The operators ``torch.ops.stoptome.*``: schema, implementation, fake kernel and gradient of each."""

from . import attention, merge_norm, merging

__all__ = ["attention", "merge_norm", "merging"]
