# SPDX-License-Identifier: Apache-2.0
"""The tokens of a batch of videos on their way through a visual tower, and one transformer block's work on them.

Everything STOP, DGL, CLIP4Clip and TempMe have in common: pre-norm blocks with ``ln_1, attn (nn.MultiheadAttention, or
TempMe's with the same names), ln_2, mlp.c_fc, mlp.c_proj``, perhaps ``LoRA``. Frames are items, ``(B·I, L, D)``:
attention inside a frame is then a plain batched one, and merging sees each frame's tokens side by side.

Three facts save work without changing a number (all sums are over the same terms):

- Every token is projected once; the prompts' keys are shared by all frames of a video as a prefix.
- Deep prompts overwrite the frame prompts' rows in each layer: nobody reads what a block makes of them, so they enter
  as keys and values alone.
- Behind the last layer only the global prompts and the class tokens are read.

Of a block's parts the attention's weights are read: no call of it could do the first two. Attention that somebody has
put hooks, adapters or weights elsewhere on is refused, at each call. All other parts are called as soon as they are
more than their class says.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..api import attention, match, merge, merge_norm
from ..patching.guards import may_read_weights
from ..plan import MergePlan
from ..tome.schedule import Schedule, Step
from .weights import apply_norm, check_attention, reads_norm_weights

_QUICK = 1.702  # QuickGELU(x) = x·σ(1.702 x) = SiLU(1.702 x) / 1.702


class VideoTokens(NamedTuple):
    """Tokens of B videos of I items each, the output of a block of a patched video model and the input of the next.

    An item is one frame or several joined ones: class tokens of its frames, optionally prompts, then patches.

    Attributes:
        x: ``(B·I, L, D)``, the tokens.
        prompts: ``(B, G, D)``, global prompts of each video; None where there are none.
        size: ``(B·I, L)`` float32, number of original tokens that each token represents; None means all ones.
    """

    x: Tensor
    prompts: Tensor | None = None
    size: Tensor | None = None


class BlockPlans(NamedTuple):
    """Plans of one block: between the frames that it joined, and within each item."""

    inter: MergePlan | None = None
    intra: MergePlan | None = None


def join_adjacent(x: Tensor, count: int, segments: tuple[int, ...]) -> Tensor:
    """Make ``count`` adjacent items one: ``(N, L, …) → (N / count, count·L, …)``.

    ``segments`` are the lengths of an item's leading parts (class tokens, prompts); each part of the joined item holds
    that part of all frames, in frame order, and the patches come last, frame after frame.
    """
    groups = x.unflatten(0, (-1, count))
    lengths = [*segments, x.shape[1] - sum(segments)]
    return torch.cat([part.flatten(1, 2) for part in groups.split(lengths, 2)], 1)


def project_qkv(attn: Any, x: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
    """Return those of q, k, v (0, 1, 2) from ``first`` up to ``last``, each ``(N, H, L, d)``: views of one
    projection."""
    weight, bias = attn.in_proj_weight, attn.in_proj_bias
    up = getattr(attn, "TVPt_LoRA_b", None)  # TempMe adds the product of two narrow matrices to the weight
    if last - first < 3:  # a slice of everything would cost a copy of the weight's gradient
        rows = slice(first * weight.shape[1], last * weight.shape[1])
        weight, bias, up = weight[rows], None if bias is None else bias[rows], None if up is None else up[rows]
    if up is None:
        packed = F.linear(x, weight, bias)
    elif (torch.is_grad_enabled() and not weight.requires_grad) or x.shape[0] * x.shape[1] < weight.shape[1]:
        # the gradient of a summed weight would be a product as large as the projection, of which little is wanted; and
        # few tokens are fewer rows than the weight has
        packed = F.linear(x, weight, bias) + F.linear(F.linear(x, attn.TVPt_LoRA_a), up)
    else:
        packed = F.linear(x, _summed(weight, up, attn.TVPt_LoRA_a), bias)
    packed = packed.unflatten(2, (last - first, attn.num_heads, attn.head_dim))
    return tuple(part.transpose(1, 2) for part in packed.unbind(2))


def _summed(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return torch.addmm(weight, up.to(weight.dtype), down.to(weight.dtype))


def project_qkv_and_metric(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, k, v and the mean over heads of the keys ``(N, L, d)``, from one projection.

    The mean is linear in x: it is the keys' projection with the mean over heads of its rows, d more columns of the
    product (2.8 % at width 768) in place of a pass over all keys.
    """
    weight, d = attn.in_proj_weight, attn.head_dim
    width = weight.shape[1]
    if hasattr(attn, "TVPt_LoRA_b"):
        weight = _summed(weight, attn.TVPt_LoRA_b, attn.TVPt_LoRA_a)

    def extended(rows: Tensor) -> Tensor:
        return torch.cat([rows, rows[width : 2 * width].unflatten(0, (attn.num_heads, d)).mean(0)])

    bias = None if attn.in_proj_bias is None else extended(attn.in_proj_bias)
    packed = F.linear(x, extended(weight), bias)
    q, k, v = packed[..., : 3 * width].unflatten(2, (3, attn.num_heads, d)).unbind(2)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), packed[..., 3 * width :]


