#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measure vision transformers of timm, open_clip and transformers with token merging: images a second, and the share
of the ideal speed-up.

Each model with random weights, as it is and with a constant r, against merging in eager operations put into the same
model; all of them plain and under torch.compile. Results are compared before anything is timed; a wrong one ends the
run with status 1. Without arguments: on the GPU if there is one, else on the CPU with smaller batches, in about half an
hour; --quick: in two minutes. A library that is not installed is said and left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import stoptome_kernels as stk
import torch
from stoptome_kernels.tome.schedule import plan_layers
from torch import Tensor, nn

from charts.models import table
from harness import cli, measure
from harness.baselines import vit as eager_vit
from harness.rows import environment, rows_file, write_rows
from harness.verify import WrongResult

IMPLS = ("unpatched", "package", "eager")
MODES = ("plain", "compiled")
DIRECTIONS = ("inference", "training")


@dataclass(frozen=True)
class Model:
    """A model that is measured.

    Attributes:
        library: what it is from.
        make: ``make(layers)``.
        answer: what of its result is compared and trained.
        blocks: its blocks, first to last.
        parts: what they are made of.
        shape: of one input.
        tokens, protected, width: of its tower.
        r: tokens merged in each layer.
        batch: on a CPU, and on a GPU.
        mean: its head averages over all tokens.
    """

    library: str
    make: Callable[[int], nn.Module]
    answer: Callable[[Any], Tensor]
    blocks: Callable[[Any], list]
    parts: eager_vit.Parts
    shape: tuple[int, ...]
    tokens: int
    protected: int
    width: int
    r: int
    batch: tuple[int, int]
    mean: bool = False


def _timm(name: str) -> Callable[[int], nn.Module]:
    def make(layers: int) -> nn.Module:
        import timm

        return timm.create_model(name, depth=layers)

    return make


def _open_clip(layers: int) -> nn.Module:
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(224, 32, 768, layers, 12, 4.0, output_dim=512)


def _clip(layers: int) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=layers, patch_size=32
        )
    )


def _videomae(layers: int) -> nn.Module:
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    return VideoMAEForVideoClassification(VideoMAEConfig(num_hidden_layers=layers, num_labels=400))


