"""Models, archives and folders that mean harm: bounded, and told by an error of ours."""

from __future__ import annotations

import contextlib
import json
import pickle
import random
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.core.types import MiB
from holdfast.errors import DamagedObject, UnknownFile
from holdfast.foreign import open_foreign, ubjson
from holdfast.foreign.source import BytesSource
from tests.foreign import hostile
from tests.foreign.test_files import saved
from tests.foreign.values import made

PLACE = tempfile.TemporaryDirectory()
"""Examples of hypothesis share it."""

COUNT = b"#L" + struct.pack(">q", 1 << 40)

BOMBS: dict[str, Callable[[], bytes]] = {
    "ubj: a long array of numbers": lambda: b"{i\x01a[$d" + COUNT,
    "ubj: a long array of nothing": lambda: b"{i\x01a[$Z" + COUNT,
    "ubj: a long object": lambda: b"{i\x01a{$Z" + COUNT,
    "ubj: a long text": lambda: b"{i\x01aSL" + struct.pack(">q", 1 << 60),
    "ubj: a negative length": lambda: b"{i\x01aSi\xff",
    "ubj: deep arrays": lambda: b"{i\x01a" + b"[" * 5_000_000,
    "ubj: deep objects": lambda: b"{i\x01a" * 1_000_000,
    "ubj: many values": lambda: b"{i\x01a[" + b"Z" * 20_000_000,
    "ubj: many texts": lambda: b"{i\x01a[" + b"Si\x01x" * 5_000_000,
    "ubj: many keys": lambda: b"{" + b"".join(b"l%bZ" % (struct.pack(">i", 7) + b"%07d" % i)
                                               for i in range(1_500_000)) + b"}",
    "json: deep": lambda: b'{"learner":' + b"[" * 50_000_000,
    "json: many numbers": lambda: b'{"learner":[' + b"0," * 30_000_000 + b'0],"version":1}',
    "json: many containers": lambda: b'{"learner":[' + b"{}," * 20_000_000 + b'0],"version":1}',
    "json: many arrays": lambda: b'{"learner":[' + b"[]," * 900_000 + b'0],"version":1}',
    "json: a long text": lambda: b'{"learner":"' + b"x" * 60 * MiB + b'"}',
    "lightgbm: many lines": lambda: b"tree\nversion=v4\n\nTree=0\n" + b"a=1\n" * 9_000_000,
    "lightgbm: many trees": lambda: b"tree\nversion=v4\n" + b"\nTree=0\n" * 60_000,
    "lightgbm: many numbers": lambda: (
        b"tree\nversion=v4\n\nTree=0\nleaf_value=" + b"1 " * 10_000_000 + b"\nend of trees\n"
    ),
}  # fmt: skip

# Those that nothing but a look at all of it tells from a model.
_DAMAGED = "DamagedObject UnknownFile problems"


# They come to a limit of a million.
SLOW = ("ubj: many texts", "ubj: many keys")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in BOMBS]
)
def test_bombs(name: str, tmp_path: Path) -> None:
    """In a process that may use 1 GiB of addresses, and no minute."""
    path = tmp_path / "bomb"
    path.write_bytes(BOMBS[name]())
    assert _opened_within_limits(path) in _DAMAGED.split()


def test_a_metadata_bomb(tmp_path: Path) -> None:
    for data in (hostile.deep_lists(100_000), b"\x80\x02(" + b"]" * 200_000 + b"l."):
        (tmp_path / ".metadata").write_bytes(data)
        assert _opened_within_limits(tmp_path) == "DamagedObject"
    (tmp_path / ".metadata").write_bytes(b"")
    with (tmp_path / ".metadata").open("r+b") as file:
        file.truncate(1 << 40)
    assert _opened_within_limits(tmp_path) == "DamagedObject"


def _opened_within_limits(path: Path) -> str:
    code = (
        "import sys\nfrom holdfast.errors import HoldfastError\nfrom holdfast.foreign import *\n"
        "try:\n"
        "    with open_foreign(sys.argv[1]) as foreign:\n"
        "        print('problems' if foreign.check() else 'nothing')\n"
        "except HoldfastError as error:\n    print(type(error).__name__)\n"
    )
    return hostile.within_limits(code, path).strip()


# -- anything ---------------------------------------------------------------------

UBJ = (
    b"{i\x07learner{i\x10gradient_boosterTi\x01a[$d#i\x02"
    + struct.pack(">ff", 1, 2)
    + b"i\x01b[ZTF]i\x01cSi\x02hi}"
    b"i\x07version[$L#i\x01" + struct.pack(">q", 3) + b"}"
)
JSON = json.dumps(
    {"learner": {"gradient_booster": 1, "a": [1, 2.5], "b": "x"}, "version": [1]}
).encode()
LIGHT = (
    b"tree\nversion=v4\ntree_sizes=38\n\nTree=0\nnum_leaves=2\nleaf_value=1 2.5\n\n\nend of trees\n"
)
SEEDS = [UBJ, JSON, LIGHT, saved({"x": torch.arange(12.0).reshape(3, 4).T, "y": [1, {"a": 2}]})]
SEEDS.append(saved({"x": torch.arange(4.0)}, _use_new_zipfile_serialization=False))
SEEDS.append(pickle.dumps({"a": [1, (2,)], "b": {3}}, 2))


@pytest.mark.parametrize("numbers", [b"12.5 ", b" 12.5"])
def test_a_number_that_is_missing(numbers: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.txt"
    path.write_bytes(LIGHT.replace(b"1 2.5", numbers))
    with open_foreign(str(path)) as foreign, pytest.raises(DamagedObject, match="number is none"):
        made(foreign.compared())


def read_all(path: Path) -> None:
    with contextlib.suppress(DamagedObject, UnknownFile), open_foreign(str(path)) as foreign:
        foreign.check()
        made(foreign.compared())
        made(foreign.tree())


@settings(max_examples=250, deadline=None)
@given(st.sampled_from(SEEDS), st.randoms(use_true_random=False))
def test_any_damage_is_told_by_an_error_of_ours(seed: bytes, chance: random.Random) -> None:
    data = bytearray(seed)
    for _ in range(chance.randint(1, 6)):
        data[chance.randrange(len(data))] = chance.randrange(256)
    if chance.random() < 0.3:
        del data[chance.randrange(1, len(data)) :]
    path = Path(PLACE.name) / "damaged"
    path.write_bytes(data)
    read_all(path)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=100))
def test_any_bytes_as_ubjson(data: bytes) -> None:
    for start in (b"{", b"{i\x01a[", b"{i\x01a{"):
        with contextlib.suppress(DamagedObject):
            ubjson.parse(BytesSource(start + data))


def test_seeds_are_whole(tmp_path: Path) -> None:
    for number, seed in enumerate(SEEDS):
        (tmp_path / f"{number}").write_bytes(seed)
        with open_foreign(str(tmp_path / f"{number}")) as foreign:
            assert foreign.check() == [], number
            made(foreign.tree())


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"{i\x01aZi\x01aZ}", "'a' is there twice"),
        (b"{i\x01a[$d]}", "a type without a number"),
        (b"{i\x01a?}", "is no type of UBJSON"),
        (b"{Zi", "is no length"),
        (b"{}x", "1 bytes follow its end"),
        (b"{i\x01a", "it is cut off"),
    ],
)
def test_malformed_ubjson(data: bytes, says: str) -> None:
    with pytest.raises(DamagedObject, match=says):
        ubjson.parse(BytesSource(data))
