"""`current.checkpoint.run` and `attributes=` in real flows, ended in every way."""

from __future__ import annotations

import re
from typing import Any

import pytest

import holdfast
from tests.metaflow.support import Metaflow


def _with(every: str, retries: int = 0) -> list[str]:
    return [
        f"--with=retry:times={retries},minutes_between_retries=0",
        f"--with=checkpoint:every={every},attributes=history,keep=last=2",
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What a run tells that nobody has interrupted."""
    metaflow = Metaflow(tmp_path_factory.mktemp("undisturbed"))
    metaflow.run("looping", "run", *_with("1h"))
    assert len(metaflow.told) == 1 + 12 + 1
    return metaflow.told


def check(told: list[dict[str, Any]], undisturbed: list[dict[str, Any]]) -> list[int | None]:
    """The result is the same, bit for bit, and each step saw what it sees there. Where each
    attempt began."""
    assert told[-1] == undisturbed[-1]
    at = 0
    for line in told[:-1]:
        if "attempt" in line:
            at = line["resumed"] or 0
            assert line["history"] == (undisturbed[-1]["history"][:at] or None)
        else:
            assert line == undisturbed[1 + at]
            at += 1
    assert at == 12
    return [line["resumed"] for line in told if "attempt" in line]


@pytest.mark.slow  # it waits for a timeout
def test_however_attempts_end_the_next_one_goes_on_inside(
    metaflow: Metaflow, undisturbed: list[dict[str, Any]]
) -> None:
    ends = "killed 4, stopped 5, raises 7, late 10"
    ran = metaflow.run("looping", "run", "--with=timeout:seconds=4", *_with("3", 4), ENDS=ends)
    # A stop saves the step that it waits for; all others lose what came after the last save.
    assert check(metaflow.told, undisturbed) == [None, 3, 6, 6, 9]
    assert "timed out after" in ran.output
    assert "SIGTERM: saved step 6" in ran.output
    with holdfast.CheckpointManager(metaflow.told[0]["address"]) as run:
        assert run.finished
        assert [info.step for info in run.checkpoints()] == [9, 12]


def test_a_run_that_resumes_goes_on_inside_and_so_does_its_retry(
    metaflow: Metaflow, undisturbed: list[dict[str, Any]]
) -> None:
    ends = "exits 4, raises 7, killed 11"
    options = _with("2 epoch", 1)
    metaflow.run("looping", "run", *options, status=1, ENDS=ends)
    metaflow.run("looping", "resume", *options, ENDS=ends)
    assert check(metaflow.told, undisturbed) == [None, 4, 6, 10]
    first, *_, last = [line["address"] for line in metaflow.told if "address" in line]
    assert first != last
    with holdfast.CheckpointManager(first) as run:
        assert [info.step for info in run.checkpoints()] == [4, 6]
    ls = metaflow.run("looping", "checkpoint", "ls").output
    assert len(re.findall(r"/loop\s", ls)) == 2


def test_attributes_alone_go_on_in_a_retry_and_in_a_resume(metaflow: Metaflow) -> None:
    options = [_with("", 1)[0], "--with=checkpoint:attributes=epoch,weights,keep=last=2"]
    metaflow.run("carrying", "run", *options, status=1, FAILS_AT="3 5")
    metaflow.run("carrying", "resume", *options)
    first, retried, resumed, listed, end = metaflow.told
    assert (first["loaded"], first["epoch"]) == (False, None)
    assert retried == {
        **first,
        "attempt": 1,
        "loaded": True,
        "epoch": 3,
        "weights": [1.5, 6.0],
        "files": [],
    }
    assert (resumed["loaded"], resumed["epoch"]) == (True, 5)
    assert listed["attributes"] == [["epoch", "weights"]]
    assert end == {"epoch": 6, "unchanged": True, "weights": [3.0, 21.0]}
