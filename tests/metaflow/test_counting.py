"""A step goes on where it was: in the next attempt, and in a run that resumes."""

from __future__ import annotations

import pytest

from tests.metaflow.support import Metaflow


# Metaflow itself starts processes for each of its requests to S3.
@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.slow)])
def flows(request: pytest.FixtureRequest) -> Metaflow:
    return request.getfixturevalue("metaflow" if request.param == "folder" else "metaflow_on_s3")


def test_the_next_attempt_goes_on(flows: Metaflow) -> None:
    flows.run("counting", DIES_AT="4")
    first, second, end = flows.told
    assert first == {**first, "attempt": 0, "loaded": 0, "metadata": None, "files": []}
    assert second == {**second, "attempt": 1, "loaded": 4, "metadata": {"count": 4}}
    assert second["files"] == ["count"]
    assert end == {"count": 10}
    # The attempt that was killed could not remove its folder.
    assert not list(flows.temporary.glob("checkpoint-*"))


def test_a_run_that_resumes_goes_on_inside_the_step(flows: Metaflow) -> None:
    flows.run("counting", FAILS_AT="6", status=1)
    assert [line["loaded"] for line in flows.told] == [0, 5, 5]
    origin = flows.told[0]["run"]
    flows.forget()
    flows.run("counting", "resume")
    resumed, end = flows.told
    assert flows.origins("Counting") == {resumed["run"]: origin}
    assert (resumed["attempt"], resumed["loaded"], resumed["metadata"]) == (0, 5, {"count": 5})
    assert end == {"count": 10}


def test_each_resume_goes_on_from_the_one_before(metaflow: Metaflow) -> None:
    """Though all of them name the same origin: `resume` alone means the last `run`."""
    metaflow.run("counting", FAILS_AT="3", status=1)
    metaflow.run("counting", "resume", FAILS_AT="7", status=1)
    metaflow.forget()
    metaflow.run("counting", "resume", FAILS_AT="9", status=1)
    assert [line["loaded"] for line in metaflow.told] == [6, 8, 8]
    metaflow.forget()
    metaflow.run("counting", "resume")
    assert [line.get("loaded") for line in metaflow.told] == [8, None]


@pytest.mark.slow
def test_runs_between_that_have_saved_nothing_lose_nothing(metaflow: Metaflow) -> None:
    """One in which no task began, and one that failed before its first save."""

    def resume(origin: str, status: int = 1, **variables: str) -> str:
        options = [f"--origin-run-id={origin}", "--run-id-file=id"]
        metaflow.run("counting", "resume", *options, status=status, **variables)
        return (metaflow.folder / "id").read_text()

    metaflow.run("counting", FAILS_AT="4", status=1)
    second = resume(metaflow.told[0]["run"], NO_TASKS="1")
    metaflow.forget()
    third = resume(second, FAILS_AT="4")
    assert [line["loaded"] for line in metaflow.told] == [3, 3, 3]
    metaflow.forget()
    resume(third, status=0)
    assert [line.get("loaded") for line in metaflow.told] == [3, None]
    assert "2 runs in" in metaflow.run("counting", "checkpoint", "ls").output


def test_a_run_of_its_own_begins_anew(flows: Metaflow) -> None:
    flows.run("counting")
    flows.forget()
    flows.run("counting")
    assert flows.told[0]["loaded"] == 0
