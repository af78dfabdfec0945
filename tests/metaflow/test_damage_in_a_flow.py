"""What is damaged is told, and the checkpoint before it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.damage import newest_pack
from tests.metaflow.support import Metaflow


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.chmod(0o644)  # packs are for reading only
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_the_one_before_is_loaded(metaflow: Metaflow, damage: Callable[[Path], object]) -> None:
    metaflow.run("counting", FAILS_AT="6", status=1)
    [run] = metaflow.folder.glob(".metaflow/mf.holdfast/Counting/start/task/*/main")
    damage(newest_pack(run))  # the numbers of the files, whose bytes are the last there
    metaflow.forget()
    resumed = metaflow.run("counting", "resume")
    assert "main@5 is damaged and was passed over" in resumed.output
    assert [line.get("loaded") for line in metaflow.told] == [4, None]
