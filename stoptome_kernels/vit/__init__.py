# SPDX-License-Identifier: Apache-2.0
"""Token merging in the vision transformers of other libraries.

``families`` says which library a model is from, and one module for each library finds its tower and says what its
blocks are made of. ``tokens`` is what travels from block to block, ``state`` what a tower is to merge and the merging
in a block, ``block`` what all blocks have in common, ``guards`` what a patched block refuses.
"""

from .apply import apply
from .families import find
from .recording import remove_stale_recorders
from .state import VitMergeState
from .towers import VitTower

__all__ = ["VitMergeState", "VitTower", "apply", "find", "remove_stale_recorders"]
