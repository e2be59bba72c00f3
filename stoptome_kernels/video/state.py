# SPDX-License-Identifier: Apache-2.0
"""Token merging as a tower carries it: settings, schedule, and what the last forward merged."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..tome.config import ToMeConfig
from ..tome.report import Description, warn
from ..tome.schedule import Schedule, parse_r
from ..tome.trace import Trace, is_torch_exporting
from .blocks import BlockPlans, VideoTokens, run_stack
from .trace import compose_trace


class VideoMergeState:
    """The settings of a visual tower. Nothing of a forward is kept in it but the plans, if a trace was asked for.

    Attributes:
        config: the settings.
        schedule: schedule of this tower by those settings.
        video: the same with all frames of a video, for the trace; ``schedule`` may be for frames one by one.
        family: class and library of the tower; empty: nobody asked for merging.
        protected: class token and prompts of a frame.
    """

    def __init__(
        self,
        config: ToMeConfig,
        schedule: Schedule,
        video: Schedule | None = None,
        family: str = "",
        protected: int = 1,
    ):
        self.config, self.schedule, self.video = config, schedule, video or schedule
        self.family, self.protected = family, protected
        self._frozen_seen = False
        self._last: tuple[tuple[BlockPlans, ...], Schedule, int, int] | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_last": None}  # a copy of the model has run nothing yet

    @property
    def asked(self) -> tuple[int | None, ...]:
        """Tokens to merge in each layer, as asked for; None where it is a share of them."""
        rates = parse_r(self.config.tome_r, len(self.schedule.steps))
        first = min(self.config.merge_layers, default=len(rates))
        return tuple(r if layer < first else None for layer, r in enumerate(rates))

    def describe(self, model: str) -> Description:
        """Return a description of what is merged in a model of this name."""
        if self.protected > 1:
            given = "global prompts and class tokens"
        elif self.schedule.idle:
            given = "all tokens"
        elif self.config.merge_layers:
            given = "class tokens"
        else:
            given = "the tokens that are left (sizes: tome_trace(model).sizes, with trace_source)"
        return Description(model, self.family, self.config, self.protected, self.asked, self.video, given)

    def run(
        self,
        blocks: Iterable[Any],
        stream: VideoTokens,
        frame_prompts: Tensor | None = None,
        *,
        return_all_tokens: bool = False,
        checkpointing: bool = False,
    ) -> VideoTokens:
        """Send a stream through the blocks, see ``blocks.run_stack``."""
        prompts = 0 if frame_prompts is None else frame_prompts.shape[3]
        items, tokens = self.schedule.frames, stream.x.shape[1] + prompts
        if tokens != self.schedule.tokens_in or stream.x.shape[0] % items:
            raise ValueError(
                f"the tower is set up for videos of {items} frames of {self.schedule.tokens_in} tokens, but got "
                f"{stream.x.shape[0]} frames of {tokens} tokens: give whole videos of that size, or make or patch the "
                "model for these"
            )
        batch = stream.x.shape[0] // items
        blocks = list(blocks)
        self.warn_of_frozen(blocks)
        stream, plans = run_stack(
            blocks, stream, self.schedule, prop_attn=self.config.prop_attn, frame_prompts=frame_prompts,
            return_all_tokens=return_all_tokens, trace=self.config.trace_source, checkpointing=checkpointing,
        )  # fmt: skip
        self._record_batch(plans, batch, prompts)
        return stream

    def warn_of_frozen(self, blocks: Iterable[Any]) -> None:
        """Say once if frame embeddings can't learn: somebody has frozen all that they don't know the name of."""
        if self._frozen_seen or not self.config.frame_pos or torch.compiler.is_compiling():
            return
        added = [block._parameters.get("tome_frame_embedding") for block in blocks if block.training]
        if torch.is_grad_enabled() and any(p is not None and not p.requires_grad for p in added):
            self._frozen_seen = True
            warn(
                "frame_pos=1 has no effect: the parameters tome_frame_embedding are frozen (requires_grad=False) at "
                "their initial value zero. STOP's freeze_clip freezes every name that is not on its list of new "
                "modules: add tome_frame_embedding to it"
            )

    def record_no_merge(self, batch: int, prompts: int) -> None:
        """Note that a forward merged nothing."""
        self._record_batch((BlockPlans(),) * len(self.schedule.steps), batch, prompts)

    def _record_batch(self, plans: tuple[BlockPlans, ...], batch: int, prompts: int) -> None:
        schedule, together = self.schedule, self.video.frames // self.schedule.frames
        if batch % together == 0:
            schedule, batch = self.video, batch // together
        self.record(plans, schedule, batch, prompts)

    def record(self, plans: tuple[BlockPlans, ...], schedule: Schedule, batch: int, prompts: int = 0) -> None:
        """Keep what a forward of ``batch`` videos merged by this schedule, if a trace is wanted."""
        if self.config.trace_source and not is_torch_exporting():
            self._last = plans, schedule, batch, prompts

    def trace(self) -> Trace:
        """Return the source map of the last forward.

        Raises:
            RuntimeError: none is kept, or nothing has run yet.
        """
        if not self.config.trace_source:
            raise RuntimeError("no trace was kept: patch with trace_source=True (--tome_trace_source)")
        if self._last is None:
            raise RuntimeError("nothing to trace yet: run the model on a video first")
        plans, schedule, batch, prompts = self._last
        return compose_trace(plans, schedule, batch, prompts, prompts_inline=prompts % 2 == 1)
