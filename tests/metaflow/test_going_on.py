"""What a task that begins may load, by policy, run and attempt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from holdfast.metaflow.checkpoints import Checkpoints
from tests.metaflow.tasks import task, written


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A datastore with five runs: 1; 2 and 3 resume it; 4 resumes 3; 5 is another user's. And
    with two that have saved nothing: 6 resumes 4, and 7 resumes 6."""
    tmp_path = tmp_path_factory.mktemp("saved")

    def save(fit: Checkpoints, **options: Any) -> None:
        fit.save(written(tmp_path / "x", content="1"), **options)
        fit.close()

    for run, origin, namespace in [
        *[("1", "", "user:me"), ("2", "1", "user:me"), ("3", "1", "user:me")],
        *[("4", "3", "user:me"), ("5", "", "user:you")],
    ]:
        save(task(tmp_path / "ds", run=run, origin=origin, namespace=namespace))
    save(task(tmp_path / "ds", run="1", namespace="user:me"), latest=False)
    save(task(tmp_path / "ds", run="1", rank=1, writer="rank-1", namespace="user:me"))
    save(task(tmp_path / "ds", run="1", foreach=(0,), namespace="user:me"))
    written(tmp_path / "ds/mf.holdfast/Train/run-origins", **{"6..4": "", "7..6": ""})
    return tmp_path / "ds"


@pytest.mark.parametrize(
    ("run", "origin", "attempt", "policy", "found"),
    [
        ("9", "", 0, "fresh", []),
        ("9", "", 1, "fresh", []),
        ("9", "4", 0, "fresh", ["4", "3", "2", "1"]),
        ("9", "1", 0, "fresh", ["3", "2", "1"]),
        ("9", "5", 0, "fresh", ["5"]),
        ("9", "8", 0, "fresh", []),
        ("9", "7", 0, "fresh", ["4", "3", "2", "1"]),
        ("7", "6", 1, "fresh", ["4", "3", "2", "1"]),
        ("3", "1", 0, "fresh", ["2", "1"]),
        ("3", "1", 1, "fresh", ["3", "2", "1"]),
        ("1", "", 0, "fresh", []),
        ("1", "", 1, "fresh", ["1"]),
        ("9", "", 0, "eager", ["4", "3", "2", "1"]),
        ("9", "5", 0, "eager", ["5", "4", "3", "2", "1"]),
        ("9", "7", 0, "none", []),
        ("3", "1", 1, "eager", ["3", "2", "1", "4"]),
        ("3", "1", 1, "none", []),
    ],
)
def test_what_a_task_may_go_on_from(
    saved: Path, run: str, origin: str, attempt: int, policy: str, found: list[str]
) -> None:
    """The best first, and each once; not what is told apart by `latest`, or another node's."""
    fit = task(saved, run=run, origin=origin, attempt=attempt, namespace="user:me")
    assert [each.pathspec.split("/")[1] for each in fit.to_go_on_from(policy)] == found
    fit.close()


def test_another_branch_has_nothing_to_do_with_it(saved: Path) -> None:
    fit = task(saved, run="9", origin="1", foreach=(1,), namespace="user:me")
    assert list(fit.to_go_on_from("eager")) == []
    fit = task(saved, run="9", origin="1", foreach=(0,), namespace="user:me")
    assert len(list(fit.to_go_on_from("fresh"))) == 1