def _metric_columns_cheaper(attn: Any, x: Tensor) -> bool:
    """Return whether reading the keys for the matching costs more than making d more columns.

    On a GPU, where the product is not what bounds a block, once the keys are several times the weights that have to be
    copied for it; not in training, where the gradient of a part of the product costs a pass of its own.
    """
    return x.is_cuda and not torch.is_grad_enabled() and x.numel() > 8 * attn.in_proj_weight.numel()


def _project(attn: Any, heads: Tensor) -> Tensor:
    """Map ``(N, H, L, d) → (N, L, D)``."""
    return attn.out_proj(heads.transpose(1, 2).flatten(2))


def feed_forward(block: Any, x: Tensor, normed: Tensor) -> Tensor:
    """Return ``x + mlp(normed)``, and STOP's low-rank branch on x itself where the block has one.

    For ``mlp = c_proj(QuickGELU(c_fc))`` the activation is one SiLU, scaled inside the sums that are there anyway: two
    passes less over the widest tensor. Anything else in it (adapters, dropout, hooks) is called as it is.
    """
    # a compiler fuses such passes by itself; torch 2.13's leaves out the alpha of an addition to a product (its issues
    # 167313, 196577)
    quick = _is_quick_gelu(block) and not torch.compiler.is_compiling()
    out = _quick_gelu(block.mlp, x, normed) if quick else x + block.mlp(normed)
    if not hasattr(block, "LoRA"):
        return out
    return out + 0.1 * (_low_rank_branch(block.LoRA, x) if _is_low_rank(block.LoRA) else block.LoRA(x))


def _is_quick_gelu(block: Any) -> bool:
    mlp = block.mlp
    if type(mlp) is not nn.Sequential or list(mlp._modules) != ["c_fc", "gelu", "c_proj"]:
        return False
    fc, gelu, proj = mlp
    linear = all(type(m) is nn.Linear and m.bias is not None for m in (fc, proj))
    known = type(gelu).__name__ == "QuickGELU" and type(gelu) in block.tome_classes
    return linear and known and may_read_weights(mlp, fc, gelu, proj)


def _is_low_rank(branch: Any) -> bool:
    """Return whether the branch is one whose gate alone has to be read: its dtype may differ from the others'."""
    if type(branch) is not nn.Sequential or len(branch) != 3:
        return False
    return type(branch[1]) is nn.PReLU and may_read_weights(branch, branch[1])


def _quick_gelu(mlp: Any, x: Tensor, normed: Tensor) -> Tensor:
    fc, proj = mlp.c_fc, mlp.c_proj
    hidden = torch.addmm(fc.bias * _QUICK, normed.flatten(0, -2), fc.weight.t(), alpha=_QUICK)
    hidden = F.silu(hidden, inplace=not torch.is_grad_enabled())
    # the last factor goes to the narrow side: as addmm's alpha its gradient would be a pass over the wide one
    out = torch.add(x.flatten(0, -2) + proj.bias, hidden @ proj.weight.t(), alpha=1 / _QUICK)
    return out.view(x.shape)


def _low_rank_branch(branch: Any, x: Tensor) -> Tensor:
    down, gate, up = branch
    hidden = down(x)
    # with float16 matrices the gate's one weight is still float32
    return up(F.prelu(hidden, gate.weight.to(hidden.dtype)))


