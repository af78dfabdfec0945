"""Exports of a manifest that somebody else has written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast.errors import DamagedObject, HoldfastError, UsageError
from holdfast.manager import CheckpointManager, Listing
from tests.manager.test_hostile import forge

VIEW = {"!": "array", "dtype": "<f4", "leaf": 0, "shape": [2], "strides": [4], "offset": 0}
EVIL: dict[str, Any] = {
    "a circle": {"!": "dict", "id": 9, "v": [["x", {"!": "ref", "v": 9}]]},
    "twice the same, again and again": {
        "!": "dict",
        "v": [
            [f"n{n}", {"!": "dict", "id": n, "v": [["a", {"!": "ref", "v": n + 1}]] * 2}]
            for n in range(100)
        ],
    },
    "a reference to itself": {"!": "dict", "v": [["x", {"!": "ref", "id": 3, "v": 3}]]},
    "no such leaf": {"!": "dict", "v": [["w", {"!": "array", "dtype": "<f4", "leaf": 99}]]},
    "a leaf before the first": {"!": "dict", "v": [["w", {"!": "array", "leaf": -1}]]},
    "behind its bytes": {"!": "dict", "v": [["w", {**VIEW, "offset": 10**6}]]},
    "before its bytes": {"!": "dict", "v": [["w", {**VIEW, "strides": [-4]}]]},
    "longer than memory": {"!": "dict", "v": [["w", {**VIEW, "shape": [1 << 61]}]]},
    "more than it is": {"!": "dict", "v": [["w", {**VIEW, "shape": [2, 2]}]]},
    "no dtype": {"!": "dict", "v": [["w", {**VIEW, "dtype": {"x": 1}}]]},
    "no pairs": {"!": "dict", "v": [["w"]]},
    "two of one name": {
        "!": "dict",
        "v": [["w", VIEW], ["x", {"!": "dict", "v": []}], ["w", {**VIEW, "offset": 4}]],
    },
}


@pytest.mark.parametrize("evil", EVIL.values(), ids=EVIL)
def test_forged_models(tmp_path: Path, evil: Any) -> None:
    run = tmp_path / "run"
    with CheckpointManager(run) as manager:
        state = {"data": np.arange(64, dtype=np.uint8), "pretrained_files": {"config.json": "{}"}}
        manager.save(1, state).result()

    def change(manifest: dict[str, Any]) -> None:
        manifest["tree"]["v"].append(["model", evil])

    forge(run, change)
    with Listing(run) as opened:
        with pytest.raises((DamagedObject, UsageError)):
            opened.export_as(None, "hf", tmp_path / "in" / "out")
        for to in ("safetensors", "pt", "dcp"):
            try:
                opened.export_as(None, to, tmp_path / to)
            except HoldfastError:
                assert not (tmp_path / to).exists()
    assert not (tmp_path / "in").exists()
    assert not list(tmp_path.glob(".*"))
