# SPDX-License-Identifier: Apache-2.0
"""Import torchvision's operators before any test imports timm, open_clip or transformers."""

import libraries  # noqa: F401
