"""A place that is not this run's mirror: training goes on without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast import CheckpointManager
from holdfast.repo.repo import Repo
from holdfast.repo.writer import Writer
from holdfast.stores.open import open_store
from tests.mirror.support import WAIT_S, state, steps, warnings
from tests.support.servers.service import Place


def test_a_mirror_that_holds_another_run_is_refused_and_the_run_goes_on(
    tmp_path: Path, there: str, caplog: pytest.LogCaptureFixture
) -> None:
    with CheckpointManager(there) as other:
        other.save(7, state(7)).result()
    with CheckpointManager(tmp_path / "run") as run:
        run.save(1, state(1)).result()
    with CheckpointManager(tmp_path / "run", mirror=there) as run:
        run.save(2, state(2)).result()
        assert not run.wait_mirrored(WAIT_S)
        run.save(3, state(3)).result()
    assert steps(tmp_path / "run") == [1, 2, 3]
    assert steps(there) == [7]
    refused, missing = warnings(caplog)
    assert "nothing is copied to its mirror any more" in refused
    assert "holds another run" in refused
    assert len(refused.splitlines()) == 2
    assert missing.endswith(f"step 3, 2, 1: only here, {there} is not used any more")


def test_a_bucket_that_ignores_conditions_is_no_mirror(
    tmp_path: Path, careless_gcs: Place, caplog: pytest.LogCaptureFixture
) -> None:
    with CheckpointManager(tmp_path / "run", mirror=careless_gcs.address) as run:
        run.save(1, state(1)).result()
        assert not run.wait_mirrored(WAIT_S)
        run.save(2, state(2)).result()
    assert steps(tmp_path / "run") == [1, 2]
    assert "nothing is copied to its mirror any more" in warnings(caplog)[0]


def test_who_takes_the_mirror_over_has_it_and_the_other_is_told(
    tmp_path: Path, there: str, caplog: pytest.LogCaptureFixture
) -> None:
    with CheckpointManager(tmp_path / "run", mirror=there) as run:
        run.save(1, state(1)).result()
        assert run.wait_mirrored(WAIT_S)
        Writer.open(Repo(open_store(there)), take_over=True).close()
        run.save(2, state(2)).result()
        assert not run.wait_mirrored(WAIT_S)
        run.save(3, state(3)).result()
    assert steps(tmp_path / "run") == [1, 2, 3]
    assert steps(there) == [1]
    assert "taken over" in warnings(caplog)[0]
