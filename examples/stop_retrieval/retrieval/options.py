# SPDX-License-Identifier: Apache-2.0
"""The settings of a run: from its flags, from the run that a checkpoint is of, and by the kind of data."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

import stoptome_kernels as stk
from stoptome_kernels.stop.layouts import weights_file

from . import recipes
from .errors import UsageError
from .flags import DEFAULTS, parser

# what a checkpoint of a run must be read with; the run's folder tells it to --do_eval, --index and --query
OF_THE_MODEL = (
    "datatype", "max_words", "max_frames", "pretrained_clip_name", "random_weights", "temporal_prompt",
    "shared_latent_space", "visual_output_type", "text_prompt_length", "local_each_frame_prompt_length",
    "global_visual_prompt_length", "lora", "slice_framepos", "feature_framerate", "tome_prop_attn",
    "synthetic_train", "synthetic_val", "synthetic_seed",
)  # fmt: skip
# flags that version 0.2.0 didn't have, whose files lack them, and what its runs had
_LATER: dict[str, Any] = {"random_weights": False, "activation": None}
_DATA = ("data_path", "features_path", "train_csv", "val_csv")
# one setting in several flags: whoever gives one of them gives it anew
_MERGING = ("tome_r", "merge_layers", "merge_frame_nums", "merge_token_proportions", "frame_pos")
_OF_THE_CALL = (
    "resume", "init_model", "output_dir", "do_train", "do_eval", "index", "query", "max_loss", "draw_trace",
)  # fmt: skip
# what may differ when a run goes on: it changes no weight
FREE_TO_CHANGE = (
    *_OF_THE_CALL, "num_thread_reader", "n_display", "save_steps", "batch_size_val", "qb_norm", "camoe_dsl", "top_k",
    "shard_size", "max_pixels", "tome_trace_source", "data_path", "features_path", "train_csv", "val_csv",
    "pretrained_dir",
)  # fmt: skip

# of the values that a flag takes those that a complete run has, see _check
_NORMAL = {"sim_header": ("meanP",), "optim": ("AdamW",), "precision": ("fp32", "amp", "bf16")}
_PLAIN = (str, int, float, bool, type(None))


def read(argv: Sequence[str]) -> argparse.Namespace:
    """The settings of a run, complete but for what an earlier run in the folder tells (see ``complete``).

    ``notes`` are lines to be said once. ``given`` are the names of the flags that were given.

    Raises:
        UsageError: one line that names the flag.
    """
    p = parser()
    args = p.parse_args([*argv], argparse.Namespace(notes=[]))
    spelled = {word.split("=")[0] for word in argv if word.startswith("--")}
    args.given = sorted({a.dest for a in p._actions for name in a.option_strings if name in spelled} - {"notes"})
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    if args.sim_header != "meanP":
        raise UsageError(f"--sim_header {args.sim_header} is not to be had with STOP's prompts; use meanP")
    if args.optim == "BertAdam":
        args.optim = "AdamW"
        args.notes.append("--optim BertAdam is ignored: AdamW is used, which also corrects the bias of the first steps")
    if args.precision == "fp16":
        args.precision = "amp"
        args.notes.append("--precision fp16 is ignored: amp is used, whose weights stay float32")
    if args.do_train is None:
        args.do_train = not (args.do_eval or args.index is not None or args.query)
    if not (args.do_train or args.do_eval or args.index is not None or args.query):
        raise UsageError("nothing to do: --do_train 1, --do_eval, --index or --query")
    args.resume, args.init_model = (None if v in ("None", "") else v for v in (args.resume, args.init_model))  # STOP's
    try:
        args.init_model = args.init_model and weights_file(args.init_model)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if args.resume and not args.do_train:
        raise UsageError("--resume goes on with a training; to evaluate a checkpoint give --do_eval --init_model FILE")
    if args.resume and args.resume != "auto" and args.init_model:
        raise UsageError("--resume FILE and --init_model both say where the weights come from; give one of them")
    if args.random_weights and not args.do_train:
        raise UsageError("--random_weights is how a training begins: leave it out, the run's folder tells it")
    if args.random_weights and args.init_model:
        raise UsageError("--random_weights and --init_model both say where the weights come from; give one of them")
    if any(not text.strip() for text in args.query):
        raise UsageError('--query needs a text, such as --query "a red circle moves left"')
    if args.fsdp and not args.do_train:
        args.notes.append("--fsdp is ignored: only training shards the model")
    if args.fsdp and args.do_train and (args.index is not None or args.query):
        raise UsageError(
            "--index and --query can't follow a training with --fsdp in one call: call again with them alone"
        )
    if args.do_train and args.query and args.index is None:
        raise UsageError("--query after a training needs --index: the index that is there is not of the new weights")
    if args.qb_norm and not (args.do_train or args.do_eval):
        args.notes.append("--qb_norm is ignored: nothing is evaluated")
    args.sweep = args.tome_r if isinstance(args.tome_r, tuple) else ()
    if args.sweep:
        args.tome_r = 0
        if args.do_train or not args.do_eval or args.index is not None or args.query:
            raise UsageError(
                "--tome_r with several numbers compares them by an evaluation: give it with --do_eval alone"
            )
    elif "max_loss" in args.given:
        args.notes.append("--max_loss is ignored: it chooses among several --tome_r, such as --tome_r 0,2,4,8")
    if args.draw_trace and (args.do_train or not args.do_eval):
        raise UsageError("--draw_trace draws videos of an evaluation: give it with --do_eval, after the training")
    if args.tome_trace_source and not args.draw_trace:
        args.notes.append("--tome_trace_source alone shows nothing here: --do_eval --draw_trace N draws N videos")
    tome = [name for name in args.given if name in (*_MERGING, "tome_prop_attn")]
    if args.tome_preset and tome:
        raise UsageError(f"--tome_preset {args.tome_preset} and --{tome[0]} both set token merging; give one of them")


def complete(args: argparse.Namespace, run: Any = None, path: str = "the run") -> argparse.Namespace:
    """Fill in what was not given: from the run that made the checkpoint, then by the kind of data.

    Args:
        args: of ``read``; changed in place.
        run: the settings of that run, see ``checked``.
        path: of the file that they are from.

    Raises:
        UsageError: settings that contradict each other, or that no run has.
    """
    data = [name for name in _DATA if getattr(args, name) is not None]
    merging = {*_MERGING, "tome_preset"} & {*args.given}
    if args.sweep:
        merging -= {"tome_r"}  # of several r, clip merging is the run's with each of them
    if run is not None:
        run = checked(run, path)
        elsewhere = {"datatype"} if data and run.get("datatype") == "synthetic" else set()  # other videos are wanted
        names = {*OF_THE_MODEL, *_DATA} & {*run} - {*args.given} - elsewhere
        for name in (*names, *(() if merging else _MERGING)):
            if name == "tome_r" and args.sweep:
                continue
            setattr(args, name, run[name])
    if args.tome_preset:
        preset = vars(stk.ToMeConfig.preset(args.tome_preset))
        for name in (*_MERGING, "tome_prop_attn"):
            setattr(args, name, preset[name if name in preset else name.removeprefix("tome_")])
    if args.datatype is None:
        args.datatype = "msrvtt" if data else "synthetic"
    defaults = DEFAULTS | (recipes.SYNTHETIC if args.datatype == "synthetic" else {})
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.batch_size % args.gradient_accumulation_steps:
        raise UsageError(
            f"--batch_size {args.batch_size} is no multiple of --gradient_accumulation_steps "
            f"{args.gradient_accumulation_steps}"
        )
    if args.cache_frames and (args.train_frame_order or args.eval_frame_order or args.slice_framepos != 2):
        if "cache_frames" in args.given:
            raise UsageError("--cache_frames 1 goes with frame order 0 and --slice_framepos 2 alone")
        args.cache_frames = False
    reads = args.do_train or args.do_eval or args.index == ""
    if args.datatype != "synthetic" and reads:
        for name in ("data_path", "features_path"):
            if getattr(args, name) is None:
                raise UsageError(f"--datatype {args.datatype} needs --{name}")
    if args.datatype == "synthetic":
        for name in _DATA:
            if getattr(args, name) is not None:
                raise UsageError(f"--datatype synthetic makes its own videos: leave out --{name}")
    return args


def adopt(args: argparse.Namespace, run: Any, path: str) -> dict[str, Any]:
    """Set the settings of a run that goes on, which are those it was begun with, and return these.

    Raises:
        UsageError: another value was given for one that changes what is learnt, there are more or fewer processes, or
            what ``checked`` raises.
    """
    run = checked(run, path)
    if run["world"] != args.world:
        raise UsageError(
            f"{path} was trained by {run['world']} processes, not {args.world}, whose batches would be others: "
            f"torchrun --nproc_per_node={run['world']} main.py …"
        )
    for name, value in run.items():
        if name not in args.given:
            if name not in _OF_THE_CALL:
                setattr(args, name, value)
        elif name == "epochs" and args.epochs > value:
            args.notes.append(
                f"--epochs {args.epochs} in place of {value}: from here on the learning rate is that of {args.epochs}"
            )
        elif name not in FREE_TO_CHANGE and getattr(args, name) != value:
            raise UsageError(
                f"--{name} is {getattr(args, name)}, but {path} was trained with {value}: leave it out to go on, or "
                "begin another run by --init_model"
            )
    return run


def checked(run: Any, path: str) -> dict[str, Any]:
    """The settings in a file, each of which is one that its flag could have given; lists become tuples.

    They must be those of ``settings``, no more (a setting this program doesn't know may be why the weights are as
    they are) and no less, but for those that may change when a run goes on, or are new: of older files they may be
    missing.

    Raises:
        UsageError: they are something else; one line that names the file and the setting.
    """
    way_out = "it is damaged or of another version; give its weights by --init_model, with all settings as flags"
    if not isinstance(run, dict):
        raise UsageError(f"the settings in {path} are no object but a {type(run).__name__}; {way_out}")
    flags = {action.dest: action for action in parser()._actions if action.dest not in ("help", "notes")}
    found: dict[str, Any] = {**_LATER}
    for name, value in run.items():
        if name != "world" and name not in flags:
            raise UsageError(f"the settings in {path} have {str(name)[:60]!r}, which is no flag here; {way_out}")
        try:
            found[name] = _positive(value) if name == "world" else _as_given(flags[name], value)
        except (argparse.ArgumentTypeError, ValueError, TypeError):
            shown = repr(value) if type(value) in _PLAIN else f"of type {type(value).__name__}"
            raise UsageError(
                f"the settings in {path} have a value for --{name} that no run has, {shown[:60]}; {way_out}"
            ) from None
    missing = sorted({*flags, "world"} - {*found, *FREE_TO_CHANGE})
    if missing:
        raise UsageError(f"the settings in {path} lack {missing[0]}; {way_out}")
    return found


def _positive(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError
    return value


def _as_given(action: argparse.Action, value: Any) -> Any:
    """A value that a complete run has of a flag, as the flag would have given it; raises the errors of argparse's
    types for any other."""
    value = tuple(value) if isinstance(value, list) else value
    if type(value) not in (*_PLAIN, tuple):
        raise TypeError
    if value is None or action.default == value == ():
        if value is None and (action.default is not None or action.dest in (*DEFAULTS, "datatype", "do_train")):
            raise ValueError
        return value
    if action.nargs == "+" or action.type is None:
        return _as_text(action, value)
    if isinstance(value, tuple):
        if not all(type(part) is int for part in value):
            raise TypeError
        text = "-".join(map(str, value))
    else:
        text = str(value) if type(value) is int else repr(value)
    given = action.type(text)  # type: ignore[operator]
    if given != value or (type(given), type(value)) in ((int, float), (bool, int), (int, bool), (float, bool)):
        raise TypeError
    if action.choices is not None and given not in action.choices:
        raise ValueError
    return given


def _as_text(action: argparse.Action, value: Any) -> Any:
    """The same for flags that take text, several texts, or nothing."""
    if action.nargs == 0:
        if type(value) is not bool:
            raise TypeError
        return value
    if action.nargs == "+" and type(value) is not tuple:
        raise TypeError
    for part in value if action.nargs == "+" else (value,):
        if type(part) is not str or "\0" in part:
            raise TypeError
        os.fsencode(part)  # UnicodeEncodeError: no file has such a name
    choices = _NORMAL.get(action.dest, action.choices)
    if choices is not None and value not in choices:
        raise ValueError
    return value


def tome_config(args: argparse.Namespace) -> stk.ToMeConfig:
    """The settings of token merging; raises UsageError where they contradict each other."""
    try:
        return stk.ToMeConfig.from_args(args)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return what is written down of a run, as JSON keeps it."""
    skip = ("notes", "given", "tome", "hparams", "sweep", "max_loss", "draw_trace")
    return {k: list(v) if isinstance(v, tuple) else v for k, v in sorted(vars(args).items()) if k not in skip}
