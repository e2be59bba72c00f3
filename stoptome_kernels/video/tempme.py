# SPDX-License-Identifier: Apache-2.0
"""TempMe's published model (arXiv 2409.01156): its blocks, on our operators.

The model's ``get_video_feat`` calls the blocks one by one, and tells each what to do: ``block(x, M_frame_num=F,
M_token_num=[between frames, within frames], frame_pos=1)``. It works these numbers out from what the blocks before have
left in ``clip._tome_info``: ``frame_num`` items of a video, ``token_num`` tokens of an item, the first ``cls_num`` of
them class tokens. The patched blocks do as they are told and count in the same place, so that the model runs as it was
published, by its own schedule; or they follow a schedule of the user's. Tokens travel from block to block as a tuple,
and the last block gives a tensor again.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..patching.subclass import PatchedModule, original_class
from ..patching.trial import check_blocks_match
from ..reference import cap_r
from ..tome.config import ToMeConfig
from ..tome.report import Description
from ..tome.schedule import Schedule, Step
from .blocks import BlockPlans, VideoTokens, run_block
from .state import VideoMergeState
from .towers import VideoTower, tempme_embedding
from .weights import WeightReadingBlock, part_classes

_CALL: dict[str, Any] = {"M_frame_num": 1, "M_token_num": [0]}  # as the model calls a block that is to merge nothing


class TempMeTokens(NamedTuple):
    """Output of a block of a patched TempMe model and input of the next.

    Attributes:
        stream: tokens and their sizes.
        tokens: number of tokens of a frame before the first block.
        items: number of items (frames) of a video there.
        steps: steps of the blocks so far.
        plans: plans of the blocks so far, if a trace is kept.
    """

    stream: VideoTokens
    tokens: int
    items: int
    steps: tuple[Step, ...] = ()
    plans: tuple[BlockPlans, ...] = ()

    def step(self, join: int, inter: int, r: int) -> Step:
        """Return the step of the next block, asked to join ``join`` items and to merge ``inter`` and ``r`` tokens."""
        items, frames = (self.steps[-1].items, self.steps[-1].frames) if self.steps else (self.items, 1)
        if items % join:
            raise ValueError(
                f"layer {len(self.steps)} joins {join} items, but a video of {self.items} frames has {items} items "
                f"there: choose a number that divides {items}"
            )
        items, frames, length = items // join, frames * join, self.stream.x.shape[1] * join
        inter = cap_r(inter, length, frames)
        attended = length - inter
        r = cap_r(r, attended, frames)
        return Step(join, inter, r, items, frames, attended, attended - r)


class TempMeMergeState(VideoMergeState):
    """The settings of TempMe's tower.

    Attributes:
        config: the settings; of those for the schedule only if there is one.
        schedule: the user's schedule; None: blocks do what the model tells them.
        counts: the model's ``_tome_info``.
        frames: number of frames of a video; None: as ``counts`` says when a forward begins.
        layers: blocks of the tower.
        made_counts: ``counts`` came with the patch, and go with it.
    """

    def __init__(
        self,
        config: ToMeConfig,
        schedule: Schedule | None,
        counts: dict,
        frames: int | None,
        layers: int,
        made_counts: bool,
        family: str,
    ):
        super().__init__(config, schedule, family=family)  # type: ignore[arg-type]
        self.counts, self.frames, self.layers, self.made_counts = counts, frames, layers, made_counts

    def describe(self, model: str) -> Description:
        """Return a description; of the model's own schedule nothing is known before a forward."""
        if self.schedule is None:
            asked: tuple[int | None, ...] = (None,) * self.layers
            return Description(
                model, self.family, self.config, 1, asked, given="class tokens and patches, as published"
            )
        return replace(super().describe(model), given="class tokens and patches")


@dataclass(frozen=True)
class TempMeBlockContext:
    """A block's place in its tower: its number, and whether its own forward can be called as the model calls it."""

    merging: TempMeMergeState
    index: int
    takes_tempme_call: bool


