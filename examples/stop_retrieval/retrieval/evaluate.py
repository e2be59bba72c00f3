# SPDX-License-Identifier: Apache-2.0
"""R@1 and its kin of a model on a split, the work shared by all processes."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import metrics, rerank
from .corpus import Split, Video
from .errors import UsageError
from .loader import Broken, tokens, video_loader
from .parallel import Processes
from .tokenizer import Tokenizer

log = logging.getLogger("stop_retrieval")


def _share(count: int, processes: Processes) -> list[int]:
    """Of ``count`` things those that this process works on; every process has as many, since a sharded model computes
    only while all of them do, so that the last may come up twice."""
    each = -(-count // processes.world)
    return [min(processes.rank + n * processes.world, count - 1) for n in range(each)]


@torch.inference_mode()
def encode_texts(model: nn.Module, ids: Tensor, batch: int, processes: Processes) -> Tensor:
    """``(A, W) → (A, E)`` float32 on the CPU, the same in all processes."""
    model.eval()
    mine = _share(len(ids), processes)
    parts = [model.encode_text(part.to(processes.device)).cpu() for part in ids[mine].split(batch)]  # type: ignore
    shares = processes.all_know((mine, torch.cat(parts)))
    features = torch.empty(len(ids), parts[0].shape[1])
    for numbers, share in shares:
        features[numbers] = share
    return features


@torch.inference_mode()
def encode_videos(
    model: nn.Module, args: argparse.Namespace, videos: Sequence[Video], size: int, processes: Processes, broken: Broken
) -> tuple[Tensor, list[int]]:
    """``(B, E)`` float32 on the CPU of those ``videos`` that could be read, and which these are: this process alone."""
    model.eval()
    features, readable = [], []
    with tqdm(total=len(videos), unit="video", disable=processes.silent, leave=False) as bar:
        for batch in video_loader(args, videos, size, processes):
            broken.note(batch)
            _, video, mask = batch.to(processes.device)
            features.append(model.encode_video(video, mask).cpu())  # type: ignore[operator]
            readable.append(batch.readable)
            bar.update(len(video))
    good = torch.cat(readable)
    return torch.cat(features)[good], good.nonzero().flatten().tolist()


def _everyones(
    model: nn.Module, args: argparse.Namespace, videos: Sequence[Video], size: int, processes: Processes, broken: Broken
) -> tuple[Tensor, list[int]]:
    """Features of all videos that could be read, in their order, the same in all processes."""
    mine = _share(len(videos), processes)
    features, numbers = encode_videos(model, args, [videos[i] for i in mine], size, processes, broken)
    found: dict[int, Tensor] = {}
    for share, indices in processes.all_know((features, [mine[n] for n in numbers])):
        found.update(zip(indices, share, strict=True))
    if not found:
        raise UsageError("none of the videos to evaluate could be read")
    order = sorted(found)
    return torch.stack([found[i] for i in order]), order


def evaluate(
    model: nn.Module,
    args: argparse.Namespace,
    split: Split,
    tokenizer: Tokenizer,
    size: int,
    processes: Processes,
    train: Split | None = None,
) -> dict:
    """Retrieval both ways.

    Args:
        model: with ``encode_text`` and ``encode_video``.
        split: to evaluate on.
        train: for the query bank of QB-Norm.

    Returns:
        ``text_to_video`` and ``video_to_text`` with the fields of ``metrics.Retrieval``, the same again under
        ``qb_norm`` and ``dsl`` where asked for, ``videos``, ``captions``, ``skipped`` and ``seconds``.
    """
    begun, broken = time.perf_counter(), Broken()
    seen, order = _everyones(model, args, split.videos, size, processes, broken)
    place = {video: n for n, video in enumerate(order)}
    kept = [n for n, (owner, _) in enumerate(split.captions) if owner in place]
    truth = torch.tensor([place[split.captions[n][0]] for n in kept])
    text = encode_texts(model, tokens(split, tokenizer, args.max_words)[kept], 4 * args.batch_size_val, processes)
    similarity = text @ seen.t()
    found: dict = {"plain": (similarity, similarity)}
    if args.qb_norm:
        assert train is not None
        bank_text, bank_video = _bank(model, args, train, tokenizer, size, processes)
        found["qb_norm"] = (
            rerank.qb_norm(similarity, bank_text @ seen.t()),
            rerank.qb_norm(similarity.t(), bank_video @ text.t()).t(),
        )
    if args.camoe_dsl:
        found["dsl"] = (rerank.dual_softmax(similarity), rerank.dual_softmax(similarity.t()).t())
    skipped = broken.say(processes)
    results: dict = {"videos": len(order), "captions": len(kept), "skipped": skipped}
    for name, (forth, back) in found.items():
        both = {
            "text_to_video": metrics.text_to_video(forth, truth), "video_to_text": metrics.video_to_text(back, truth)
        }  # fmt: skip
        if processes.first:
            for way, retrieval in both.items():
                log.info("%s%s", "" if name == "plain" else f"{name} ", retrieval.line(way))
        told = {way: asdict(retrieval) for way, retrieval in both.items()}
        results |= told if name == "plain" else {name: told}
    results["seconds"] = round(time.perf_counter() - begun, 2)
    return results


def _bank(
    model: nn.Module, args: argparse.Namespace, train: Split, tokenizer: Tokenizer, size: int, processes: Processes
) -> tuple[Tensor, Tensor]:
    """Features of training captions and videos, spread over the split, as queries to normalise by."""

    def spread(count: int) -> list[int]:
        wanted = min(args.qb_norm, count)
        return [i * count // wanted for i in range(wanted)]

    chosen = Split(train.name, train.videos, tuple(train.captions[i] for i in spread(len(train.captions))))
    text = encode_texts(model, tokens(chosen, tokenizer, args.max_words), 4 * args.batch_size_val, processes)
    videos = [train.videos[i] for i in spread(len(train.videos))]
    return text, _everyones(model, args, videos, size, processes, Broken())[0]
