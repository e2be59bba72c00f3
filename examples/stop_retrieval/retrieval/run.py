# SPDX-License-Identifier: Apache-2.0
"""The run of the command line: check everything, then train, evaluate, index, search."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import stoptome_kernels as stk
import torch
from stoptome_kernels._backends import choose

from . import (
    checkpoint,
    compare,
    features,
    indexing,
    interrupt,
    options,
    pictures,
    recipes,
    results,
    search,
    state,
    synthetic,
    terminal,
)
from .annotations import load
from .corpus import Split, Video
from .errors import UsageError
from .evaluate import evaluate
from .loader import tokens, train_loader
from .model import Retrieval, count
from .parallel import Processes, Together
from .terminal import counted
from .tokenizer import Tokenizer
from .train import Training

log = logging.getLogger("stop_retrieval")
OUT_OF_MEMORY = (
    "out of memory: try a smaller --batch_size (or --gradient_accumulation_steps, which keeps it), fewer --max_frames, "
    "--gradient_checkpointing, or a larger --tome_r; when evaluating a smaller --batch_size_val; fewer "
    "--num_thread_reader"
)
_WORTH_PROCESSES = 200  # videos to make; starting processes takes some seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0; 2 for what the user can put right, said in one line; 1 out of memory; 130 on Ctrl-C."""
    processes = None
    terminal.configure()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = terminal.show_warning
            args = options.read(sys.argv[1:] if argv is None else argv)
            processes = Processes()
            _run(args, processes)
        return 0
    except UsageError as error:
        alone = processes is None or (processes.working and not isinstance(error, Together))
        if alone or processes.first:  # type: ignore[union-attr]
            terminal.complain(str(error))
        return 2
    except KeyboardInterrupt as stop:
        if processes is None or processes.first:
            terminal.complain(str(stop) or "stopped", kind="note")
        return 130
    except (torch.OutOfMemoryError, MemoryError):
        terminal.complain(OUT_OF_MEMORY)
        return 1
    except RuntimeError as error:
        # how torch says it of a CPU, and of a process that decodes
        if not any(words in str(error) for words in ("can't allocate memory", "DataLoader worker")):
            raise
        terminal.complain(OUT_OF_MEMORY)
        return 1
    finally:
        terminal.stop_logging()
        if processes is not None:
            processes.close()


def _run(args: argparse.Namespace, processes: Processes) -> None:
    folder = state.Folder(args.output_dir)
    args.world = processes.world
    works = args.do_train or args.do_eval or args.index is not None
    log.setLevel(logging.INFO if processes.first and works else logging.WARNING)
    log.propagate = False
    terminal.log_to_terminal("" if processes.first else f"process {processes.rank}: ")
    done = False
    try:
        if works:
            processes.first_does(lambda: folder.open(alone=args.do_train or args.index is not None))
        _work(args, folder, processes)
        done = True
    except KeyboardInterrupt as stop:
        if str(stop):
            raise
        raise interrupt.Stopped(f"stopped; {_way_on(args, folder)}") from None
    finally:
        folder.close(refused=not done)


def _way_on(args: argparse.Namespace, folder: state.Folder) -> str:
    """Say what to do after a call that was stopped at once."""
    if args.do_train and any((folder.path / name).exists() for name in (state.LAST, state.SETTINGS)):
        return f"go on from the last checkpoint with --output_dir {folder.path} --resume auto"
    if args.index is not None and not args.do_train:
        return "the same call goes on"
    return "nothing of it is saved: give the same call again"


