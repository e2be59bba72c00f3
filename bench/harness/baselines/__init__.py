# SPDX-License-Identifier: Apache-2.0
"""Token merging, and whole towers, as PyTorch users write them today: the package is compared with these."""
