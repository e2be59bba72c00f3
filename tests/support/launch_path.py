# SPDX-License-Identifier: Apache-2.0
"""Answers to what test_launches.py asks of Triton's launch path, as JSON on stdout: a process of its own, since
the tests' has Triton's interpreter. ``python tests/support/launch_path.py`` with bench/ on PYTHONPATH."""

import json
import os
import sys

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import stoptome_kernels as stk
import torch
from stoptome_kernels.stop import StopConfig, StopModel
from stoptome_kernels.tome.schedule import plan_layers
from stoptome_kernels.video.blocks import VideoTokens, run_block

import launches
from harness import no_gpu

VIDEO, IMAGE = (12, 54, 5, 2), (2, 197, 1, 13)  # items, tokens, protected, r


def of_ops(gpu: no_gpu.Gpu, items: int, tokens: int, protected: int, r: int) -> dict[str, dict]:
    """Return what each public op launches, compiles and asks of torch; keys, rows and prefix as a block has them."""
    packed, prefix = (torch.randn(items, n, 3, 12, 64).bfloat16().requires_grad_() for n in (tokens, 4))
    (q, k, v), (_, ahead_k, ahead_v) = ((part.transpose(1, 2) for part in t.unbind(2)) for t in (packed, prefix))
    x, residual = (torch.randn(items, tokens, 768, requires_grad=True) for _ in range(2))
    weight, bias = torch.ones(768, requires_grad=True), torch.zeros(768, requires_grad=True)
    size = torch.ones(items, tokens)
    plan = stk.match(k, r, protected, "reference")
    merged = torch.randn(items, plan.tokens_out, 768, requires_grad=True)
    ops = {
        "match": lambda: stk.match(k, r, protected),
        "merge": lambda: stk.merge(x, plan, size)[0],
        "unmerge": lambda: stk.unmerge(merged, plan),
        "merge_norm": lambda: stk.merge_norm(x, residual.bfloat16(), plan, size, weight, bias)[:2],
        "attention": lambda: stk.attention(q, k, v, size, ahead_k, ahead_v),
    }
    found = {}
    for name, run in ops.items():
        gpu.clear()
        out = run()
        found[name] = seen(gpu)
        if name == "match":
            continue
        out = out if isinstance(out, tuple) else (out,)
        gpu.clear()
        torch.autograd.grad(out, [packed, prefix, x, residual, weight, bias, merged],
                            [torch.ones_like(y) for y in out], allow_unused=True)  # fmt: skip
        found[f"{name}, gradient"] = seen(gpu)
    return found


def of_block(gpu: no_gpu.Gpu, model: StopModel, videos: int, tokens: int, r: int) -> dict[str, dict]:
    """Return what a STOP block in the middle of the stack launches and compiles, forward and for its gradient."""
    block, frames = model.visual.transformer.resblocks[0], model.config.frames
    step = plan_layers(r, 1, tokens + 4, frames, 5, width=768).steps[0]
    x = torch.randn(videos * frames, tokens, 768, requires_grad=True)
    shared, own = torch.randn(videos, 4, 768), torch.randn(videos, frames, 4, 768)
    gpu.clear()
    with torch.autocast("cpu", torch.bfloat16):
        stream, _ = run_block(block, VideoTokens(x, shared), step, frame_prompts=own)
    forward = seen(gpu)
    gpu.clear()
    torch.autograd.grad(stream.x.sum() + stream.prompts.sum(), [x, *block.parameters()], allow_unused=True)
    return {"forward": forward, "gradient": seen(gpu)}


def seen(gpu: no_gpu.Gpu) -> dict:
    return {
        "launches": list(gpu.launches), "compiled": list(gpu.variants), "operations": list(gpu.operations),
        "waits": list(gpu.waits),
    }  # fmt: skip


def main() -> None:
    gpu = no_gpu.install()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: dict = {"triton": launches.version_of("triton"), "ops": {}, "blocks": {}}
    for name, (items, tokens, protected, r) in {"video": VIDEO, "image": IMAGE}.items():
        gpu.forget()
        found["ops"][name] = of_ops(gpu, items, tokens, protected, r)
        found["ops"][f"{name}, more items"] = of_ops(gpu, items + 1, tokens, protected, r)
        # the same power of two above all tokens, those behind the merge, and either set; but numbers that Triton would
        # compile for on their own, multiples of 16, in front and behind; then another power of two
        found["ops"][f"{name}, fewer tokens"] = of_ops(gpu, items, tokens // 16 * 16, protected, r)
        found["ops"][f"{name}, fewer left"] = of_ops(gpu, items, (tokens - r) // 16 * 16 + r, protected, r)
        found["ops"][f"{name}, half the tokens"] = of_ops(gpu, items, tokens // 2, protected, r)
    model = StopModel(StopConfig(temporal_prompt="DGL", layers=1, prompt_layers=1, text_layers=1, vocab_size=64))
    for r in (0, 2):
        gpu.forget()
        found["blocks"][f"r={r}"] = of_block(gpu, model, 1, 50, r)
        found["blocks"][f"r={r}, two videos"] = of_block(gpu, model, 2, 50, r)
        found["blocks"][f"r={r}, fewer tokens"] = of_block(gpu, model, 1, 48, r)
    found["rows"] = launches.all_rows(gpu)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