def _work(args: argparse.Namespace, folder: state.Folder, processes: Processes) -> None:
    try:
        choose("auto", torch.empty(0, device=processes.device))  # as STOPTOME_BACKEND says
    except (ValueError, RuntimeError) as error:
        raise UsageError(str(error)) from error
    resume, weights_from = _origin(args, folder)
    own = args.resume == "auto" or (args.resume and Path(args.resume).resolve().parent == folder.path.resolve())
    if args.do_train and not own:
        processes.first_does(folder.must_be_new)
        if resume is not None:
            resume.progress.best = -1.0  # of another folder's run
    corpus = _searchable(args, folder)
    if args.do_train or args.do_eval:
        processes.first_does(lambda: results.read(folder.path))  # a damaged file is found before the work
    configs = compare.settings(args) if args.sweep else {"": options.tome_config(args)}
    args.tome = next(iter(configs.values()))
    if args.draw_trace and all(config.off for config in configs.values()):
        raise UsageError("--draw_trace draws what merged: give --tome_r or --tome_preset")
    if args.fsdp and args.do_train:
        processes.can_shard()
    for note in args.notes if processes.first else ():
        log.info(note)
    tokenizer = Tokenizer()
    torch.manual_seed(args.seed)  # all processes begin with the same weights
    # before any video is looked for or made
    models, notes = compare.models(args, configs, weights_from, processes.device)
    model = next(iter(models.values()))
    size = model.clip.config.image_size
    splits = _splits(args, folder, processes)
    if processes.first:
        for note in notes:
            log.info(note)
        log.info("%s", _summary(model, args))
    processes.working = True
    if args.do_train:
        _train(args, model, splits, tokenizer, folder, processes, resume)
        if args.index is not None:  # a later call searches with the best weights, too
            checkpoint.load_weights(folder.weights(), model)
    elif args.do_eval:
        _evaluate(args, models, configs, splits, tokenizer, folder, processes, weights_from)
    if args.index is not None:
        videos = corpus or splits["val"].videos
        indexing.index(model, args, videos, folder.path / state.INDEX, size, processes)
    if args.query:
        indexing.query(model, args.query, folder.path / state.INDEX, args, tokenizer, processes)


def _evaluate(
    args: argparse.Namespace, models: dict[str, Retrieval], configs: dict[str, stk.ToMeConfig],
    splits: dict[str, Split], tokenizer: Tokenizer, folder: state.Folder, processes: Processes,
    weights_from: str | None,
) -> None:  # fmt: skip
    """Evaluate the models, one or several settings of token merging side by side, and write down what comes of it."""
    first = next(iter(models.values()))
    size = first.clip.config.image_size
    found = evaluate(models, args, splits["val"], tokenizer, size, processes, splits.get("train"))
    of = {"checkpoint": weights_from, "fingerprint": features.weights_of(first)}
    if args.sweep:
        compare.report(args, configs, models, found, folder.path, processes, **of)
    else:
        told = results.describe(args, args.tome, "evaluation", **of) | found[0].results
        processes.first_does(lambda: results.append(folder.path, [told]))
    if args.draw_trace:
        named = args.tome_preset or f"r = {args.tome_r}"
        merging = {name or named: (models[name], config) for name, config in configs.items() if not config.off}
        drawing = partial(pictures.draw, merging, args, found[0].videos, folder.path, processes)
        processes.first_does(drawing)


def _searchable(args: argparse.Namespace, folder: state.Folder) -> list[Video]:
    """The videos of a folder that is to be indexed, after what can be checked before any work."""
    if args.index is None and not args.query:
        return []
    search.require()
    where = folder.path / state.INDEX
    if args.do_train and where.exists():
        raise UsageError(f"{where} is of other weights than those to be trained: remove it")
    return indexing.videos_in(args.index) if args.index else []


