"""Files that mean harm: nothing is run, memory and time are bounded, the answer is clear."""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.core.types import MiB
from holdfast.errors import DamagedObject, UnknownFile
from holdfast.foreign import describe, machine, zips
from holdfast.foreign.harmless import HARMLESS
from holdfast.foreign.source import BytesSource
from tests.foreign import hostile
from tests.foreign.test_files import look, npy, saved

# -- nothing is run ---------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (hostile.Calls(os.system, "touch pwned"), "posix.system"),
        (hostile.Calls(eval, "open('pwned', 'w')"), "builtins.eval"),
        (hostile.Calls(subprocess.check_output, ["touch", "pwned"]), "subprocess.check_output"),
        (hostile.Calls(getattr, os, "x"), "builtins.getattr"),
        ([{"deep": (hostile.Calls(exec, "1"),)}], "builtins.exec"),
    ],
    ids=["system", "eval", "subprocess", "getattr", "deep"],
)
def test_code_is_named_and_not_run(
    value: object, name: str, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "builtins.getattr":
        value = hostile.Calls(getattr, "text", "upper")
    data = hostile.pickled(value, protocol)
    for file in (look(data), look(hostile.torch_zip(data))):
        assert name in file.runs
        assert os.listdir() == []
    array = npy(np.array([value], dtype=object))
    assert name in look(array).runs
    assert os.listdir() == []


def test_nothing_is_imported(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("open('pwned', 'w')")
    path = tmp_path / "x.pt"
    path.write_bytes(hostile.torch_zip(b"\x80\x02cevil\nRun\n)\x81}b."))
    code = (
        "import sys\nfrom holdfast.foreign import *\n"
        "with FileSource(sys.argv[1]) as source:\n    print(describe(source).runs)\n"
        "assert not {'evil', 'torch', 'numpy'} & set(sys.modules), sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "('evil.Run',)\n", done.stderr
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (b"cos\nsystem\n.", "os.system"),
        (b"(S'x'\nios\nsystem\n.", "os.system"),
        (b"(cos\nsystem\nS'x'\no.", "os.system"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.", "os.system"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93)\x81.", "os.system"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93)}\x92.", "os.system"),
        (b"\x80\x02c__builtin__\neval\n.", "builtins.eval"),
        (b"\x80\x02cos\nsystem\n0N.", "os.system"),
        (b"\x80\x02ctorch\nSize\nN}S'x'\nNs\x86b.", "changes torch.Size"),
        (b"\x80\x02ccollections\nOrderedDict\nS'x'\nNs.", "changes collections.OrderedDict"),
        (b"\x80\x02ccollections\nOrderedDict\n)R)R.", "calls something that it has made"),
        (b"\x80\x04N\x8c\x06system\x93.", "<a module that is computed while loading>.<name>"),
        (b"\x80\x02\x82\x07.", "copyreg.<extension 7>"),
        (b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.", "OrderedDict.__init__"),
        (b"\x80\x02ccollections\nOrderedDict \n.", "collections.OrderedDict "),
        (b"\x80\x02ctorch.storage\n_load_from_bytes\n.", "torch.storage._load_from_bytes"),
    ],
)
def test_every_way_to_name_code(program: bytes, says: str) -> None:
    file = look(hostile.torch_zip(program))
    assert file.problems == ()
    assert any(says in name for name in file.runs), file.runs


def test_code_before_the_damage_counts() -> None:
    """An unpickler obeys what comes first, and only then finds the damage."""
    file = look(hostile.SYSTEM[:-1] + b"\xff garbage")
    assert file.kind == "pickle"
    assert file.runs == ("os.system",)
    assert "malformed" in file.problems[0]
    many = b"\x80\x02" + b"N0" * (machine.MAX_OPERATIONS // 2 + 1) + hostile.SYSTEM
    file = look(many)
    assert file.runs == ()
    assert "the rest was not looked at" in file.problems[0]


def test_a_warning_that_is_an_error_raises_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        walked = machine.walk(rb"S'\o'" + b"\n.")
    assert walked.problem.endswith(r"(invalid escape sequence '\o')")


def test_names_of_python_2() -> None:
    """They are looked up where they are today; one that hides behind a harmless one is told."""
    assert look(b"\x80\x02ccommands\ngetoutput\n.").runs == ("subprocess.getoutput",)
    assert look(b"\x80\x02c__builtin__\nset\n.").runs == ()
    assert look(b"\x80\x02cUserDict\nOrderedDict\n.").runs == ("UserDict.OrderedDict",)


def test_objects_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MAX_OBJECTS", 10_000)  # the real limit takes 18 s
    problem = "its pickle has more than 10,000 objects"
    for one in (b"]", b"}", b"(", b")", b"\x8f", b"cos\nsystem\n)R0"):
        walked = machine.walk(b"\x80\x04" + one * (machine.MAX_OBJECTS + 1))
        assert walked.problem.startswith(problem), one


def test_what_is_harmless_names_nothing_that_finds_names() -> None:
    """None of these may turn text into code or attributes."""
    for name in HARMLESS:
        last = name.rpartition(".")[2]
        assert last not in dir(builtins) or last not in {
            *("eval", "exec", "compile", "open", "getattr", "setattr", "delattr", "globals"),
            *("__import__", "input", "map", "filter", "type", "vars", "breakpoint", "super"),
        }, name
        assert not name.startswith(
            ("os.", "sys.", "posix.", "operator.", "functools.", "importlib.")
        )


# -- memory and time ------------------------------------------------------------------


BOMBS: dict[str, Callable[[], bytes]] = {
    "deep lists": lambda: hostile.deep_lists(900_000),
    "deep tuples as keys": lambda: hostile.deep_tuples(900_000),
    "one list a billion times": lambda: hostile.many_names_for_one(200),
    "many lists": lambda: b"\x80\x02(" + b"]" * 3_000_000 + b"l.",
    "many marks": lambda: b"\x80\x02" + b"(" * 3_000_000 + b".",
    "many operations": lambda: b"\x80\x02" + b"N0" * 5_000_000 + b"N.",
    "a full stack": lambda: b"\x80\x02(" + b"J\x01\x02\x03\x04" * 3_900_000 + b"l.",
    "many short texts": lambda: b"\x80\x04(" + b"\x8c\x01x" * 3_900_000 + b"l.",
    "a text longer than the file": lambda: hostile.long_text(1 << 60),
    "bytes longer than the file": lambda: b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b".",
    "a long text": lambda: (
        b"\x80\x02X" + struct.pack("<I", 50 * MiB) + b"\xf0\x9f\x98\x80" * (50 * MiB // 4) + b"."
    ),
    "a long number": lambda: (
        b"\x80\x02\x8b" + struct.pack("<I", 50 * MiB) + b"\x7f" * (50 * MiB) + b"."
    ),
    "a long number in text": lambda: b"L" + b"9" * 5_000_000 + b"L\n.",
    "many names": lambda: b"\x80\x02" + b"".join(b"ca\n%d\n0" % i for i in range(500_000)) + b"N.",
    "a large dict with long keys": lambda: _deep_keys(),
    "sparse in sparse": lambda: _sparse_in_sparse(200_000),
    "a shape of many numbers": lambda: _long_shape(),
    "memo far away": lambda: b"\x80\x02]" + b"r\xff\xff\xff\x7f" * 100_000 + b".",
    "more than it takes": lambda: b"\x80\x02B" + struct.pack("<I", 100 * MiB) + bytes(100 * MiB),
}


def _deep_keys() -> bytes:
    """Keys that make ever longer paths, around many values."""
    text = b"X" + struct.pack("<I", 1000) + b"k" * 1000
    inner = b"}(" + b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(300_000)) + b"u"
    return b"\x80\x02" + (b"}" + text) * 60 + inner + b"s" * 60 + b"."


def _sparse_in_sparse(depth: int) -> bytes:
    rebuild = b"ctorch._utils\n_rebuild_sparse_tensor\n"
    return b"\x80\x02" + (rebuild + b"NN") * depth + b"N" + b"\x86N\x87\x86R" * depth + b"."


def _long_shape() -> bytes:
    number = b"\x8a\x08" + struct.pack("<q", (1 << 61) + 1)
    shape = b"(" + number * 900_000 + b"t"
    return b"\x80\x02ctorch._utils\n_rebuild_meta_tensor_no_storage\n(ctorch\nfloat32\n" + (
        shape + b")NtR."
    )


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name: str, tmp_path: Path) -> None:
    """In a process that may use 1 GiB of addresses, and no minute."""
    path = tmp_path / "bomb.pt"
    path.write_bytes(hostile.torch_zip(BOMBS[name]()))
    _described_within_limits(path)


def test_a_zip_bomb(tmp_path: Path) -> None:
    """Four gigabytes of one operation, packed in four megabytes."""
    path = tmp_path / "bomb.pt"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("archive/data.pkl", "w", force_zip64=True) as entry,
    ):
        entry.write(b"\x80\x02")
        block = b"]0" * (8 * MiB)
        for _ in range(16):
            entry.write(block)
    assert "the rest was not looked at" in _described_within_limits(path)


