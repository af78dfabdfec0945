"""Results of calls in copies of a run: `sync`, the mirror, and back from there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import holdfast
from holdfast.manager.results import Results
from holdfast.repo import keys
from holdfast.stores.base import Store
from holdfast.stores.local import LocalStore
from tests.cli.damage import flip


def rows(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.float64)


SIZES = [3, 5, 1_200_000]  # the last one comes in blocks


def computed(address: Path, **options: str) -> None:
    with holdfast.Run(address, every=1, quiet=True, **options) as run:  # type: ignore[arg-type]
        for _ in run.range(1):
            list(run.map(rows, SIZES, version=1))


def results_in(store: Store) -> dict[str, int]:
    return {info.key: info.size_bytes for info in store.list(keys.RESULTS)}


def verified(address: Path) -> int:
    with holdfast.CheckpointManager(address) as manager:
        results = Results.of(manager)
        assert results.verify() == []
        return manager.stored_results().count


def test_sync_copies_results_and_cp_does_not(tmp_path: Path) -> None:
    computed(tmp_path / "run")
    with holdfast.CheckpointManager(tmp_path / "run") as manager:
        manager.copy(["latest"], tmp_path / "copy")
        assert not results_in(LocalStore(tmp_path / "copy"))
        manager.sync(tmp_path / "copy", dry_run=True)
        assert not results_in(LocalStore(tmp_path / "copy"))
        manager.sync(tmp_path / "copy")
    assert results_in(LocalStore(tmp_path / "copy")) == results_in(LocalStore(tmp_path / "run"))
    assert verified(tmp_path / "copy") == 3
    flip(tmp_path / "copy" / min(results_in(LocalStore(tmp_path / "copy"))), -1)
    with holdfast.CheckpointManager(tmp_path / "run") as manager:
        manager.sync(tmp_path / "copy")  # it looks at what is missing only
        manager.sync(tmp_path / "copy", verify=True)
    assert verified(tmp_path / "copy") == 3


def test_a_damaged_result_is_not_copied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    computed(tmp_path / "run")
    for key in results_in(LocalStore(tmp_path / "run")):
        flip(tmp_path / "run" / key, -1)
    with holdfast.CheckpointManager(tmp_path / "run") as manager:
        manager.sync(tmp_path / "copy")
    assert not results_in(LocalStore(tmp_path / "copy"))
    assert caplog.text.count("not copied") == 3


def test_a_mirror_has_them_and_gives_them_back(tmp_path: Path) -> None:
    mirror = str(tmp_path / "mirror")
    computed(tmp_path / "run", mirror=mirror)
    assert verified(tmp_path / "mirror") == 3
    calls: list[int] = []

    def counted(n: int) -> np.ndarray:
        calls.append(n)
        return rows(n)

    counted.__module__, counted.__qualname__ = rows.__module__, rows.__qualname__
    with holdfast.Run(tmp_path / "new", mirror=mirror, quiet=True) as run:
        got = list(run.map(counted, SIZES, version=1))
    assert [len(each) for each in got] == SIZES
    assert calls == []


def test_a_run_that_only_has_results_is_mirrored(tmp_path: Path) -> None:
    for place in ("one", "two"):
        run = holdfast.Run(tmp_path / place, mirror=str(tmp_path / "mirror"), quiet=True)
        assert run.once(version=1)(rows)(4).sum() == 6
        run.close()
        assert verified(tmp_path / "mirror") == 1
        assert verified(tmp_path / place) == 1