def _origin(args: argparse.Namespace, folder: state.Folder) -> tuple[checkpoint.Checkpoint | None, str | None]:
    """A checkpoint to go on from, or the file of other weights to begin with; and all settings completed."""
    if args.do_train and args.resume:
        path = os.fspath(folder.path / state.LAST) if args.resume == "auto" else args.resume
        found, begun = None, None
        if args.resume != "auto" or os.path.exists(path):
            found = checkpoint.read(path)
            begun = found.hparams
        else:
            path = os.fspath(folder.path / state.SETTINGS)
            begun = folder.settings()
        if begun is not None:
            begun = options.adopt(args, begun, path)
        elif found is None:
            if not {"datatype", "data_path", "features_path"} & {*args.given}:
                raise UsageError(
                    f"--resume auto: no run in --output_dir {folder.path}; give the folder of one, or begin one on "
                    "synthetic videos by --datatype synthetic"
                )
            args.notes.append(f"no run in --output_dir {folder.path} to go on with: A NEW ONE BEGINS")
        if found is None and begun is not None:
            args.init_model = args.init_model or begun.get("init_model")
        options.complete(args)
        return found, found.path if found else args.init_model  # a checkpoint tells the sizes of its model
    if args.do_train:
        options.complete(args)
        if args.init_model and not os.path.isfile(args.init_model):  # before videos are drawn or looked for
            raise UsageError(f"no checkpoint at {args.init_model}, which --init_model gives")
        return None, args.init_model
    path = args.init_model or os.fspath(folder.weights())
    options.complete(args, checkpoint.settings_of(path), path)
    return None, path


def _splits(args: argparse.Namespace, folder: state.Folder, processes: Processes) -> dict[str, Split]:
    want = []
    if args.do_train or (args.do_eval and args.qb_norm):
        want.append("train")
    if args.do_train or args.do_eval or args.index == "":
        want.append("val")
    if not want:
        return {}
    datatype, paths = args.datatype, (args.data_path, args.features_path, args.train_csv, args.val_csv)
    if datatype == "synthetic":
        datatype = "msrvtt"  # in whose file layout it is written
        where, many = folder.path / "synthetic", args.synthetic_train + args.synthetic_val
        if processes.first and not where.exists():
            log.info("making %s in %s", counted(many, "synthetic video"), where)
        paths = processes.first_does(
            lambda: synthetic.write(
                where, train=args.synthetic_train, val=args.synthetic_val, seed=args.synthetic_seed, silent=None,
                processes=1 if many < _WORTH_PROCESSES else min(os.cpu_count() or 1, 8), **recipes.VIDEOS,
            )
        )  # fmt: skip
    splits = load(datatype, *paths, want=tuple(want))
    for split in splits.values() if processes.first else ():
        videos, captions = counted(len(split.videos), "video"), counted(len(split.captions), "caption")
        log.info("%s: %s, %s", split.name, videos, captions)
        for path in split.missing:
            log.warning("skipped %s: not there", path)
        if split.missing:
            log.warning("%s: left out %s, missing", split.name, counted(len(split.missing), "more video"))
        if split.silent:
            silent = counted(len(split.silent), "video")
            log.warning("%s: left out %s without captions, such as %s", split.name, silent, split.silent[0])
    return splits


def _train(
    args: argparse.Namespace,
    model: Retrieval,
    splits: dict[str, Split],
    tokenizer: Tokenizer,
    folder: state.Folder,
    processes: Processes,
    resume: checkpoint.Checkpoint | None,
) -> None:
    size = model.clip.config.image_size
    train, val = splits["train"], splits["val"]
    wrapped = processes.wrap(model, args.fsdp, unused=args.temporal_prompt == "group2-2")
    loader, sampler = train_loader(args, train, tokens(train, tokenizer, args.max_words), size, processes)
    args.hparams = options.settings(args)
    training = Training(
        args, wrapped, loader, sampler, folder, processes,
        evaluate=lambda: evaluate({"": model}, args, val, tokenizer, size, processes, train)[0].results,
    )  # fmt: skip
    if resume is not None and processes.first:
        done = resume.progress
        log.info("going on after epoch %d, step %d", done.epoch, done.step)
        if done.epoch == args.epochs:
            log.info("nothing left to do after %s; a larger --epochs trains on", counted(args.epochs, "epoch"))
    training.run(resume)


def _summary(model: Retrieval, args: argparse.Namespace) -> str:
    learning = count(p for p in model.parameters() if p.requires_grad)
    schedule = model.clip.visual.tome.schedule
    return (
        f"{count(model.parameters()) / 1e6:.2f} million parameters, {learning / 1e6:.2f} million of them learning; "
        f"tokens of an item after each layer {', '.join(map(str, schedule.tokens))} (of {schedule.tokens_in}), "
        f"{args.max_frames} frames a video"
    )
