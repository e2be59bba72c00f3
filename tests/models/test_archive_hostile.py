# SPDX-License-Identifier: Apache-2.0
"""Weights from strangers: whatever is in a file, nothing of it is run, and what it asks for too much is refused."""

import copyreg
import io
import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from stoptome_kernels.stop import StopConfig, StopModel, archive, checkpoint
from torch import Tensor, nn

from support.archives import Tied, crafted, repacked, same, saved, scripted

# -- what would run ---------------------------------------------------------------------------------------------------


class Overwrites(nn.Module):
    """Torch runs its ``__setstate__`` when it loads it."""

    def __init__(self, victim: str):
        super().__init__()
        self.weight = torch.ones(2)
        self.victim = victim

    def forward(self, x: Tensor) -> Tensor:
        return x

    @torch.jit.export
    def __getstate__(self):
        return self.weight, self.victim, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, str, bool]):
        victim = torch.from_file(state[1], shared=True, size=4, dtype=torch.uint8).fill_(7)
        self.weight = state[0] * victim[0]  # else the compiler would leave the file alone
        self.victim, self.training = state[1], state[2]


def test_torchscript_is_not_run(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    path = scripted(tmp_path / "hostile.pt", Overwrites(os.fspath(victim)))
    victim.write_bytes(b"mine")
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} holds no weights"):
        checkpoint.read_state_dict(path)
    assert victim.read_bytes() == b"mine"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.load(os.fspath(path))
    assert victim.read_bytes() == b"\7\7\7\7"  # the file is as hostile as it should be


def touches(path: Path) -> dict[str, bytes]:
    """Pickles by what they do; each creates the file if it is loaded without restraint."""
    name = os.fspath(path).encode()
    text = b"X" + len(name).to_bytes(4, "little") + name  # BINUNICODE
    mode = b"X\1\0\0\0w"

    class Reduced:
        def __reduce__(self):
            return open, (os.fspath(path), "w")

    return {
        "REDUCE": b"cio\nopen\n(" + text + mode + b"tR.",
        "REDUCE in a dictionary": pickle.dumps({"weight": torch.ones(1), "x": Reduced()}, 2),
        "STACK_GLOBAL": b"\x80\4" + b"\x8c\2io\x8c\4open\x93(" + text + mode + b"tR.",
        "INST": b"(" + text + mode + b"iio\nopen\n.",
        "OBJ": b"(cio\nopen\n" + text + mode + b"o.",
        "NEWOBJ": b"\x80\2cio\nFileIO\n(" + text + mode + b"t\x81.",
        "NEWOBJ_EX": b"\x80\4cio\nFileIO\n(" + text + mode + b"t}\x92.",
        "dotted": b"\x80\4" + b"\x8c\6torch.\x94\x8c\4open\x93(" + text + mode + b"tR.",
        "EXT1": b"\x80\2\x82\xf0(" + text + mode + b"tR.",
        "setattr": b"cbuiltins\nsetattr\n(c__main__\nX\n" + text + mode + b"tR.",
        "of an allowed function": b"ctorch._utils\n_rebuild_tensor_v2\n}" + text + mode + b"sb.",
        "of an object": b"\x80\2c__torch__\nM\n)\x81}X\x0c\0\0\0__setstate__cio\nopen\nsb" + text + b"b.",
    }


@pytest.fixture
def extension():
    """An extension code of pickle for ``open``, as any library of the process may have one; used once, it is cached."""
    copyreg.add_extension("io", "open", 0xF0)
    pickle.loads(b"\x80\2\x82\xf0.")
    yield
    copyreg.remove_extension("io", "open", 0xF0)


@pytest.mark.parametrize("kind", ["legacy", "torch.save", "TorchScript"])
@pytest.mark.parametrize("trick", touches(Path("none")))
def test_pickles_that_ask_for_functions(tmp_path, extension, trick, kind):
    made = tmp_path / "made"
    path = crafted(tmp_path / "hostile.pt", kind, touches(made)[trick])
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} "):
        checkpoint.read_state_dict(path)
    assert not made.exists()


# -- files that ask for too much --------------------------------------------------------------------------------------


NESTED = b")" + b"\x85" * 200_000  # tuples in each other: as a key they end the process, where they are hashed


@pytest.mark.parametrize("data", [b"\x80\2}" + NESTED + b"K\1s.", b"\x80\2}(" + NESTED + b"K\1u.", NESTED + b"."])
@pytest.mark.parametrize("kind", ["legacy", "torch.save", "TorchScript"])
def test_values_deep_in_each_other(tmp_path, kind, data):
    path = crafted(tmp_path / "a.pt", kind, data)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} "):
        checkpoint.read_state_dict(path)


