"""Writes the store that later versions must be able to read for ever.

    python -m tests.golden.make tests/golden/v0.1
    python -m tests.golden.make tests/golden/boxes

Run once per release that changes what is written; the folder is committed and never
made again. `state()` must keep giving the same values, or a test has nothing to compare.
"""

from __future__ import annotations

import datetime
import math
import struct
import sys
from collections import OrderedDict, deque
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

import holdfast
from holdfast.repo import layout
from tests.repo.support import process
from tests.support.recut import at_random, recut


def state(step: int) -> dict[str, Any]:
    """One of every kind of value, a little different at each step."""
    base = torch.arange(24, dtype=torch.float32)
    tied = torch.full((3,), float(step))
    return {
        "plain": {
            "none": None,
            "flags": [True, False],
            "ints": [0, -1, 2**53, 2**200 + step],
            "floats": [0.1, -0.0, math.inf, struct.unpack("<d", b"\x01\0\0\0\0\0\xf8\x7f")[0]],
            "complex": complex(1, -2),
            "text": "ümlaut \ud800 \x00",
            "long text": "x" * 5000,
            "bytes": b"\x00\xff" * 3000,
            "keys": {0: "int", "0": "str", (1, 2): "tuple", None: "none"},
            "tuple": (1, (2,), []),
            "set": {3, 1, 2},
            "deque": deque([1, 2], maxlen=3),
            "ordered": OrderedDict([("b", 1), ("a", 2)]),
            "path": PurePosixPath("a/b"),
            "time": datetime.datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=datetime.UTC),
            "history": [float(n) / 7 for n in range(5000)],
        },
        "numpy": {
            "f4": np.arange(6, dtype="<f4").reshape(2, 3) * step,
            "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
            "big endian": np.arange(3, dtype=">i2"),
            "dates": np.array(["2026-01-01", "NaT"], dtype="datetime64[D]"),
            "record": np.array([(1, 2.5)], dtype=[("a", "<i4"), ("b", "<f8")]),
            "empty": np.zeros((0, 3)),
            "scalar": np.float32(1.5),
            "generator": np.random.default_rng(step),
        },
        "torch": {
            "bf16": torch.arange(5).to(torch.bfloat16),
            "f8": torch.arange(4).to(torch.float8_e4m3fn),
            "c64": torch.tensor([1 + 2j]),
            "0-d": torch.tensor(7),
            "transposed": torch.arange(6).reshape(2, 3).t(),
            "views": [base[2:10], base[6:20]],
            "tied": [tied, tied],
        },
        "frozen": np.arange(3000, dtype=np.int64),
    }


def make(folder: Path) -> None:
    # Segments normally hold 64 records; a small store must have some, too.
    layout.TAIL_RECORDS, layout.SEGMENT_RECORDS = 1, 2
    with holdfast.CheckpointManager(folder, keep=None, config={"lr": 0.1}) as ckpts:
        for step in range(1, 6):
            metrics = {"loss": 1 / step, "odd": math.nan if step == 2 else 1.0}
            ckpts.save(step, state(step), metrics=metrics, loop={"epoch": step}).result()
        ckpts.tag(2, "gold")
        ckpts.pin(3, "paper")
        ckpts.save(6, state(6), note="final", finished=True).result()


def make_boxes(folder: Path) -> None:
    """The newest checkpoint of v0.1, its leaves cut in any boxes, as processes that train
    together may write it."""
    recut(folder.with_name("v0.1"), folder, at_random(6), packs=3, holder=process())


if __name__ == "__main__":
    target = Path(sys.argv[1])
    (make_boxes if target.name == "boxes" else make)(target)
