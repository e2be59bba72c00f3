# SPDX-License-Identifier: Apache-2.0
"""The flags of the command line: STOP's with STOP's meaning, and what this program adds to them."""

from __future__ import annotations

import argparse
import difflib
import re
from typing import Any, NoReturn

import stoptome_kernels as stk
from stoptome_kernels.stop.config import ACTIVATIONS, LATENT_SPACES, TEMPORAL_PROMPTS, VISUAL_OUTPUTS

from . import ignored, recipes, video
from .errors import UsageError

DATATYPES = ("msrvtt", "msvd", "didemo", "activity", "lsmdc", "vatex", "synthetic")
WEIGHTS = {"ViT-B/32": "ViT-B-32.pt", "ViT-B/16": "ViT-B-16.pt", "ViT-L/14": "ViT-L-14.pt"}  # names as OpenAI's files
TINY = "tiny"
PRESETS = ("training", "inference", "prototyping", "accuracy", "memory")

# what STOP's scripts for MSR-VTT give, where its parser's own defaults are no useful ones (max_frames 100, say)
DEFAULTS: dict[str, Any] = {
    "max_words": 32, "max_frames": 12, "batch_size": 32, "batch_size_val": 16, "epochs": 5, "lr": 1e-4, "coef_lr": 1.0,
    "wd": 0.2, "warmup_proportion": 0.1, "pretrained_clip_name": "ViT-B/32", "temporal_prompt": "DGL",
    "shared_latent_space": "transformer", "visual_output_type": "global_prompt0", "text_prompt_length": 8,
    "local_each_frame_prompt_length": 4, "global_visual_prompt_length": 4, "lora": True, "slice_framepos": 2,
    "temperature_new": 1.0, "num_thread_reader": 1, "cache_frames": False,
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and which flag was probably meant."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, 1)
            message = f"{unknown[1]} is no flag of this program" + (f"; did you mean {near[0]}?" if near else "")
        raise UsageError(f"{message} (--help lists the flags)")


class _Help(argparse.HelpFormatter):
    """Help that tells every default, of those that depend on the data both."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if text == argparse.SUPPRESS or "default: " in text:
            return text
        told = {"{}": DEFAULTS.get(action.dest, action.default), "synthetic: {}": recipes.SYNTHETIC.get(action.dest)}
        if told["{}"] == told["synthetic: {}"]:
            del told["synthetic: {}"]
        shown = [words.format(_shown(value)) for words, value in told.items() if isinstance(value, (str, int, float))]
        if shown == ["off"]:  # which a switch says by being one
            return text
        ours = shown and action.option_strings[0] != "--no-tome_prop_attn" and action.default != argparse.SUPPRESS
        return (f"{text} (default: {'; '.join(shown)})" if ours else text).replace("%", "%%")

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "PATH" if action.type is None else "N"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else f"{value}"


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


def _rates(text: str) -> int | tuple[int | str, ...]:
    """Return one r, or several and names of presets."""
    parts = text.split(",")
    for part in parts:
        if not re.fullmatch("[0-9]{1,9}", part) and (part not in PRESETS or len(parts) == 1):
            raise argparse.ArgumentTypeError(
                f"must be an integer of 0 or more, or several and presets such as 0,2,4,inference; got {text!r}"
            )
    found = tuple(dict.fromkeys(int(part) if part.isdecimal() else part for part in parts))
    return found if len(parts) > 1 else int(text)


def _switch(text: str) -> bool:
    if text.lower() not in ("0", "1", "true", "false"):
        raise argparse.ArgumentTypeError(f"must be 0 or 1, got {text!r}")
    return text.lower() in ("1", "true")


def parser() -> argparse.ArgumentParser:
    """All flags. Those without a default have one that depends on the data (see DEFAULTS and recipes.py)."""
    p = _Parser(
        description="Text-video retrieval with STOP and token merging: training, evaluation, search. With --output_dir "
        "alone: a small model on synthetic videos.",
        usage="main.py --output_dir FOLDER [flags]",
        formatter_class=_Help,
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
    add("--init_model", metavar="FILE", help="weights to begin with: STOP's or this program's checkpoint, or "
        "CLIP's, of OpenAI, open_clip or transformers")  # fmt: skip
    add("--seed", type=_at_least(0, 2**63 - 1), default=42, help="of weights, order and dropout")

    add = p.add_argument_group("data").add_argument
    add("--datatype", choices=DATATYPES, help="default: msrvtt where a path is given, else synthetic")
    add("--data_path", help="annotations: MSRVTT_data.json, or the folder of the other data sets")
    add("--features_path", help="folder of the videos")
    add("--train_csv", help="MSR-VTT: training videos (9k, 7k split); without: the JSON's own split")
    add("--val_csv", help="MSR-VTT: pairs to evaluate (1k-A); without: the JSON's own split")
    add("--expand_msrvtt_sentences", action="store_true", help="every caption is a training sample of its own")
    add("--max_words", type=_at_least(2), help="tokens of a caption; longer ones are cut")
    add("--max_frames", type=_at_least(1), help="frames of a video")
    add("--feature_framerate", type=_number(1e-3), default=1.0, help="frames a second with --slice_framepos 0 and 1")
    add("--slice_framepos", type=int, choices=(0, 1, 2), help="0: first frames, 1: last, 2: spread")
    add("--train_frame_order", type=int, choices=(0, 1, 2), default=0, help="0: ordinary, 1: reversed, 2: shuffled")
    add("--eval_frame_order", type=int, choices=(0, 1, 2), default=0, help="the same in evaluation")
    add("--num_thread_reader", type=_at_least(0), help="processes that decode videos (0: the one that trains)")
    add("--max_pixels", type=_at_least(1), default=video.MAX_PIXELS, help="of a frame; a video of larger ones is "
        "skipped before they take any memory")  # fmt: skip
    add("--cache_frames", nargs="?", const=True, type=_switch, metavar="0|1", help="keep frames of small videos in "
        "memory, three times as many as are taken; in each process that decodes")  # fmt: skip
    add("--synthetic_train", type=_at_least(1), help="synthetic: videos to train on")
    add("--synthetic_val", type=_at_least(1), help="synthetic: videos to evaluate on")
    add("--synthetic_seed", type=_at_least(0, 2**63 - 1), default=0, help="synthetic: other videos")

    add = p.add_argument_group("model").add_argument
    add("--pretrained_clip_name", choices=(*WEIGHTS, TINY), help=f"{TINY}: a small model with random weights")
    add("--pretrained_dir", default="~/models/pretrained", help="folder of CLIP's weights")
    add("--activation", choices=ACTIVATIONS, help="of CLIP's weights that don't tell it (docs/retrieval.md, Weights)")
    add("--random_weights", **switch, help="begin with random weights of the size of --pretrained_clip_name, to try "
        "whether all runs: results mean nothing")  # fmt: skip
    add("--temporal_prompt", choices=TEMPORAL_PROMPTS, help="group2-2 is STOP proper")
    add("--shared_latent_space", choices=LATENT_SPACES, help="source of the deep prompts")
    add("--visual_output_type", choices=VISUAL_OUTPUTS, help="what stands for a video")
    add("--lora", nargs="?", const=True, type=_switch, metavar="0|1", help="low-rank branch beside the MLPs")
    add("--sim_header", choices=("meanP", "seqLSTM", "seqTransf", "tightTransf"), default="meanP", help="meanP alone")
    add("--text_prompt_length", type=_at_least(0), help="prompts of a text in each layer")
    add("--local_each_frame_prompt_length", type=_at_least(1), help="prompts of a frame in each layer")
    add("--global_visual_prompt_length", type=_at_least(1), help="prompts of a video")
    add("--temperature_new", type=_number(0), help="above 1: value of logit_scale to begin with")
    add("--freeze_clip", **switch, help="train only what STOP adds to CLIP")

    stk.add_tome_args(p)
    (tome_r,) = (action for action in p._actions if action.dest == "tome_r")
    tome_r.type, tome_r.metavar = _rates, "N|A,B,…"
    tome_r.help = (
        "tokens merged per frame and layer (default: 0, off); with --do_eval several, or presets, between commas, "
        "which are compared: 0,2,4,inference"
    )
    add = p.add_argument_group("token merging: by name, compared, drawn").add_argument
    add("--tome_preset", choices=PRESETS, help="settings of token merging by name, in place of the flags above")
    add("--max_loss", type=_number(0, 100), default=1.0, metavar="POINTS", help="of several --tome_r the fastest that "
        "loses at most so many points of R@1, text to video, is recommended")  # fmt: skip
    add("--draw_trace", type=_at_least(1), metavar="N", help="with --do_eval: draw N videos and which of their patches "
        "became one token, into traces/")  # fmt: skip

    add = p.add_argument_group("training").add_argument
    add("--epochs", type=_at_least(1), help="of a finished run more of them, with --resume auto, train on")
    add("--eval_epochs", type=_at_least(1), default=1, help="epochs between two evaluations")
    add("--batch_size", type=_at_least(1), help="videos of one process in one step")
    add("--gradient_accumulation_steps", type=_at_least(1), default=1, help="parts that a batch is computed in")
    add("--lr", type=_number(0), help="of what STOP adds to CLIP")
    add("--coef_lr", type=_number(0), help="times lr: the rate of CLIP's own weights")
    add("--wd", type=_number(0), help="weight decay")
    add("--beta1", type=_number(0, 1), default=0.9, help="of AdamW")
    add("--beta2", type=_number(0, 1), default=0.98, help="of AdamW")
    add("--eps", type=_number(0), default=1e-6, help="of AdamW")
    add("--optim", choices=("AdamW", "BertAdam"), default="AdamW", help="AdamW alone")
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
    add("--batch_size_val", type=_at_least(1), help="videos encoded at once")
    add("--qb_norm", nargs="?", const=2000, default=0, type=_at_least(0), metavar="N",
        help="also with QB-Norm, by a bank of N training captions and videos (0: without; no N: 2000)")  # fmt: skip
    add("--camoe_dsl", "--dsl", dest="camoe_dsl", **switch, help="also with the dual softmax of CAMoE")

    for name, why in ignored.SWITCHES.items():
        p.add_argument(f"--{name}", nargs=0, action=_Ignored, dest="notes", help=argparse.SUPPRESS, help_text=why)
    for name, why in ignored.VALUED.items():
        p.add_argument(f"--{name}", action=_Ignored, dest="notes", help=argparse.SUPPRESS, help_text=why)
    p.set_defaults(notes=[])
    return p