_IMAGE = (3, 224, 224)
MODELS = {
    "ViT-S/16": Model(
        "timm", _timm("vit_small_patch16_224"), lambda y: y, lambda m: list(m.blocks), eager_vit.TIMM, _IMAGE,
        197, 1, 384, 13, (16, 256),
    ),
    "ViT-B/16": Model(
        "timm", _timm("vit_base_patch16_224"), lambda y: y, lambda m: list(m.blocks), eager_vit.TIMM, _IMAGE,
        197, 1, 768, 13, (16, 256),
    ),
    "CLIP ViT-B/32 (open_clip)": Model(
        "open_clip", _open_clip, lambda y: y, lambda m: list(m.transformer.resblocks), eager_vit.OPEN_CLIP, _IMAGE,
        50, 1, 768, 4, (16, 512),
    ),
    "CLIP ViT-B/32 (transformers)": Model(
        "transformers", _clip, lambda y: y.image_embeds, lambda m: list(m.vision_model.encoder.layers),
        eager_vit.CLIP, _IMAGE, 50, 1, 768, 4, (16, 512),
    ),
    "VideoMAE-B": Model(
        "transformers", _videomae, lambda y: y.logits, lambda m: list(m.videomae.encoder.layer), eager_vit.VIDEOMAE,
        (16, *_IMAGE), 1568, 0, 768, 65, (1, 16), mean=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Side:
    """One implementation of a model, plain or compiled."""

    impl: str
    mode: str
    call: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]

    @property
    def name(self) -> str:
        return f"{self.impl} {self.mode}"

    def train(self) -> object:
        return torch.autograd.grad(self.call().float().square().sum(), self.leaves, allow_unused=True)

    def infer(self) -> Tensor:
        with torch.no_grad():
            return self.call()


def random_weights(built: nn.Module) -> dict[str, Tensor]:
    """Weights with which every token matters: libraries start with such small ones that blocks hardly change a token,
    and a result could not tell right merging from wrong."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel() if len(parameter) > 1 else 1
                parameter.normal_(0, fan_in**-0.5)
    return built.state_dict()


def batch_of(model: Model, args: argparse.Namespace) -> int:
    return args.batch or (1 if args.dry else model.batch[args.device == "cuda"])


def sides(model: Model, args: argparse.Namespace) -> list[Side]:
    """Every implementation of a model, with the same weights and inputs."""
    weights = random_weights(model.make(args.layers))
    x = torch.randn(batch_of(model, args), *model.shape, device=args.device)
    found = []
    for impl in args.impls:
        built = model.make(args.layers).to(args.device).eval()
        built.load_state_dict(weights)
        if impl == "package":
            stk.apply_tome_patch(built, model.r)
        if impl == "eager":
            eager_vit.merge_eagerly(model.blocks(built), model.parts, model.r, model.protected, model.mean)
        for mode in args.modes:
            run = built if mode == "plain" else torch.compile(built, dynamic=False)

            def call(run=run) -> Tensor:
                with torch.autocast(args.device, torch.bfloat16) if args.dtype == "bfloat16" else nullcontext():
                    return model.answer(run(x))

            found.append(Side(impl, mode, call, tuple(built.parameters())))
    return found


def check(found: list[Side], dtype: str) -> None:
    """Implementations of merging agree, up to pairs of tokens that are equally similar to rounding; so do a model and
    its compiled form."""
    least = 0.999 if dtype == "float32" else 0.98
    first: dict[bool, Tensor] = {}
    for side in found:
        got = side.infer().float()
        right = first.setdefault(side.impl == "unpatched", got)
        cosine = torch.cosine_similarity(got, right, dim=-1).min().item()
        if not (got.isfinite().all() and cosine >= least):
            raise WrongResult(f"{side.name}: the cosine of a row with the others' is {cosine:.6f}")


def rows_of(name: str, model: Model, found: list[Side], direction: str, args: argparse.Namespace) -> list[dict]:
    calls = {side.name: [side.train if direction == "training" else side.infer] for side in found}
    times = measure.measure(calls, args.device, args.seconds, set())
    middle = {which: measure.percentile(t["samples"], 0.5) for which, t in times.items()}
    schedule = plan_layers(model.r, args.layers, model.tokens, 1, model.protected, width=model.width)
    n = batch_of(model, args)
    # every pixel meets every channel once in the patch embedding, of which merging saves nothing
    embedding = 2 * math.prod(model.shape) * model.width
    whole = (schedule.flops_unmerged + embedding) / (schedule.flops + embedding)
    rows = []
    for side in found:
        t, merges, samples = middle[side.name], side.impl != "unpatched", times[side.name]["samples"]
        gain = middle[f"unpatched {side.mode}"] / t
        ideal, blocks = (whole, schedule.speedup) if merges else (1.0, 1.0)
        rows.append(
            {
                **{"shape": name, "library": model.library, "n": n, "op": side.mode, "direction": direction},
                **{"dtype": args.dtype, "impl": side.impl, "layers": args.layers, "r": model.r if merges else 0},
                **{"tokens": model.tokens, "tokens_out": schedule.tokens[-1] if merges else model.tokens},
                **{f"p{k}_us": round(measure.percentile(samples, k / 100), 1) for k in (20, 50, 80)},
                "runs": len(samples),
                "images_per_s": round(n / t * 1e6, 3),
                "speedup": round(gain, 4),
                "speedup_ideal": round(ideal, 4),
                "speedup_ideal_blocks": round(blocks, 4),
                "eta": round(gain / ideal, 4),
            }
        )
    return rows


def installed(library: str) -> bool:
    """Return whether a library can be imported here."""
    if importlib.util.find_spec(library) is None:
        return False
    from harness import libraries  # noqa: F401

    __import__(library)
    return True


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    cli.add_options(p)
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME", help=", ".join(MODELS))
    add("--impls", nargs="+", choices=IMPLS, default=list(IMPLS), help="unpatched is always measured")
    add("--modes", nargs="+", choices=MODES, default=list(MODES))
    add("--direction", nargs="+", choices=DIRECTIONS, default=["inference"])
    add("--batch", type=cli.positive(int), metavar="N", help="images (default: by model)")
    add("--layers", type=cli.positive(int), default=12, metavar="N", help="blocks (default: 12)")
    add("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 (autocast) on a GPU, float32 on a CPU")
    add(
        "--seconds",
        type=cli.positive(float),
        default=60.0,
        metavar="S",
        help="for each model and direction (default: 60)",
    )
    add("--quick", action="store_true", help="ViT-S/16 alone, plain, four layers")
    args = p.parse_args(argv)
    cli.settle(args)
    if args.quick:
        args.models, args.modes, args.layers, args.seconds = ["ViT-S/16"], ["plain"], 4, min(args.seconds, 10.0)
    args.impls = [impl for impl in IMPLS if impl in {"unpatched", *args.impls}]
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    where = environment(args.device, args.commit) | {"pages": args.pages}
    try:
        file = rows_file(args.json, where)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{where['device']}, {where['threads']} threads, torch {where['torch']}, {args.layers} layers, {args.dtype}")
    rows: list[dict] = []
    status = 0
    try:
        for name in args.models:
            model = MODELS[name]
            if not installed(model.library):
                print(f"{name}: {model.library} is not installed, left out")
                continue
            torch._dynamo.reset()
            found = sides(model, args)
            check(found, args.dtype)
            for direction in args.direction:
                new = [where | row for row in rows_of(name, model, found, direction, args)]
                rows += new
                print(table(new), flush=True)
                if file:
                    write_rows(file, rows)
            del found
    except WrongResult as error:
        print(f"error: wrong result, nothing more is timed: {name}: {error}", file=sys.stderr)
        status = 1
    except torch.OutOfMemoryError:
        print(f"error: not enough GPU memory for {name}: use a smaller --batch", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        status = 130
    if not rows and not status:
        print("error: nothing was measured: pip install timm open_clip_torch transformers", file=sys.stderr)
        status = 2
    if file and rows:
        print(f"rows: {file}")
    return status


if __name__ == "__main__":
    sys.exit(main())