@pytest.mark.parametrize("kind", ["legacy", "torch.save", "TorchScript"])
@pytest.mark.parametrize("key", [False, True])
def test_values_that_refer_to_themselves_over_and_over(tmp_path, kind, key):
    """Sixty pairs of the pair before: a few hundred bytes that nobody ends walking through."""
    pairs = b")" + b"q\1h\1\x86" * 60
    data = b"\x80\2}X\1\0\0\0a" + pairs + b"s." if not key else b"\x80\2}" + pairs + b"K\1s."
    path = crafted(tmp_path / "a.pt", kind, data)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} "):
        checkpoint.read_state_dict(path)


def test_one_parser_sees_a_file(tmp_path):
    """Nothing is read from after the zip archive, before it, or under a name in capitals, where others look."""
    whole = saved(tmp_path / "a.pt", {"a": torch.ones(1)}).read_bytes()
    other = saved(tmp_path / "b.pt", {"a": torch.zeros(1)}, _use_new_zipfile_serialization=False).read_bytes()
    (tmp_path / "c.pt").write_bytes(other + whole)  # begins as a file of old, ends as an archive
    assert torch.equal(archive.load(tmp_path / "c.pt")["a"], torch.zeros(1))
    saved(tmp_path / "d.pt", {"a": torch.ones(1)})
    with zipfile.ZipFile(tmp_path / "d.pt", "a") as file:
        file.writestr("d/DATA.PKL", touches(tmp_path / "made")["REDUCE"])
    assert torch.equal(archive.load(tmp_path / "d.pt")["a"], torch.ones(1))
    with zipfile.ZipFile(tmp_path / "d.pt", "a") as file:
        file.writestr("e/data.pkl", b"N.")
    with pytest.raises(ValueError, match=r"it has 2 files data\.pkl, need 1"):
        archive.load(tmp_path / "d.pt")
    assert not (tmp_path / "made").exists()


def test_memory_under_a_name_of_code_is_compared_too(tmp_path):
    path = saved(tmp_path / "a.pt", {"a": torch.arange(4.0)})
    with zipfile.ZipFile(path) as old:
        contents = {record.filename: old.read(record) for record in old.infolist()}
    contents["a/data.pkl"] = contents["a/data.pkl"].replace(b"X\1\0\0\x000", b"X\6\0\0\0code/0")
    contents["a/data/code/0"] = contents.pop("a/data/0")
    for method, says in ((zipfile.ZIP_STORED, "Bad CRC-32"), (zipfile.ZIP_DEFLATED, "compressed")):
        with zipfile.ZipFile(path, "w") as new:
            for name, data in contents.items():
                new.writestr(name, data, method if name == "a/data/code/0" else zipfile.ZIP_STORED)
        if method == zipfile.ZIP_STORED:
            assert torch.equal(archive.load(path)["a"], torch.arange(4.0))
            data = path.read_bytes()
            path.write_bytes(data.replace(contents["a/data/code/0"], bytes(16)))
        with pytest.raises(ValueError, match=says):
            archive.load(path)


def test_modules_of_endless_names(tmp_path):
    """One name of a megabyte, in three hundred objects around each other."""
    path = scripted(tmp_path / "a.pt", Tied())
    name = b"X" + (1 << 20).to_bytes(4, "little") + b"a" * (1 << 20)
    inner = b"c__torch__\nM\n)\x81}h\1"
    repacked(path, data=b"\x80\2" + name + b"q\0010" + inner * 300 + b"K\1" + b"sb" * 300 + b".")
    with pytest.raises(ValueError, match="a module in it has an invalid name"):
        archive.load(path)


def test_attributes_of_what_is_saved_change_nothing(tmp_path):
    state = torch.nn.Linear(2, 2).state_dict()
    state.get = state.values = 5
    assert same(checkpoint.read_state_dict(saved(tmp_path / "a.pt", state)), dict(state.items()))
    weight = torch.ones(2)
    weight.numel = 5
    with pytest.raises(ValueError, match=r"it contains torch\._tensor\._rebuild_from_type_v2, which is not allowed"):
        checkpoint.read_state_dict(saved(tmp_path / "b.pt", {"a": weight}))


