# SPDX-License-Identifier: Apache-2.0
"""What is trained on the synthetic set where nothing else is asked for: sizes of the model, of the set, of the steps.

PROVISIONAL VALUES (to be replaced by what the experiments give); the command line reads these three names:
MODEL (fields of StopConfig that no flag sets), VIDEOS (keyword arguments of synthetic.write beside train, val and seed),
SYNTHETIC (defaults of the command line's flags with --datatype synthetic; names as in options.parser()).
"""

from __future__ import annotations

from typing import Any

MODEL: dict[str, Any] = {
    "image_size": 56, "patch_size": 8, "width": 128, "layers": 4, "embed_dim": 128, "text_width": 128, "text_heads": 2,
    "text_layers": 2,
}  # fmt: skip
VIDEOS: dict[str, Any] = {"size": 64}
SYNTHETIC: dict[str, Any] = {
    "synthetic_train": 1000, "synthetic_val": 200, "max_words": 32, "max_frames": 12, "batch_size": 32,
    "batch_size_val": 32, "epochs": 5, "lr": 1e-3, "wd": 0.05, "temperature_new": 2.6, "pretrained_clip_name": "tiny",
}  # fmt: skip
