# SPDX-License-Identifier: Apache-2.0
"""Import support.vit before any test imports timm, open_clip or transformers, and they torchvision."""

import support.vit  # noqa: F401