def test_messages_are_one_line_that_no_terminal_obeys(tmp_path):
    state = {"visual.conv1.weight": torch.ones(2), "a\n\x1b[2J": torch.ones(1)}
    for value in (state, {"a\n\x1b]0;x": torch.ones(2).to_sparse()}, {b"\x1b": torch.ones(1)}):
        path = saved(tmp_path / "a.pt", value)
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}") as caught:
            StopModel.from_checkpoint(path)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "change",
    [
        {"visual.conv1.weight": torch.ones(())}, {"ln_final.weight": torch.ones(1)},
        {"visual.positional_embedding": torch.ones(1, 64)}, {"visual.conv1.weight": torch.ones(0, 3, 8, 8)},
        {"text_projection": torch.ones(64)}, {"visual.conv1.weight": torch.ones(64, 3, 8, 8, dtype=torch.int8)},
        {"visual.conv1.weight": torch.ones(64, 3, 8, 8, dtype=torch.complex64)},
        {"unified_prompt_embedding.weight": torch.ones(7, 128)},
        {"unified_prompt_embedding.weight": torch.ones(24, 1)},
    ],
)  # fmt: skip
def test_weights_of_other_shapes_name_the_file(tmp_path, change):
    sizes = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "embed_dim": 32, "text_width": 64,
             "text_heads": 1, "text_layers": 2, "vocab_size": 60, "frames": 4}  # fmt: skip
    state = StopModel(StopConfig(**sizes, temporal_prompt="DGL")).state_dict()
    path = saved(tmp_path / "a.pt", dict(state) | change)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: "):
        StopModel.from_checkpoint(path)


def rebuilt(offset: int, size: tuple, stride: tuple, key: object = "0", dtype: str = "Float") -> bytes:
    """The pickle of a module of TorchScript with one tensor that says this of itself."""
    out = io.BytesIO()

    def put(value):
        out.write(pickle.dumps(value, 2)[2:-1])

    out.write(b"\x80\2c__torch__\nM\n)\x81}")
    put("weight")
    out.write(b"ctorch._utils\n_rebuild_tensor_v2\n((")
    put("storage")
    out.write(f"ctorch\n{dtype}Storage\n".encode())
    for value in (key, "cpu", 5):
        put(value)
    out.write(b"tQ")
    for value in (offset, size, stride, False):
        put(value)
    out.write(b"ccollections\nOrderedDict\n)RtRsb.")
    return out.getvalue()


def test_a_tensor_within_its_data(tmp_path):
    path = scripted(tmp_path / "a.pt", nn.Linear(3, 2))
    weight = archive.load(path)["weight"]
    repacked(path, data=rebuilt(1, (2, 2), (2, 1)))
    assert torch.equal(archive.load(path)["weight"], weight.flatten()[1:5].view(2, 2))


@pytest.mark.parametrize(
    "said",
    [
        (3, (2, 2), (2, 1)), (-1, (2,), (1,)), (0, (2, -1), (1, 1)), (0, (3,), (-1,)), (0, (2,), (1, 1)),
        (0, (1 << 40,), (0,)), (0, (7,), (1,)), (7, (1,), (1,)), (0, ("2",), (1,)), (0, (True,), (1,)),
        (0, (2,), (1,), "9"), (0, (2,), (1,), 0), (0, (2,), (1,), "../data.pkl"), (0, (2,), (1,), "0", "Untyped"),
        (0, (2,), (1,), "0", "Quantized"),
    ],
)  # fmt: skip
def test_tensors_that_reach_out_of_their_data(tmp_path, said):
    path = scripted(tmp_path / "a.pt", nn.Linear(3, 2))
    repacked(path, data=rebuilt(*said))
    with pytest.raises(ValueError, match="can't be read as weights"):
        archive.load(path)


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({0: torch.ones(2)}, "holds no state_dict: a key is 0, not a string"),
        ({"a": torch.ones(1).expand(1 << 40)}, r"can't be read as weights \(a tensor is longer than its data"),
        ({"a": torch.ones(2).to_sparse()}, r"can't be read .*it contains torch._utils._rebuild_sparse_tensor"),
        ({"a": torch.ones(2, device="meta")}, r"can't be read .*it contains torch._utils._rebuild_meta_tensor"),
        ([torch.ones(2)], "holds no weights, but a list"),
        ({"state_dict": {}}, "holds no weights"),
    ],
)
def test_tensors_that_are_no_weights(tmp_path, state, says):
    path = saved(tmp_path / "a.pt", state)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} {says}"):
        checkpoint.read_state_dict(path)


def test_compressed_and_overlapping_records(tmp_path):
    """Neither is what torch writes: a few bytes could stand for gigabytes."""
    path = saved(tmp_path / "a.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    with pytest.raises(ValueError, match="its records are compressed"):
        archive.load(tmp_path / "b.pt")
    data = path.read_bytes()
    first = data.index(b"PK\1\2")
    (tmp_path / "c.pt").write_bytes(data.replace(data[first + 20 : first + 28], 2 * (1 << 20).to_bytes(4, "little")))
    with pytest.raises(ValueError, match="can't be read as weights"):
        archive.load(tmp_path / "c.pt")
