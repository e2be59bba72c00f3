# SPDX-License-Identifier: Apache-2.0
"""Recipes of training on the synthetic set: the model, the videos, and the steps, small enough for two cores of a CPU.

Tried and left: more counts, colours, shapes and motions, directions of motion, 56 pixels and width 128; all learn the
same kinds of things, but not within minutes. A high first temperature learns from the nearest negatives sooner.
"""

from __future__ import annotations

from typing import Any

import stoptome_kernels as stk

# fields of StopConfig that no flag sets, of --pretrained_clip_name tiny: 25 patches of a frame; heads are 64 wide, as
# in every CLIP, since a checkpoint doesn't tell
MODEL: dict[str, Any] = {
    "image_size": 40, "patch_size": 8, "width": 64, "layers": 3, "embed_dim": 128, "text_width": 64, "text_heads": 1,
    "text_layers": 2,
}  # fmt: skip
# positions begin so much stronger than in CLIP, whose are hard to see beside patches that nothing has learnt yet: told
# the answers, a tower of this size knew 59 % of four directions of motion after 200 steps with 3, 37 % with 1 (one run
# each, over paler backgrounds)
POSITIONS = 2.0

# of synthetic.write, beside train, val and seed
VIDEOS: dict[str, Any] = {"size": 40, "frames": 24, "fps": 8}

# flags that all runs on these videos have
SETTING: dict[str, Any] = {
    "pretrained_clip_name": "tiny", "max_words": 32, "max_frames": 8, "lora": 0, "cache_frames": 1,
    "num_thread_reader": 0, "visual_output_type": "average_global_prompt_and_frame_cls_token", "batch_size_val": 50,
}  # fmt: skip
_BASE: dict[str, Any] = {"batch_size": 64, "lr": 2e-3, "wd": 0.05, "temperature_new": 3.4, "warmup_proportion": 0.1}

# defaults of the command line with --datatype synthetic
SYNTHETIC: dict[str, Any] = {
    **SETTING, **_BASE, "synthetic_train": 640, "synthetic_val": 200, "epochs": 15, "lora": False,
    "cache_frames": True,
}  # fmt: skip

# of accuracy.py: videos, the training without merging, and what follows it at each setting
_TUNE: dict[str, Any] = {"batch_size": 64, "lr": 5e-4, "wd": 0.05, "warmup_proportion": 0.1, "n_display": 1000}
STUDY: dict[str, dict[str, Any]] = {
    "full": {
        "train": 2000, "val": 400, "base": {**_BASE, "epochs": 40, "eval_epochs": 20, "n_display": 31},
        "tune": {**_TUNE, "epochs": 1},
    },
    "quick": {
        "train": 640, "val": 200, "base": {**_BASE, "epochs": 15, "eval_epochs": 5, "n_display": 10},
        "tune": {**_TUNE, "epochs": 1},
    },
}  # fmt: skip
CLIPS = stk.ToMeConfig(
    tome_r=2, merge_layers=(1,), merge_frame_nums=(2,), merge_token_proportions=(20, 10)
)  # fmt: skip