def test_a_header_of_a_hundred_megabytes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    one = '"%08d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
    body = ("{" + "".join(one % i for i in range(1_500_000)))[:-1].encode() + b"}"
    path.write_bytes(len(body).to_bytes(8, "little") + body)
    assert "DamagedObject" in _described_within_limits(path)
    path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    assert "DamagedObject" in _described_within_limits(path)
    path.write_bytes(len(b"[" * 90 * MiB).to_bytes(8, "little") + b'{"a":' + b"[" * (90 * MiB))
    assert "DamagedObject" in _described_within_limits(path)


def _described_within_limits(path: Path) -> str:
    code = (
        "import sys\nfrom holdfast.errors import HoldfastError\nfrom holdfast.foreign import *\n"
        "with FileSource(sys.argv[1]) as source:\n"
        "    try:\n        file = describe(source)\n        print(file.kind, file.problems)\n"
        "    except HoldfastError as error:\n        print(type(error).__name__, error)\n"
    )
    said = hostile.within_limits(code, path)
    assert len(said) < 2000
    return said


# -- anything --------------------------------------------------------------------------

SEEDS = [
    saved({"x": torch.zeros(4)}),
    saved({"x": torch.zeros(4)}, _use_new_zipfile_serialization=False),
    hostile.pickled({"a": [1, (2,)], "b": {3}}, 4),
    npy(np.zeros(3)),
    hostile.torch_zip(hostile.SYSTEM),
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SEEDS), st.randoms(use_true_random=False))
def test_any_damage_is_told_by_an_error_of_ours(seed: bytes, chance: random.Random) -> None:
    data = bytearray(seed)
    for _ in range(chance.randint(1, 6)):
        data[chance.randrange(len(data))] = chance.randrange(256)
    if chance.random() < 0.3:
        del data[chance.randrange(len(data)) :]
    with contextlib.suppress(DamagedObject, UnknownFile):
        describe(BytesSource(bytes(data)))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_as_a_pickle(data: bytes) -> None:
    walked = machine.walk(b"\x80\x04" + data)
    assert walked.problem or walked.end <= len(data) + 2
    with contextlib.suppress(DamagedObject):
        describe(BytesSource(hostile.torch_zip(data)))


