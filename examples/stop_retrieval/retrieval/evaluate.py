# SPDX-License-Identifier: Apache-2.0
"""R@1 and its kin of a model on a split, the work shared by all processes."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import metrics, rerank, results
from .corpus import Split, Video
from .errors import UsageError
from .loader import Broken, tokens, video_loader
from .parallel import Processes
from .tokenizer import Tokenizer

log = logging.getLogger("stop_retrieval")


@dataclass(frozen=True)
class Evaluation:
    """Retrieval both ways by one model.

    Attributes:
        results: ``videos`` and ``captions`` (see ``results.count``), ``text_to_video`` and ``video_to_text`` with the
            fields of ``metrics.Retrieval``, the same again under ``qb_norm`` and ``dsl`` where asked for, and
            ``seconds``.
        ranks: ``(captions,)`` int64, the rank of each caption's video, see ``metrics.ranks``.
        owners: ``(captions,)`` int64, the video of each caption.
        videos: those that could be read.
    """

    results: dict[str, Any]
    ranks: Tensor
    owners: Tensor
    videos: list[Video]


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
    models: Sequence[nn.Module], args: argparse.Namespace, videos: Sequence[Video], size: int, processes: Processes,
    broken: Broken,
) -> tuple[list[Tensor], list[int]]:  # fmt: skip
    """Return what each of the models makes of those ``videos`` that could be read, ``(B, E)`` float32 on the CPU, and
    which these are: the share of this process. A video is decoded once for all models."""
    for model in models:
        model.eval()
    parts: list[list[Tensor]] = [[] for _ in models]
    readable = []
    with tqdm(total=len(videos), desc="videos", unit="video", disable=processes.silent, leave=False) as bar:
        for batch in video_loader(args, videos, size, processes):
            broken.note(batch)
            _, video, mask = batch.to(processes.device)
            for model, part in zip(models, parts, strict=True):
                part.append(model.encode_video(video, mask).cpu())  # type: ignore[operator]
            readable.append(batch.readable)
            bar.update(len(video))
    good = torch.cat(readable)
    return [torch.cat(part)[good] for part in parts], good.nonzero().flatten().tolist()


def _everyones(
    models: Sequence[nn.Module], args: argparse.Namespace, videos: Sequence[Video], size: int, processes: Processes,
    broken: Broken,
) -> tuple[list[Tensor], list[int]]:  # fmt: skip
    """Return what each of the models makes of all videos that could be read, in their order, and which these are: the
    same in all processes."""
    mine = _share(len(videos), processes)
    seen, numbers = encode_videos(models, args, [videos[i] for i in mine], size, processes, broken)
    found: dict[int, tuple[Tensor, ...]] = {}
    for shares, indices in processes.all_know((seen, [mine[n] for n in numbers])):
        found.update(zip(indices, zip(*shares, strict=True), strict=True))
    if not found:
        raise UsageError("none of the videos to evaluate could be read")
    order = sorted(found)
    return [torch.stack([found[i][number] for i in order]) for number in range(len(models))], order


def evaluate(
    models: Mapping[str, nn.Module],
    args: argparse.Namespace,
    split: Split,
    tokenizer: Tokenizer,
    size: int,
    processes: Processes,
    train: Split | None = None,
) -> list[Evaluation]:
    """Return how well each of the models finds videos by their captions, and captions by their videos.

    Args:
        models: with ``encode_text`` and ``encode_video``, by the names that the log tells them by.
        split: to evaluate on.
        train: for the query bank of QB-Norm.
    """
    begun, broken = time.perf_counter(), Broken()
    all_models = [*models.values()]
    seen, order = _everyones(all_models, args, split.videos, size, processes, broken)
    place = {video: n for n, video in enumerate(order)}
    kept = [n for n, (owner, _) in enumerate(split.captions) if owner in place]
    truth = torch.tensor([place[split.captions[n][0]] for n in kept])
    ids = tokens(split, tokenizer, args.max_words)[kept]
    banks: list[tuple[Tensor, Tensor] | None] = [None] * len(models)
    if args.qb_norm:
        assert train is not None
        banks = [*_banks(all_models, args, train, tokenizer, size, processes)]
    broken.say(processes)
    counts = results.count(split, len(order), len(kept))
    if processes.first:
        log.info("videos: %s", ", ".join(f"{number} {what}" for what, number in counts["videos"].items()))
    evaluations = []
    for (title, model), each, bank in zip(models.items(), seen, banks, strict=True):
        text = encode_texts(model, ids, 4 * args.batch_size_val, processes)
        found = _ways(text, each, bank, args.camoe_dsl)
        told: dict[str, Any] = dict(counts)
        for name, (forth, back) in found.items():
            both = {
                "text_to_video": metrics.text_to_video(forth, truth),
                "video_to_text": metrics.video_to_text(back, truth),
            }
            if processes.first:
                for way, retrieval in both.items():
                    said = [title and f"{title}:", "" if name == "plain" else name, retrieval.line(way)]
                    log.info("%s", " ".join(filter(None, said)))
            figures = {way: asdict(retrieval) for way, retrieval in both.items()}
            told |= figures if name == "plain" else {name: figures}
        told["seconds"] = round(time.perf_counter() - begun, 2)
        evaluations.append(
            Evaluation(told, metrics.ranks(found["plain"][0], truth), truth, [split.videos[i] for i in order])
        )
    return evaluations


def _ways(
    text: Tensor, seen: Tensor, bank: tuple[Tensor, Tensor] | None, dsl: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the similarities ``(captions, videos)`` by which texts find videos and videos find texts: plain ones, and
    the two ways to normalise them where asked for."""
    similarity = text @ seen.t()
    found = {"plain": (similarity, similarity)}
    if bank is not None:
        bank_text, bank_video = bank
        found["qb_norm"] = (
            rerank.qb_norm(similarity, bank_text @ seen.t()),
            rerank.qb_norm(similarity.t(), bank_video @ text.t()).t(),
        )
    if dsl:
        found["dsl"] = (rerank.dual_softmax(similarity), rerank.dual_softmax(similarity.t()).t())
    return found


def _banks(
    models: Sequence[nn.Module], args: argparse.Namespace, train: Split, tokenizer: Tokenizer, size: int,
    processes: Processes,
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """Return each model's features of training captions and videos, spread over the split, as queries to normalise
    by."""

    def spread(count: int) -> list[int]:
        wanted = min(args.qb_norm, count)
        return [i * count // wanted for i in range(wanted)]

    chosen = Split(train.name, train.videos, tuple(train.captions[i] for i in spread(len(train.captions))))
    ids = tokens(chosen, tokenizer, args.max_words)
    videos = [train.videos[i] for i in spread(len(train.videos))]
    seen, _ = _everyones(models, args, videos, size, processes, Broken())
    return [
        (encode_texts(model, ids, 4 * args.batch_size_val, processes), each)
        for model, each in zip(models, seen, strict=True)
    ]
