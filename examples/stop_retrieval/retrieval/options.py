# SPDX-License-Identifier: Apache-2.0
"""The command line: STOP's flags with STOP's meaning, and what this program adds to them."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Sequence
from typing import Any, NoReturn

import stoptome_kernels as stk
from stoptome_kernels.stop.config import LATENT_SPACES, TEMPORAL_PROMPTS, VISUAL_OUTPUTS

from . import ignored, recipes, video
from .errors import UsageError

DATATYPES = ("msrvtt", "msvd", "didemo", "activity", "lsmdc", "vatex", "synthetic")
WEIGHTS = {"ViT-B/32": "ViT-B-32.pt", "ViT-B/16": "ViT-B-16.pt", "ViT-L/14": "ViT-L-14.pt"}  # names as OpenAI's files
TINY = "tiny"

# what STOP's scripts for MSR-VTT give, where its parser's own defaults are no useful ones (max_frames 100, say)
DEFAULTS: dict[str, Any] = {
    "max_words": 32, "max_frames": 12, "batch_size": 32, "batch_size_val": 16, "epochs": 5, "lr": 1e-4, "coef_lr": 1.0,
    "wd": 0.2, "warmup_proportion": 0.1, "pretrained_clip_name": "ViT-B/32", "temporal_prompt": "DGL",
    "shared_latent_space": "transformer", "visual_output_type": "global_prompt0", "text_prompt_length": 8,
    "local_each_frame_prompt_length": 4, "global_visual_prompt_length": 4, "lora": True, "slice_framepos": 2,
    "temperature_new": 1.0, "num_thread_reader": 1, "cache_frames": False,
}  # fmt: skip
# what a checkpoint of a run must be read with; the run's folder tells it to --do_eval, --index and --query
OF_THE_MODEL = (
    "datatype", "max_words", "max_frames", "pretrained_clip_name", "temporal_prompt", "shared_latent_space",
    "visual_output_type", "text_prompt_length", "local_each_frame_prompt_length", "global_visual_prompt_length", "lora",
    "slice_framepos", "feature_framerate", "tome_prop_attn", "synthetic_train", "synthetic_val", "synthetic_seed",
)  # fmt: skip
_DATA = ("data_path", "features_path", "train_csv", "val_csv")
# one setting in several flags: whoever gives one of them gives it anew
_MERGING = ("tome_r", "merge_layers", "merge_frame_nums", "merge_token_proportions", "frame_pos")
_OF_THE_CALL = ("resume", "init_model", "output_dir", "do_train", "do_eval", "index", "query")
# what may differ when a run goes on: it changes no weight
FREE_TO_CHANGE = (
    *_OF_THE_CALL, "num_thread_reader", "n_display", "save_steps", "batch_size_val", "qb_norm", "camoe_dsl", "top_k",
    "shard_size", "max_pixels", "tome_trace_source", "data_path", "features_path", "train_csv", "val_csv",
    "pretrained_dir",
)  # fmt: skip

# of the values that a flag takes those that a complete run has, see _check
_NORMAL = {"sim_header": ("meanP",), "optim": ("AdamW",), "precision": ("fp32", "amp", "bf16")}
_PLAIN = (str, int, float, bool, type(None))


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and which flag was probably meant."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, 1)
            message = f"{unknown[1]} is no flag of this program" + (f"; did you mean {near[0]}?" if near else "")
        raise UsageError(f"{message} (--help lists the flags)")


class _Ignored(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        note = f"{option_string} is ignored: {self.help_text}"
        if note not in namespace.notes:
            namespace.notes.append(note)

    def __init__(self, *args, help_text: str, **options):
        super().__init__(*args, **options)
        self.help_text = help_text


def _at_least(least: int, most: int = 2**31 - 1):
    def read(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,20}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be an integer of {least} or more, got {text[:40]!r}")
        if int(text) > most:
            raise argparse.ArgumentTypeError(f"must be an integer of at most {most}, got {text}")
        return int(text)

    return read


def _number(low: float, high: float = float("inf")):
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high or value == float("inf"):
            what = f"{low:g} or more" if high == float("inf") else f"from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"must be a number, {what}, got {text!r}")
        return value

    return read


def _switch(text: str) -> bool:
    if text.lower() not in ("0", "1", "true", "false"):
        raise argparse.ArgumentTypeError(f"must be 0 or 1, got {text!r}")
    return text.lower() in ("1", "true")


def parser() -> argparse.ArgumentParser:
    """All flags. Those without a default have one that depends on the data (see DEFAULTS and recipes.py)."""
    p = _Parser(
        description="Text-video retrieval with STOP and token merging: training, evaluation, search. With --output_dir "
        "alone: a small model on synthetic videos.",
        allow_abbrev=False,
    )
    switch: dict[str, Any] = {"nargs": "?", "const": True, "type": _switch, "default": False, "metavar": "0|1"}

    add = p.add_argument_group("what to do").add_argument
    add("--output_dir", required=True, help="folder of the run: log, checkpoints, results, index")
    add("--do_train", nargs="?", const=True, type=_switch, metavar="0|1", help="train (default: unless --do_eval, …)")
    add("--do_eval", **switch, help="evaluate a checkpoint: --init_model, or the best one in --output_dir")
    add("--index", nargs="?", const="", metavar="FOLDER", help="write the features of the evaluation videos, or of all "
        "videos in FOLDER, and an index for --query")  # fmt: skip
    add("--query", nargs="+", default=[], metavar="TEXT", help="search the index in --output_dir")
    add("--top_k", type=_at_least(1), default=5, help="videos to show for a query")
    add("--shard_size", type=_at_least(1), default=256, help="videos in one file of features")
    add("--resume", metavar="auto|FILE", help="go on from a checkpoint; auto: from the newest in --output_dir, if any")
    add("--init_model", metavar="FILE", help="weights to begin with: STOP's or this program's checkpoint, or CLIP's")
    add("--seed", type=_at_least(0, 2**63 - 1), default=42)

    add = p.add_argument_group("data").add_argument
    add("--datatype", choices=DATATYPES, help="default: msrvtt if a path is given, else synthetic")
    add("--data_path", help="annotations: MSRVTT_data.json, or the folder of the other data sets")
    add("--features_path", help="folder of the videos")
    add("--train_csv", help="MSR-VTT: training videos (9k, 7k split); without: the JSON's own split")
    add("--val_csv", help="MSR-VTT: pairs to evaluate (1k-A); without: the JSON's own split")
    add("--expand_msrvtt_sentences", action="store_true", help="every caption is a training sample of its own")
    add("--max_words", type=_at_least(2), help="tokens of a caption; longer ones are cut")
    add("--max_frames", type=_at_least(1), help="frames of a video")
    add("--feature_framerate", type=_number(1e-3), default=1.0, help="frames a second with --slice_framepos 0 and 1")
    add("--slice_framepos", type=int, choices=(0, 1, 2), help="0: first frames, 1: last, 2: spread (STOP's, default)")
    add("--train_frame_order", type=int, choices=(0, 1, 2), default=0, help="0: ordinary, 1: reversed, 2: shuffled")
    add("--eval_frame_order", type=int, choices=(0, 1, 2), default=0)
    add("--num_thread_reader", type=_at_least(0), help="processes that decode videos (0: the one that trains)")
    add("--max_pixels", type=_at_least(1), default=video.MAX_PIXELS, help="of a frame; a video of larger ones is "
        "skipped before they take any memory (default: %(default)s, 8192 × 8192)")  # fmt: skip
    add("--cache_frames", nargs="?", const=True, type=_switch, metavar="0|1", help="keep frames of small videos in "
        "memory, three times as many as are taken; in each process that decodes")  # fmt: skip
    add("--synthetic_train", type=_at_least(1), help="synthetic: videos to train on")
    add("--synthetic_val", type=_at_least(1), help="synthetic: videos to evaluate on")
    add("--synthetic_seed", type=_at_least(0, 2**63 - 1), default=0, help="synthetic: other videos")

    add = p.add_argument_group("model").add_argument
    add("--pretrained_clip_name", choices=(*WEIGHTS, TINY), help=f"{TINY}: a small model with random weights")
    add("--pretrained_dir", default=os.path.expanduser("~/models/pretrained"), help="folder of CLIP's weights")
    add("--temporal_prompt", choices=TEMPORAL_PROMPTS, help="group2-2 is STOP proper")
    add("--shared_latent_space", choices=LATENT_SPACES)
    add("--visual_output_type", choices=VISUAL_OUTPUTS, help="what stands for a video")
    add("--lora", nargs="?", const=True, type=_switch, metavar="0|1", help="low-rank branch beside the MLPs (on)")
    add("--sim_header", choices=("meanP", "seqLSTM", "seqTransf", "tightTransf"), default="meanP")
    add("--text_prompt_length", type=_at_least(0))
    add("--local_each_frame_prompt_length", type=_at_least(1))
    add("--global_visual_prompt_length", type=_at_least(1))
    add("--temperature_new", type=_number(0), help="above 1: value of logit_scale to begin with")
    add("--freeze_clip", **switch, help="train only what STOP adds to CLIP")

    stk.add_tome_args(p)
    p.add_argument("--tome_preset", choices=("training", "inference", "prototyping", "accuracy", "memory"),
                   help="settings of token merging by name, in place of the flags above")  # fmt: skip

    add = p.add_argument_group("training").add_argument
    add("--epochs", type=_at_least(1))
    add("--eval_epochs", type=_at_least(1), default=1, help="epochs between two evaluations")
    add("--batch_size", type=_at_least(1), help="videos of one process in one step")
    add("--gradient_accumulation_steps", type=_at_least(1), default=1, help="parts that a batch is computed in")
    add("--lr", type=_number(0), help="of what STOP adds to CLIP")
    add("--coef_lr", type=_number(0), help="times lr: the rate of CLIP's own weights")
    add("--wd", type=_number(0), help="weight decay")
    add("--beta1", type=_number(0, 1), default=0.9)
    add("--beta2", type=_number(0, 1), default=0.98)
    add("--eps", type=_number(0), default=1e-6)
    add("--optim", choices=("AdamW", "BertAdam"), default="AdamW")
    add("--warmup_proportion", type=_number(0, 1), help="share of the steps in which lr rises")
    add("--clip_grad_norm", type=_number(0), default=1.0, help="largest norm of the gradient (0: any)")
    add("--precision", choices=("fp32", "amp", "bf16", "fp16"), default="fp32", help="amp: float16 on a GPU, bfloat16 "
        "on a CPU")  # fmt: skip
    add("--gradient_checkpointing", **switch, help="keep only what stands between the visual blocks for backward")
    add("--compile", **switch, help="torch.compile the towers")
    add("--fsdp", **switch, help="shard the model over the processes (torchrun)")
    add("--n_display", type=_at_least(1), default=50, help="steps between two lines of the log")
    add("--save_steps", type=_at_least(0), default=200, help="steps between two checkpoints (0: at epochs alone)")

    add = p.add_argument_group("evaluation").add_argument
    add("--batch_size_val", type=_at_least(1))
    add("--qb_norm", nargs="?", const=2000, default=0, type=_at_least(0), metavar="N",
        help="also with QB-Norm, by a bank of N training captions and videos")  # fmt: skip
    add("--camoe_dsl", "--dsl", dest="camoe_dsl", **switch, help="also with the dual softmax of CAMoE")

    for name, why in ignored.SWITCHES.items():
        p.add_argument(f"--{name}", nargs=0, action=_Ignored, dest="notes", help=argparse.SUPPRESS, help_text=why)
    for name, why in ignored.VALUED.items():
        p.add_argument(f"--{name}", action=_Ignored, dest="notes", help=argparse.SUPPRESS, help_text=why)
    p.set_defaults(notes=[])
    return p


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
    if args.resume and not args.do_train:
        raise UsageError("--resume goes on with a training; to evaluate a checkpoint give --do_eval --init_model FILE")
    if args.resume and args.resume != "auto" and args.init_model:
        raise UsageError("--resume FILE and --init_model both say where the weights come from; give one of them")
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
    if args.tome_trace_source:
        args.notes.append(
            "--tome_trace_source keeps the last batch's trace for stk.tome_trace, and nothing here draws it"
        )
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
    if run is not None:
        run = checked(run, path)
        elsewhere = {"datatype"} if data and run.get("datatype") == "synthetic" else set()  # other videos are wanted
        names = {*OF_THE_MODEL, *_DATA} & {*run} - {*args.given} - elsewhere
        for name in (*names, *(() if merging else _MERGING)):
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
        elif name not in FREE_TO_CHANGE and getattr(args, name) != value:
            raise UsageError(
                f"--{name} is {getattr(args, name)}, but {path} was trained with {value}: leave it out to go on, or "
                "begin another run by --init_model"
            )
    return run


def checked(run: Any, path: str) -> dict[str, Any]:
    """The settings in a file, each of which is one that its flag could have given; lists become tuples.

    They must be those of ``settings``, no more (a setting this program doesn't know may be why the weights are as
    they are) and no less, but for those that may change when a run goes on: of older files they may be missing.

    Raises:
        UsageError: they are something else; one line that names the file and the setting.
    """
    way_out = "it is damaged or of another version; give its weights by --init_model, with all settings as flags"
    if not isinstance(run, dict):
        raise UsageError(f"the settings in {path} are no object but a {type(run).__name__}; {way_out}")
    flags = {action.dest: action for action in parser()._actions if action.dest not in ("help", "notes")}
    found = {}
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
    missing = sorted({*flags, "world"} - {*run, *FREE_TO_CHANGE})
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
    skip = ("notes", "given", "tome", "hparams")
    return {k: list(v) if isinstance(v, tuple) else v for k, v in sorted(vars(args).items()) if k not in skip}
