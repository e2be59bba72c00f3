# SPDX-License-Identifier: Apache-2.0
"""STOP's visual stream with token merging, written to be checked by eye: all prompts stand among the tokens, everything
is computed for every token, attention is a softmax over keys that are put together, merging is a loop over groups."""

import stoptome_kernels as stk
import torch
from stoptome_kernels.tome.schedule import Schedule
from torch import Tensor


def _norm(module, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight + module.bias


def _attend(attn, asking: Tensor, keys: Tensor, weight: Tensor) -> Tensor:
    """``asking (L, D)`` over ``keys (K, D)``, key j counted ``weight[j]`` times."""
    heads, width = attn.num_heads, asking.shape[1]
    wq, wk, wv = attn.in_proj_weight.chunk(3)
    bq, bk, bv = attn.in_proj_bias.chunk(3)
    q, k, v = (
        (rows @ w.T + b).view(-1, heads, width // heads).transpose(0, 1)
        for rows, w, b in ((asking, wq, bq), (keys, wk, bk), (keys, wv, bv))
    )
    likes = (q @ k.transpose(1, 2) / (width // heads) ** 0.5).exp() * weight
    mixed = (likes / likes.sum(-1, keepdim=True)) @ v
    return mixed.transpose(0, 1).reshape(-1, width) @ attn.out_proj.weight.T + attn.out_proj.bias


def _mlp(block, x: Tensor) -> Tensor:
    fc, proj = block.mlp.c_fc, block.mlp.c_proj
    hidden = _norm(block.ln_2, x) @ fc.weight.T + fc.bias
    out = x + (hidden * torch.sigmoid(1.702 * hidden)) @ proj.weight.T + proj.bias
    return out + 0.1 * block.LoRA(x) if hasattr(block, "LoRA") else out


def _merge(x: Tensor, size: Tensor, metric: Tensor, r: int, protected: int) -> tuple[Tensor, Tensor]:
    """One item: ``x (L, D)``, ``size (L,)``, ``metric (L, C)``."""
    dest = stk.match(metric[None].detach(), r, protected, "reference").dest[0].tolist()
    rows, sizes = [], []
    for output in range(x.shape[0] - r):
        members = [token for token, place in enumerate(dest) if place == output]
        total = sum(size[m] for m in members)
        rows.append(sum(size[m] * x[m] for m in members) / total)
        sizes.append(total)
    return torch.stack(rows), torch.stack(sizes)


def tower(blocks, frames: Tensor, prompts: Tensor, deep: Tensor, schedule: Schedule, prop_attn=True, embeddings=None):
    """One video. ``frames (T, 1 + n, D)`` without prompts, ``prompts (G, D)``, ``deep (layers, T, P, D)``.

    Returns the prompts (G, D) and, frame after frame, class tokens (T, D); and the sizes of each item.
    """
    count = deep.shape[2]
    items = [
        {"classes": frame[:1], "prompts": deep[0, t], "patches": frame[1:], "size": frame.new_ones(len(frame) - 1)}
        for t, frame in enumerate(frames)
    ]
    for layer, (block, step) in enumerate(zip(blocks, schedule.steps, strict=True)):
        own = deep[layer].split([len(item["classes"]) for item in items])
        for item, rows in zip(items, own, strict=True):
            item["prompts"] = rows.reshape(-1, rows.shape[-1])
        if step.join > 1:
            items = [
                _join(items[i : i + step.join], step, count, embeddings and embeddings.get(layer), i)
                for i in range(0, len(items), step.join)
            ]
        whole = [torch.cat([item["classes"], item["prompts"], item["patches"]]) for item in items]
        guarded = [len(item["classes"]) * (1 + count) for item in items]
        sizes = [torch.cat([s["size"].new_ones(g), s["size"]]) for s, g in zip(items, guarded, strict=True)]
        normed, first = [_norm(block.ln_1, x) for x in whole], _norm(block.ln_1, prompts)
        weight = [
            torch.cat([s.new_ones(len(prompts)), s]) if prop_attn else s.new_ones(len(prompts) + len(s)) for s in sizes
        ]
        over = torch.cat([weight[0][: len(prompts)], *(w[len(prompts) :] for w in weight)])
        answer = _attend(block.attn, first, torch.cat([first, *normed]), over)
        attended = [
            x + _attend(block.attn, n, torch.cat([first, n]), w) for x, n, w in zip(whole, normed, weight, strict=True)
        ]
        heads, width = block.attn.num_heads, prompts.shape[1]
        wk, bk = block.attn.in_proj_weight[width : 2 * width], block.attn.in_proj_bias[width : 2 * width]
        new = []
        for x, n, size, g in zip(attended, normed, sizes, guarded, strict=True):
            if step.r:
                metric = (n @ wk.T + bk).view(len(n), heads, -1).mean(1)
                x, size = _merge(x, size, metric, step.r, g)
            x = _mlp(block, x)
            classes = g // (1 + count)
            new.append({"classes": x[:classes], "prompts": x[classes:g], "patches": x[g:], "size": size[g:]})
        items = new
        prompts = _mlp(block, prompts + answer)
    return prompts, torch.cat([item["classes"] for item in items]), [item["size"] for item in items]


def _join(group, step, count, embedding, first):
    """Items side by side, then merged by the tokens themselves; the embedding is added after the matching."""
    parts = {name: torch.cat([item[name] for item in group]) for name in ("classes", "prompts", "patches", "size")}
    if step.inter or embedding is not None:
        plain = torch.cat([parts["classes"], parts["prompts"], parts["patches"]])
        named = plain
        if embedding is not None:
            added = {
                name: torch.cat([item[name] + embedding[0, first + i] for i, item in enumerate(group)])
                for name in ("classes", "prompts", "patches")
            }
            named = torch.cat([added["classes"], added["prompts"], added["patches"]])
        classes = len(parts["classes"])
        guarded = classes * (1 + count)
        size = torch.cat([parts["size"].new_ones(guarded), parts["size"]])
        if step.inter:
            named, size = _merge(named, size, plain, step.inter, guarded)
        parts = {
            "classes": named[:classes], "prompts": named[classes:guarded], "patches": named[guarded:],
            "size": size[guarded:],
        }  # fmt: skip
    return parts