def run_block(
    block: Any,
    stream: VideoTokens,
    step: Step,
    *,
    prop_attn: bool = True,
    inline_prompts: int = 0,
    frame_prompts: Tensor | None = None,
    frame_embedding: Tensor | None = None,
    class_tokens_only: bool = False,
    trace: bool = False,
) -> tuple[VideoTokens, BlockPlans]:
    """Run one block: join items, attention inside each item and of the global prompts over the video, merging, MLP.

    Args:
        block: see the module's docstring.
        stream: tokens from the layer before.
        step: step of the schedule.
        prop_attn: keys count as often as the tokens that they stand for.
        inline_prompts: prompt rows of each frame that follow the class tokens in ``stream.x``.
        frame_prompts: ``(B, T, P, D)``, the prompts of this layer that stand outside of it: keys and values alone.
        frame_embedding: ``(1, items before joining, 1, D)``, added to the tokens of each item that is joined here.
        class_tokens_only: whether only class tokens and global prompts are wanted: x comes back as ``(B·I, class
            tokens, D)``.
        trace: match even where only the trace needs it.

    Returns:
        The tokens after the block, and the plans by which it merged.
    """
    x, prompts, size = stream
    if x.requires_grad and not torch.is_grad_enabled():
        # the first pass of a reentrant checkpoint; tensors inside a tuple would silently get no gradient
        raise RuntimeError(
            "a block got tokens that require a gradient while gradients are disabled: under torch.utils.checkpoint "
            "use use_reentrant=False; for inference run the whole model under torch.no_grad()"
        )
    batch, inter = x.shape[0] // (step.items * step.join), None
    protected = step.frames * (1 + inline_prompts)
    if step.join > 1:
        x, size, inter = _join_items(x, size, step, inline_prompts, frame_embedding)
        if frame_embedding is not None and frame_prompts is not None:  # they too are tokens of their item
            each = frame_embedding.repeat_interleave(step.frames // step.join, 1)
            frame_prompts = frame_prompts + each.to(frame_prompts.dtype)
    check_attention(block)
    attn = block.attn

    normed = apply_norm(block, block.ln_1, x)
    metric = None  # the keys
    if class_tokens_only:  # the class tokens alone ask
        (q,) = project_qkv(attn, normed[:, : step.frames], 0, 1)
        k, v = project_qkv(attn, normed, 1, 3)
    elif step.r and _metric_columns_cheaper(attn, x):
        q, k, v, metric = project_qkv_and_metric(attn, normed)
    else:
        q, k, v = project_qkv(attn, normed, 0, 3)
    weights = size if prop_attn else None
    context = _context(block, prompts, frame_prompts)  # (B, G + T·P, D), normalised
    if context is None:
        attended = _project(attn, attention(q, k, v, weights))
    else:
        globals_ = 0 if prompts is None else prompts.shape[1]
        prefix_k, prefix_v = project_qkv(attn, context, 1, 3)
        own_k, own_v = prefix_k, prefix_v
        if frame_prompts is not None:
            own_k, own_v = (_per_item(part, globals_, step.items) for part in (prefix_k, prefix_v))
        attended = _project(attn, attention(q, k, v, weights, own_k, own_v))
        if prompts is not None:
            (prompt_q,) = project_qkv(attn, context[:, :globals_], 0, 1)
            over = None if weights is None else weights.view(batch, -1)
            answer = attention(prompt_q, _per_video(k, batch), _per_video(v, batch), over, prefix_k, prefix_v)
            prompts = prompts + _project(attn, answer)
            prompts = feed_forward(block, prompts, apply_norm(block, block.ln_2, prompts))

    plan = None
    if step.r and (trace or not class_tokens_only):
        plan = match(k if metric is None else metric, step.r, protected)
    if class_tokens_only:
        x, size = x[:, : step.frames], None
    ln = block.ln_2
    if plan is None or class_tokens_only:
        x = x + attended
        normed = apply_norm(block, ln, x)
    elif reads_norm_weights(block, ln):
        x, normed, size = merge_norm(x, attended, plan, size, ln.weight, ln.bias, ln.eps)
    else:
        x, size = merge(x + attended, plan, size)
        normed = ln(x)
    return VideoTokens(feed_forward(block, x, normed), prompts, size), BlockPlans(inter, plan)


def run_stack(
    blocks: Iterable[Any],
    stream: VideoTokens,
    schedule: Schedule,
    *,
    prop_attn: bool = True,
    frame_prompts: Tensor | None = None,
    return_all_tokens: bool = False,
    trace: bool = False,
    checkpointing: bool = False,
) -> tuple[VideoTokens, tuple[BlockPlans, ...]]:
    """Run all blocks of a tower, each called as ``block(stream, step, ...)`` so that hooks and wrappers on it work.

    Args:
        blocks: whose forward is ``run_block``; ``tome_frame_embedding`` is read where a block has one.
        stream: tokens before the first block, without frame prompts.
        schedule: schedule with as many steps as there are blocks.
        prop_attn, trace: see ``run_block``.
        frame_prompts: ``(layers, B, T, P, D)``, the deep prompts of each layer.
        return_all_tokens: whether all tokens are wanted after the last layer, not class tokens and global prompts
            alone.
        checkpointing: keep only what stands between the blocks, and compute the rest again in backward.

    Returns:
        The tokens after the last block, and what each block merged.
    """
    # A and B are even and odd indices counted with the prompts: outside of the items they may only be an even number
    inline_prompts = 0 if frame_prompts is None or frame_prompts.shape[3] % 2 == 0 else frame_prompts.shape[3]
    if not torch.is_grad_enabled():  # a block that is asked for gradients now is inside a reentrant checkpoint
        x, prompts, size = stream
        stream = VideoTokens(x.detach(), None if prompts is None else prompts.detach(), size)
    plans = []
    layers = len(schedule.steps)
    for layer, (block, step) in enumerate(zip(blocks, schedule.steps, strict=True)):
        deep = None if frame_prompts is None else frame_prompts[layer]
        if inline_prompts and deep is not None:
            x = _replace_prompts(stream.x, deep, step, fresh=layer == 0)
            stream, deep = VideoTokens(x, stream.prompts, stream.size), None
        options: dict[str, Any] = {
            "prop_attn": prop_attn, "inline_prompts": inline_prompts, "frame_prompts": deep, "trace": trace,
            "frame_embedding": getattr(block, "tome_frame_embedding", None),
            "class_tokens_only": layer == layers - 1 and not return_all_tokens,
        }  # fmt: skip
        if checkpointing and torch.is_grad_enabled():
            stream, merged = checkpoint(block, stream, step, use_reentrant=False, **options)
        else:
            stream, merged = block(stream, step, **options)
        plans.append(merged)
    return stream, tuple(plans)


def _replace_prompts(x: Tensor, deep: Tensor, step: Step, fresh: bool) -> Tensor:
    """Put a layer's prompts ``(B, T, P, D)`` after the class tokens of each item, for the first time if ``fresh``."""
    frames, items = step.frames // step.join, step.items * step.join  # before this layer joins any
    rows = deep.unflatten(1, (items, frames)).flatten(0, 1).flatten(1, 2)
    behind = frames if fresh else frames + rows.shape[1]
    return torch.cat([x[:, :frames], rows.to(x.dtype), x[:, behind:]], 1)


def _join_items(
    x: Tensor, size: Tensor | None, step: Step, inline_prompts: int, frame_embedding: Tensor | None
) -> tuple[Tensor, Tensor | None, MergePlan | None]:
    """Join adjacent items and merge between them, compared by the tokens themselves (TempMe, "cross-clip merging")."""
    frames = step.frames // step.join  # of each item before
    segments = (frames, frames * inline_prompts)
    bare = join_adjacent(x, step.join, segments)
    size = None if size is None else join_adjacent(size, step.join, segments)
    plan = match(bare, step.inter, step.frames * (1 + inline_prompts)) if step.inter else None
    if frame_embedding is not None:  # after the matching was computed, before the tokens are merged
        named = x.unflatten(0, (-1, frame_embedding.shape[1])) + frame_embedding.to(x.dtype)
        bare = join_adjacent(named.flatten(0, 1), step.join, segments)
    if plan is None:
        return bare, size, None
    return *merge(bare, plan, size), plan


def _context(block: Any, prompts: Tensor | None, frame_prompts: Tensor | None) -> Tensor | None:
    """Return what stands outside of the items, normalised: ``(B, G + T·P, D)``."""
    rows = [] if prompts is None else [prompts]
    if frame_prompts is not None:
        rows.append(frame_prompts.flatten(1, 2))
    return apply_norm(block, block.ln_1, torch.cat(rows, 1)) if rows else None


def _per_item(prefix: Tensor, globals_: int, items: int) -> Tensor:
    """Return keys or values of the global prompts and of each item's own: ``(B, H, G + T·P, d) → (B·I, H, G + F·P,
    d)``."""
    prefix = prefix.transpose(1, 2)  # (B, G + T·P, H, d)
    own = prefix[:, globals_:].unflatten(1, (items, -1))
    shared = prefix[:, None, :globals_].expand(-1, items, -1, -1, -1)
    return torch.cat([shared, own], 2).flatten(0, 1).transpose(1, 2)


def _per_video(part: Tensor, batch: int) -> Tensor:
    """Map ``(B·I, H, L, d) → (B, H, I·L, d)``, a view."""
    rows = part.transpose(1, 2)  # (B·I, L, H, d)
    return rows.unflatten(0, (batch, -1)).flatten(1, 2).transpose(1, 2)