class TempMeBlock(WeightReadingBlock):
    """A block that the model calls with ``M_frame_num`` and ``M_token_num``; called otherwise it does as before."""

    tome: TempMeBlockContext

    def forward(self, x, *args, **call):
        if args or "M_frame_num" not in call:
            return super().forward(x, *args, **call)  # type: ignore[misc]
        place, merging = self.tome, self.tome.merging
        carried = _unpack_input(x, place)
        if merging.schedule is None:
            join, inter, r, embedding = _parse_call(self, **call)
        else:
            call, planned = _CALL, merging.schedule.steps[place.index]
            join, inter, r = planned.join, planned.inter, planned.r
            embedding = embedding_of(self) if join > 1 and merging.config.frame_pos else None
            merging.warn_of_frozen([self])
        step = carried.step(join, inter, r)
        if place.takes_tempme_call and step.frames == 1 and not inter and not r and carried.stream.size is None:
            out = super().forward(carried.stream.x, **call)  # type: ignore[misc]
            return _pack_output(carried, VideoTokens(out), step, BlockPlans(), place)
        if join == 1 and len(call["M_token_num"]) > 1:
            raise ValueError(
                f"layer {place.index}: merge_frame_num is 1, which joins nothing; leave that layer out of merge_layer, "
                "or give the schedule to apply_tome_patch"
            )
        if embedding is not None and embedding.shape[1] != step.items * join:
            raise ValueError(
                f"layer {place.index} joins {step.items * join} items of a video, but its frame embedding is for "
                f"{embedding.shape[1]}: make the model for videos of {carried.items} frames (max_frames)"
            )
        stream, plans = run_block(
            self, carried.stream, step, prop_attn=merging.config.prop_attn, frame_embedding=embedding,
            trace=merging.config.trace_source,
        )  # fmt: skip
        return _pack_output(carried, stream, step, plans, place)


class TempMeTransformer(PatchedModule):
    """The stack as ``encode_image`` of the published CLIP calls it, which the model never does."""

    tome: TempMeMergeState

    def forward(self, x: Tensor) -> Tensor:
        if self.tome.schedule is None or not self.tome.schedule.idle:
            raise RuntimeError(
                "TempMe's encode_image does not merge tokens, attends over the batch and omits the low-rank updates: "
                "use the model's get_video_feat for videos, or remove_tome_patch() before encode_image"
            )
        return super().forward(x)  # type: ignore[misc]


def _unpack_input(x: Any, place: TempMeBlockContext) -> TempMeTokens:
    merging = place.merging
    if isinstance(x, TempMeTokens):
        return x
    if place.index:
        raise TypeError(
            f"block {place.index} got {type(x).__name__} instead of the previous block's output (TempMeTokens): call "
            "the patched blocks one after the other, without changing the tokens in between"
        )
    items = merging.frames or merging.counts["frame_num"]
    if x.shape[0] % items:
        raise ValueError(f"the model is made for videos of {items} frames, but got {x.shape[0]}: give whole videos")
    planned = merging.schedule
    if planned is not None and not planned.idle and x.shape[1] != planned.tokens_in:
        raise ValueError(f"the schedule is for frames of {planned.tokens_in} tokens, but got {x.shape[1]}: patch again")
    return TempMeTokens(VideoTokens(x), x.shape[1], items)


def _parse_call(block: Any, M_frame_num: int, M_token_num: list[int], frame_pos: int = 0):
    """Return what the model tells a block: items to join, tokens to merge between and within them, embedding to add."""
    embedding = tempme_embedding(block) if frame_pos else None
    if frame_pos and embedding is None:
        raise ValueError(
            f"{type(block).__name__} got frame_pos=1, but has no frame embedding (TVPt_Video_Positional_embedding): "
            "make the model with frame_pos=1"
        )
    return M_frame_num, M_token_num[0] if len(M_token_num) > 1 else 0, M_token_num[-1], embedding


