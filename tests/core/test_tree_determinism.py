"""The same state gives the same bytes in every process."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import enum, hashlib, sys
import msgspec, numpy as np
from holdfast.core.tree import capture

class Color(enum.Enum):
    RED = 1
    BLUE = 2

state = {
    "set": {"a", "b", "c", ("x", 1), None, 3.5, Color.RED, Color.BLUE, b"q", frozenset({"m", "n"})},
    "words": {str(i) for i in range(100)},
    "long": {"x" * 6000, "y" * 6000},
    "dict": {name: name for name in ("z", "a", 3, "3")},
    "array": np.arange(5),
    "generator": np.random.default_rng(1),
    "double": np.longdouble(1) / 3,
}
captured = capture(state)
digest = hashlib.sha256(msgspec.json.encode(captured.tree))
for leaf in captured.leaves:
    data = bytearray(leaf.source.nbytes)
    leaf.source.copy_range(0, memoryview(data))
    digest.update(leaf.path.encode() + data)
print(digest.hexdigest())
"""


def test_hash_seeds_do_not_matter() -> None:
    found = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": "src"},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(found) == 1
