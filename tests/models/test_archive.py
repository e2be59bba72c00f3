# SPDX-License-Identifier: Apache-2.0
"""Files of weights: read as torch reads them, and refused by name where they are damaged."""

import random
import re

import pytest
import torch
from stoptome_kernels.stop import StopModel, archive, checkpoint

from support import damage
from support.archives import Tied, same, saved, scripted
from support.fuzz import rounds


def test_tensors_of_torchscript_are_those_that_torch_reads(tmp_path):
    module = Tied()
    module.train(False)
    found = archive.load(scripted(tmp_path / "clip.pt", module))
    assert same(found, module.state_dict())
    assert checkpoint.read_state_dict(tmp_path / "clip.pt").keys() == {*module.state_dict()}


@pytest.mark.parametrize("mmap", [False, True])
def test_files_of_torch_save(tmp_path, mmap):
    want = Tied().state_dict()
    assert same(archive.load(saved(tmp_path / "a.pt", want), mmap=mmap), want)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        saved(tmp_path / "b.pt", want)
    finally:
        torch.serialization.set_crc32_options(before)
    assert same(archive.load(tmp_path / "b.pt", mmap=mmap), want)
    assert same(archive.load(saved(tmp_path / "c.pt", want, _use_new_zipfile_serialization=False)), want)


@pytest.mark.parametrize("mmap", [False, True])
def test_each_memory_is_storage_of_its_own(tmp_path, mmap):
    """Saving one tensor of a file again saves no others; tensors that share memory in it still share it."""
    base = torch.arange(64.0)
    found = archive.load(saved(tmp_path / "a.pt", {"a": base[:4], "b": base[2:], "c": torch.ones(5)}), mmap=mmap)
    assert found["a"].untyped_storage().nbytes() == 256
    assert found["c"].untyped_storage().nbytes() == 20
    found["a"][3] = 9
    assert found["b"][1] == 9
    assert torch.load(tmp_path / "a.pt")["a"][3] == 3  # the file stays as it is
    torch.save(found, tmp_path / "b.pt")
    assert same(archive.load(tmp_path / "b.pt"), found)
    assert same(torch.load(tmp_path / "b.pt"), found)


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "mmap"),
    [
        ("torch.save", False),
        ("torch.save", True),
        pytest.param("TorchScript", False, marks=pytest.mark.slow),
    ],
)
def test_one_wrong_bit(tmp_path, kind, mmap):
    """Every third byte: the file is refused by name, or the weights are the same."""
    path = tmp_path / "a.pt"
    scripted(path, Tied()) if kind == "TorchScript" else saved(path)
    want, data, draw = archive.load(path), path.read_bytes(), random.Random(1)
    refused = []
    for at in range(draw.randrange(3), len(data), 3):
        damaged = bytearray(data)
        damaged[at] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            assert same(archive.load(path, mmap=mmap), want), at
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > len(data) / 20  # most of so small a file is names, paddings and code
    assert [line for line in refused if not line.startswith(f"{path} can't be read as weights (") or "\n" in line] == []


@pytest.mark.parametrize("kind", ["torch.save", "TorchScript", "legacy"])
def test_fuzz_damaged_weights(tmp_path, kind):
    """Blocks lost, doubled and cut off too. Files of before torch 1.6 have no checksums: there, no other exception."""
    path = tmp_path / "a.pt"
    if kind == "TorchScript":
        scripted(path, Tied())
    else:
        saved(path, _use_new_zipfile_serialization=kind != "legacy")
    want, whole = archive.load(path), path.read_bytes()
    refused = total = 0
    for seed in range(rounds(1)):
        for copy in damage.every(whole, 40, seed):
            path.write_bytes(copy.data)
            total += 1
            try:
                found = archive.load(path)
            except ValueError as error:
                refused += 1
                found = want if str(error).startswith(f"{path} can't be read as weights (") else error
            assert kind == "legacy" or same(found, want), copy.what
    assert refused > total / 2


@pytest.mark.parametrize("legacy", [False, True])
def test_files_that_end_too_early(tmp_path, legacy):
    path = saved(tmp_path / "whole.pt", _use_new_zipfile_serialization=not legacy)
    data = path.read_bytes()
    for length in range(0, len(data) - 1, 37):
        path = tmp_path / "cut.pt"
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))} can't be read as weights"):
            archive.load(path)


@pytest.mark.parametrize(
    "data", [b"", b"text\n", b"PK\3\4", b"\x80\2}.", b"\x80\2K\5.", b"(lp0\n.", b"PK\5\6" + 18 * b"\0"]
)
def test_other_files(tmp_path, data):
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / 'a.pt'))} "):
        checkpoint.read_state_dict(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))} can't be read as weights"):
        checkpoint.read_state_dict(tmp_path)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (
            b"\xef\xbb\xbf\n <!DOCTYPE html>\n<title>Anmelden \xc3\xbc",
            "it is an HTML page, .* download the file of weights",
        ),
        (b"<html> " + b"\xc3\xa4" * 2000, "it is an HTML page"),  # a letter lies across the last byte that is looked at
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
            "it is git-lfs's pointer .* by git lfs pull",
        ),
        (b'{"error":\t"not found"}\n', r"""it is a text file, no weights: it begins '{"error": "not found"}'"""),
        (b"<html>\0", "byte b'<' at 0 is not an opcode"),
    ],
)
def test_text_in_place_of_weights(tmp_path, data, says):
    """A web page or a pointer in place of weights is named, never with torch's advice to load it all the same."""
    path = tmp_path / "ViT-B-32.pt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} can't be read as weights [(]{says}") as caught:
        StopModel.from_checkpoint(path)
    assert "weights_only" not in str(caught.value)
    assert str(caught.value).isprintable()
