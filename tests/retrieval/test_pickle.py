# SPDX-License-Identifier: Apache-2.0
"""Pickles of captions: all plain data of all protocols is read, and nothing in a file is run, called or changed."""

import collections
import copyreg
import os
import pickle
import struct
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.annotations import plain_pickle
from retrieval.annotations.files import File
from retrieval.errors import UsageError

ATOMS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
PLAIN = st.recursive(
    ATOMS, lambda inner: st.lists(inner) | st.tuples(inner) | st.tuples(inner, inner) | st.dictionaries(ATOMS, inner),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=50)
@given(PLAIN, st.integers(3, 5))
def test_plain_data_come_out_as_they_went_in(value, protocol):
    found = plain_pickle.load(pickle.dumps(value, protocol))
    assert found == value
    assert type(found) is type(value)


@settings(max_examples=50)
@given(st.dictionaries(st.text(), st.lists(st.lists(st.text()))), st.integers(0, 2))
def test_texts_of_old_protocols(value, protocol):
    assert plain_pickle.load(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", range(6))
def test_containers_that_are_called(protocol):
    value = {
        "ordered": collections.OrderedDict(a=[1], b="x"), "default": collections.defaultdict(list, c=["y"]),
        "set": {"a", "b"}, "frozen": frozenset(["c"]), "shared": [["same"]] * 2,
    }  # fmt: skip
    assert plain_pickle.load(pickle.dumps(value, protocol)) == value


# of Python 2.7: pickle.dumps({'v\xc3\xa9': [['a', 'caf\xc3\xa9', u'\xe9']]}, 0 … 2), and an OrderedDict by protocol 2
PYTHON2 = [
    b"(dp0\nS'v\\xc3\\xa9'\np1\n(lp2\n(lp3\nS'a'\np4\naS'caf\\xc3\\xa9'\np5\naV\xe9\np6\naas.",
    b"}q\x00U\x03v\xc3\xa9q\x01]q\x02]q\x03(U\x01aq\x04U\x05caf\xc3\xa9q\x05X\x02\x00\x00\x00\xc3\xa9q\x06eas.",
    b"\x80\x02ccollections\nOrderedDict\nq\x00]q\x01]q\x02(U\x03v\xc3\xa9q\x03]q\x04]q\x05(U\x01aq\x06U\x05caf\xc3\xa9"
    b"q\x07X\x02\x00\x00\x00\xc3\xa9q\x08eaea\x85q\tRq\n.",
]


@pytest.mark.parametrize("data", PYTHON2)
def test_what_python_2_wrote(data):
    assert plain_pickle.load(data) == {"vé": [["a", "café", "é"]]}


# -- nothing is run ---------------------------------------------------------------------------------------------------


class Runs:
    def __reduce__(self):
        return os.mkdir, ("ran",)


class State:
    def __setstate__(self, state):
        os.mkdir("ran")


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


MKDIR = b"cos\nmkdir\n"
TRICKS = {
    "reduce": pickle.dumps(Runs()),
    "reduce, protocol 0": pickle.dumps(Runs(), 0),
    "a class of ours": pickle.dumps(State()),
    "GLOBAL": MKDIR + b"(S'ran'\ntR.",
    "STACK_GLOBAL": b"\x80\x04" + text("os") + text("mkdir") + b"\x93" + text("ran") + b"\x85R.",
    "INST": b"(S'ran'\nios\nmkdir\n.",
    "OBJ": b"(" + MKDIR + b"S'ran'\no.",
    "NEWOBJ": b"\x80\x02cbuiltins\nset\n)\x81.",
    "NEWOBJ_EX": b"\x80\x04cbuiltins\nset\n)}\x92.",
    "BUILD of a dictionary": b"ccollections\nOrderedDict\n)R}S'get'\nS'x'\nsb.",
    "BUILD of a class": b"cbuiltins\ndict\n}S'get'\nS'x'\nsb.",
    "BUILD with slots": b"ccollections\ndefaultdict\n(N}S'x'\nI1\nstb.",
    "PERSID": b"Pran\n.",
    "BINPERSID": b"S'ran'\nQ.",
    "EXT1": b"\x80\x02\x82\xf0)R.",
    "EXT2": b"\x80\x02\x83\xf0\x00)R.",
    "EXT4": b"\x80\x02\x84\xf0\x00\x00\x00)R.",
    "dotted": b"\x80\x04" + text("builtins") + text("dict.fromkeys") + b"\x93(S'a'\nl\x85R.",
    "dotted, into a module": b"\x80\x04" + text("collections") + text("abc.sys.exit") + b"\x93)R.",
    "method": b"\x80\x04" + text("collections") + text("OrderedDict.__init__") + b"\x93)R.",
    "getattr": b"cbuiltins\ngetattr\n(cbuiltins\ndict\nS'mro'\ntR.",
    "eval": b'c__builtin__\neval\n(S\'__import__("os").mkdir("ran")\'\ntR.',
    "str of a list": b"cbuiltins\nstr\n((lI1\natR.",
    "a class as a value that is called": b"cbuiltins\ndict\n)R.",
    "a call of a list": b"(l)R.",
    "buffers": b"\x80\x05\x97.",
    "a byte array": b"\x80\x05\x96\x01\x00\x00\x00\x00\x00\x00\x00x.",
}


@pytest.mark.parametrize("name", TRICKS)
def test_nothing_is_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(copyreg._inverted_registry, 0xF0, ("os", "mkdir"))
    monkeypatch.setitem(copyreg._extension_cache, 0xF0, os.mkdir)
    before = {*sys.modules}
    (tmp_path / "captions.pkl").write_bytes(TRICKS[name])
    with pytest.raises(UsageError, match=r"^captions\.pkl \(--data_path\): holds ") as caught:
        File("captions.pkl", "--data_path", "").unpickle()
    assert "which is no plain data" in str(caught.value)
    assert not (tmp_path / "ran").exists()
    assert {*sys.modules} == before


# -- little files that ask for much -----------------------------------------------------------------------------------


def references(depth: int) -> bytes:
    """A list of ten references to a list of ten references …"""
    parts = [b"]q\x00"]
    for n in range(1, depth):
        parts.append(b"](" + b"h" + bytes([n - 1]) + (b"h" + bytes([n - 1])) * 9 + b"eq" + bytes([n]))
    return b"".join(parts) + b"."


BOMBS = {
    "BINBYTES8": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.",
    "BINUNICODE8": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"x.",
    "BYTEARRAY8": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.",
    "FRAME": b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N.",
    "LONG4": b"\x80\x02\x8b" + struct.pack("<i", (1 << 31) - 1) + b"x.",
    "LONG of a million digits": b"L" + b"9" * 10**6 + b"L\n.",
    "a memo of gigabytes": b"]r\xff\xff\xff\x7f.",
    "laughs": references(12),
    "itself": b"]q\x00h\x00a.",
    "nested lists": b"]" * 200_000 + b"a" * 199_999 + b".",
    "nested tuples": b")" + b"\x85" * 200_000 + b".",
    "nested tuples as a key": b"})" + b"\x85" * 200_000 + b"Ns.",
    "nested tuples in a set": b"\x80\x04\x8f()" + b"\x85" * 200_000 + b"\x90.",
    "the same list in many sets": b"("
    + b"K\x01" * 20_000
    + b"lp0\n0"
    + b"c__builtin__\nset\ng0\n\x85R0" * 20_000
    + b"N.",
    "one long text many times": b"]q\x00(X"
    + struct.pack("<I", 10**5)
    + b"x" * 10**5
    + b"q\x01"
    + b"h\x01" * 10**5
    + b"e.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_little_files_take_little_time_and_memory(tmp_path, name):
    resource = pytest.importorskip("resource")
    (tmp_path / "a.pkl").write_bytes(BOMBS[name])
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        value = File(str(tmp_path / "a.pkl"), "--data_path", "").unpickle()
        assert name in ("FRAME", "a memo of gigabytes", "nested lists", "nested tuples")
        assert value is None or len(value) < 2
        del value
    except UsageError as error:
        said = str(error)
        assert "a.pkl (--data_path): " in said
        assert "\n" not in said
    assert time.process_time() - begun < 8
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000  # kB
