# SPDX-License-Identifier: Apache-2.0
"""timm, open_clip, torchvision and transformers, imported where torchvision was built for another torch than this one.

torchvision's operators come from a library that is linked to CUDA. Beside a CPU build of torch it can't be loaded, and
then importing torchvision, and whatever imports it, fails although no operator of it is ever called. Their names are
declared here, without anything behind them.
"""

import re

import torch

_declared = []  # a torch.library.Library lives as long as it is referred to


def _import_torchvision() -> None:
    for _ in range(20):
        try:
            import torchvision  # noqa: F401
        except ModuleNotFoundError:
            return  # transformers does without
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{missing[1]}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _declared.append(library)
        else:
            return


_import_torchvision()
