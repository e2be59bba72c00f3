# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of examples/stop_retrieval: a handful of videos in MSR-VTT's layout, weights, the program."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from stoptome_kernels.stop import StopConfig, StopModel

from retrieval import recipes, run, synthetic
from support import ROOT

MAIN = ROOT / "examples/stop_retrieval/main.py"
TINY = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "embed_dim": 32, "text_width": 64, "text_heads": 1,
        "text_layers": 1}  # fmt: skip
FRAMES = 4
ADDED = ("prompt", "Prompt", "LoRA", "position_ids")


def layout(folder: Path, train: int = 8, val: int = 6) -> Path:
    """Videos in MSR-VTT's file layout: MSRVTT_data.json, two CSVs, videos/*.mp4."""
    synthetic.write(folder, train=train, val=val, seed=1, **recipes.VIDEOS)
    return folder


def clip_weights(folder: Path, **sizes: int) -> Path:
    """A folder with ViT-B-32.pt: plain weights of CLIP's names, tiny but for the sizes given."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(5)
    model = StopModel(StopConfig(**TINY | sizes, temporal_prompt="DGL", lora=False))
    plain = {name: value for name, value in model.state_dict().items() if not any(a in name for a in ADDED)}
    numbers = {name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")}  # as OpenAI's
    torch.save(plain | numbers, folder / "ViT-B-32.pt")
    return folder


def msrvtt(data: Path, weights: Path, out: Path, *more: str) -> list[str]:
    """The README's command on such videos."""
    return [
        "--data_path", str(data / "MSRVTT_data.json"), "--features_path", str(data / "videos"), "--output_dir",
        str(out), "--max_words", "16", "--max_frames", str(FRAMES), "--batch_size", "4", "--epochs", "1",
        "--num_thread_reader", "0",
        "--pretrained_clip_name", "ViT-B/32", "--pretrained_dir", str(weights), "--sim_header", "meanP",
        "--temporal_prompt", "DGL", "--lr", "1e-3", *more,
    ]  # fmt: skip


def call(*argv: str, processes: int = 1, timeout: float = 240, **options) -> subprocess.CompletedProcess:
    """The program as a user starts it."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launch, str(MAIN), *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, **options)


def refused(capsys, *argv: str) -> str:
    """Return what the program says of a bad call: one line, and exit code 2."""
    assert run.main(argv) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert said[0].startswith("error: ")
    return said[0]


def results(out: Path) -> dict:
    """Return the newest evaluation."""
    return json.loads((out / "results.json").read_text())["evaluations"][-1]


def weights(out: Path, name: str = "ckpt.pth.tar") -> dict[str, torch.Tensor]:
    return torch.load(out / name, weights_only=True)["state_dict"]
