# SPDX-License-Identifier: Apache-2.0
"""Token merging in the visual towers of STOP, DGL, CLIP4Clip and TempMe.

``towers`` finds the tower of a model, ``blocks`` is what a patched block computes and what travels between blocks,
``upstream`` and ``tempme`` are the models as they are published.
"""

from .patch import apply, remove_additions
from .state import VideoMergeState

__all__ = ["VideoMergeState", "apply", "remove_additions"]
