# SPDX-License-Identifier: Apache-2.0
"""Files of weights for tests: as torch writes them, and with other contents."""

import os
import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from stoptome_kernels.stop import archive
from torch import Tensor, nn


class Tied(nn.Module):
    """A module with all that CLIP's archives hold (two precisions, numbers as buffers, lists), and a tied weight."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3, 2).half(), nn.LayerNorm(3)])
        self.twin = nn.Linear(3, 2).half()
        self.twin.weight = self.blocks[0].weight
        self.register_buffer("input_resolution", torch.tensor(224))
        self.register_buffer("turned", torch.randn(4, 6, dtype=torch.bfloat16)[1:, ::2].t())
        self.register_buffer("none", torch.zeros(0, 5, dtype=torch.bool))
        self.heads, self.scales = 8, [0.5, 2.0]

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x)


def scripted(path: Path, module: nn.Module) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated; OpenAI's files are such ones
        torch.jit.script(module).save(os.fspath(path))
    return path


def saved(path: Path, value=None, **options) -> Path:
    torch.save(Tied().state_dict() if value is None else value, path, **options)
    return path


def same(found: dict, want: dict) -> bool:
    return found.keys() == want.keys() and all(
        found[name].dtype == want[name].dtype and torch.equal(found[name], want[name]) for name in want
    )


def repacked(path: Path, **records: bytes) -> None:
    """Other contents for some records of an archive, with the checksums that go with them."""
    with zipfile.ZipFile(path) as old:
        contents = {record.filename: old.read(record) for record in old.infolist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in contents.items():
            new.writestr(name, records.get(Path(name).stem, data))


def crafted(path: Path, kind: str, data: bytes) -> Path:
    """A file of this kind whose values are this pickle."""
    if kind == "legacy":
        path.write_bytes(b"".join(pickle.dumps(value, 2) for value in (archive._LEGACY, 1001, {})) + data)
    else:
        scripted(path, Tied()) if kind == "TorchScript" else saved(path)
        repacked(path, data=data)
    return path
