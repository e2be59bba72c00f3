# SPDX-License-Identifier: Apache-2.0
"""Token merging in the vision transformers of other libraries.

``tokens`` is what travels from block to block, ``block`` what all blocks have in common, ``towers`` finds the blocks of
a model; one module for each library says what its blocks are made of.
"""

from .apply import apply
from .families import find
from .recording import remove_stale_recorders
from .state import VitMergeState
from .towers import VisionTower

__all__ = ["VisionTower", "VitMergeState", "apply", "find", "remove_stale_recorders"]