@given(st.recursive(st.none() | st.integers() | st.text(max_size=5) | st.binary(max_size=5),
                    lambda inner: st.lists(inner, max_size=4)
                    | st.dictionaries(st.text(max_size=3), inner, max_size=4)
                    | st.tuples(inner, inner), max_leaves=20), st.integers(0, 5))  # fmt: skip
def test_plain_values_of_any_protocol(value: object, protocol: int) -> None:
    walked = machine.walk(pickle.dumps(value, protocol))
    assert walked.problem == ""
    assert set(walked.names) <= HARMLESS
    assert walked.deeds == []


def test_an_entry_that_cannot_be_packed_is_read_whole() -> None:
    """Deflate makes some bytes of noise longer; the limit must leave room for it."""
    noise = random.Random(0).randbytes(300_000)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("noise", noise)
    archive = zips.read_archive(BytesSource(out.getvalue()))
    assert archive.read("noise", max_bytes=len(noise)) == noise
    assert archive.read("noise", max_bytes=1000) == noise[:1000]
    assert zlib.crc32(noise)


def test_reading_is_quick() -> None:
    """20,000 tensors: as in a large model and its optimizer."""
    state = {f"layers.{i}.weight": torch.zeros(2) for i in range(20_000)}
    data = saved(state)
    before = time.process_time()
    file = look(data)
    assert len(file.leaves) == 20_000
    assert time.process_time() - before < 20


def test_more_tensors_than_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No damage: a large file. Its names of code are all known."""
    monkeypatch.setattr("holdfast.foreign.contents.MAX_LEAVES", 3)
    file = look(saved({str(i): torch.zeros(1) for i in range(5)}))
    assert [leaf.path for leaf in file.leaves] == ["0", "1", "2"]
    assert file.notes == ("it has more tensors than the 3 listed",)
    assert file.problems == ()