def _pack_output(
    carried: TempMeTokens, stream: VideoTokens, step: Step, plans: BlockPlans, place: TempMeBlockContext
) -> TempMeTokens | Tensor:
    merging = place.merging
    merging.counts.update(frame_num=step.items, token_num=step.tokens, cls_num=step.frames)
    kept = (*carried.plans, plans) if merging.config.trace_source else carried.plans
    carried = TempMeTokens(
        stream, carried.tokens, carried.items, (*carried.steps, step), kept
    )  # torch 2.6 traces no _replace
    if place.index < merging.layers - 1:
        return carried
    schedule = Schedule(carried.steps, carried.tokens, stream.x.shape[2])
    merging.record(carried.plans, schedule, stream.x.shape[0] // step.items)
    return stream.x


def embedding_of(block: Any) -> nn.Parameter | None:
    """Return the embedding that a block adds by a schedule of the user's: the model's own, else the patch's."""
    own = tempme_embedding(block)
    return getattr(block, "tome_frame_embedding", None) if own is None else own


def missing_embeddings(tower: VideoTower, joined: list[int]) -> list[int]:
    """Return, of the items that each block joins, those that it has no embedding of the model's own for.

    Raises:
        ValueError: it has one for another number of items.
    """
    missing = []
    for layer, (block, count) in enumerate(zip(tower.blocks, joined, strict=True)):
        own = tempme_embedding(block)
        if count and own is not None and own.shape[1] != count:
            raise ValueError(
                f"layer {layer} would join {count} items of a video, but its frame embedding is for {own.shape[1]}: "
                "give the merge_layers and merge_frame_nums that the model was made with, or frame_pos=0"
            )
        missing.append(count if own is None else 0)
    return missing


def install(tower: VideoTower, config: ToMeConfig, schedule: Schedule | None, frames: int | None, family: str) -> None:
    """Give a tower whose classes are patched its settings; without a schedule it follows the model's own."""
    clip = find_clip(tower)
    counts = clip.__dict__.get("_tome_info")
    before = tower.runner.__dict__.get("tome")
    made = counts is None if before is None else before.made_counts
    if counts is None:  # as the model sets them before each forward
        counts = {"size": None, "source": None, "cls_num": 1, "frame_num": frames or 1, "token_num": tower.tokens}
        clip._tome_info = counts
    merging = TempMeMergeState(config, schedule, counts, frames, len(tower.blocks), made, family)
    tower.runner.tome = merging
    for index, block in enumerate(tower.blocks):
        block.tome = TempMeBlockContext(merging, index, _takes_tempme_call(block))


def uninstall(model: nn.Module) -> None:
    """Take away what ``install`` gave to other modules than the patched ones."""
    made = [
        merging.counts
        for module in model.modules()
        if isinstance(merging := module.__dict__.get("tome"), TempMeMergeState) and merging.made_counts
    ]
    for module in model.modules():
        if any(module.__dict__.get("_tome_info") is counts for counts in made):
            del module._tome_info


def find_clip(tower: VideoTower) -> Any:
    """Return TempMe's CLIP, which keeps the counts of a forward.

    Raises:
        ValueError: the tower was given alone.
    """
    clip = next((module for module in reversed(tower.around) if "visual" in module._modules), None)
    if clip is None:
        raise ValueError(
            "TempMe counts items and tokens in the _tome_info of its CLIP, which the visual tower alone does not have: "
            "give the whole model, or its clip"
        )
    return clip


def model_prop_attn(tower: VideoTower) -> bool:
    """Return whether the model itself wants proportional attention; a CLIP alone does not say."""
    return all(module.__dict__.get("tome_propattn", True) for module in tower.around)


def _takes_tempme_call(block: nn.Module) -> bool:
    """Return whether TempMe's own patch was applied to a block: its forward can be called as the model calls it."""
    taken = inspect.signature(original_class(block).forward).parameters  # type: ignore[attr-defined]
    return "M_frame_num" in taken or any(p.kind is p.VAR_KEYWORD for p in taken.values())


def check_blocks(tower: VideoTower, blocks: dict[int, nn.Module]) -> None:
    """Try out each block on a frame, ``(L, 1, D)``.

    Raises:
        TypeError, ValueError: see ``check_blocks_match``.
    """
    check_blocks_match(blocks, (4, 1, tower.width), _original_output, _patched_output)


def _original_output(block: Any, x: Tensor) -> Tensor | None:
    """Return what a block of upstream's makes of ``(L, 1, D)`` by itself, without merging.

    None where it can't do without what the model around it prepares: then there is nothing to compare with.
    """
    x = x.transpose(0, 1)
    if not _takes_tempme_call(block):
        return block.forward(x).transpose(0, 1)
    counts = block.__dict__.get("_tome_info")
    if counts is None:
        return None
    counts.update(size=None, source=None, cls_num=1, frame_num=1, token_num=x.shape[1])
    return block.forward(x, **_CALL).transpose(0, 1)


def _patched_output(block: Any, x: Tensor) -> Tensor:
    """Return the same computed our way: a block without TempMe's patch leaves its low-rank update out."""
    block.tome_classes = part_classes(block)
    if not _takes_tempme_call(block):
        block.attn.TVPt_LoRA_b.data.zero_()  # of a copy
    stream = VideoTokens(x.transpose(0, 1))
    return run_block(block, stream, TempMeTokens(stream, len(x), 1).step(1, 0, 0))[0].x.transpose(0, 1)
