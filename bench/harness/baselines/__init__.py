# SPDX-License-Identifier: Apache-2.0
"""What the package is compared with: token merging, and whole towers, as PyTorch users write them today."""
