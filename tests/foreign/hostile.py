"""Files that mean harm, written byte by byte."""

from __future__ import annotations

import io
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from holdfast.core.types import GiB

LIMIT = 1 * GiB
SECONDS = 60
SYSTEM = b"cos\nsystem\n(S'touch pwned'\ntR."
"""Protocol 0: runs a command."""


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def torch_zip(data_pkl: bytes, **entries: bytes) -> bytes:
    """As `torch.save` lays it out, around any pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", data_pkl)
        archive.writestr("archive/version", b"3\n")
        for name, data in entries.items():
            archive.writestr(f"archive/{name}", data)
    return out.getvalue()


def deep_lists(depth: int) -> bytes:
    """A list in a list in a list …"""
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def deep_tuples(depth: int) -> bytes:
    """Their hash and their comparison recurse in C; here it is a key, too."""
    return b"\x80\x02}(" + b")" + b"\x85" * depth + b"K\x01u."


def many_names_for_one(levels: int) -> bytes:
    """Each list holds the one before ten times: 10**levels items if each is entered."""
    text = b"\x80\x02](K\x01e" + b"q\x00"
    for level in range(levels):
        text += b"](" + b"h" + bytes([level]) + (b"h" + bytes([level])) * 9 + b"e"
        text += b"q" + bytes([level + 1])
    return text + b"."


def long_text(claimed: int) -> bytes:
    """A string that claims to be longer than the file."""
    return b"\x80\x04\x8d" + struct.pack("<Q", claimed) + b"abc."


def encrypted_zip(data: bytes) -> bytes:
    """The flag that an entry is encrypted, in both places."""
    changed = bytearray(data)
    for magic, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        where = changed.find(magic)
        changed[where + at] |= 1
    return bytes(changed)


def pickled(value: Any, protocol: int = 2) -> bytes:
    return pickle.dumps(value, protocol)


def within_limits(code: str, path: Path) -> str:
    """What a program prints that is given a file, little memory, and little time."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))

    done = subprocess.run(
        [sys.executable, "-c", code, path],
        capture_output=True,
        text=True,
        preexec_fn=limit,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
