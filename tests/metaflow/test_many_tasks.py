"""Steps with several tasks: each goes on from its own checkpoints, in retries and in `resume`."""

from __future__ import annotations

from tests.metaflow.support import Metaflow

_PLAIN = {"0", "1"}
_INNER = {"0.0", "0.1", "1.0", "1.1"}
_LOOP = {"i0", "i1", "i2"}


def _loaded(metaflow: Metaflow, step: str, attempt: int) -> dict[str, str | None]:
    """What each task of the step has loaded, by who it is."""
    lines = [each for each in metaflow.told if (each["step"], each["attempt"]) == (step, attempt)]
    found = {each["who"]: each["loaded"] for each in lines}
    assert len(found) == len(lines)
    assert {each["identifier"] for each in lines} == {f"{step}/task-{who}" for who in found}
    return found


def test_each_task_goes_on_from_its_own_in_the_next_attempt(metaflow: Metaflow) -> None:
    """Of a foreach whose values are equal, of one over arrays and another in it, and of a step
    that leads to itself."""
    metaflow.run("branching", FAILS="plain,inner,loop")
    for step, names in (("plain", _PLAIN), ("inner", _INNER), ("loop", _LOOP)):
        assert _loaded(metaflow, step, 0) == dict.fromkeys(names)
        assert _loaded(metaflow, step, 1) == {name: name for name in names}


def test_each_task_goes_on_from_its_own_when_the_run_is_resumed(metaflow: Metaflow) -> None:
    metaflow.run("branching", DIES="inner", status=1)
    metaflow.forget()
    metaflow.run("branching", "resume", DIES="loop", status=1)
    inner = _loaded(metaflow, "inner", 0)
    assert inner.keys() == _INNER
    assert any(inner.values())  # the first one that failed; others may have been ended before
    assert all(loaded in (None, who) for who, loaded in inner.items())
    assert _loaded(metaflow, "loop", 0) == {"i0": None}
    metaflow.forget()
    metaflow.run("branching", "resume")
    assert _loaded(metaflow, "loop", 0) == {"i0": "i0", "i1": None, "i2": None}


def test_tasks_whose_number_is_unknown_have_their_own(metaflow: Metaflow) -> None:
    metaflow.run("unbounded", status=1)
    metaflow.run("unbounded", "resume")
    assert [(each["identifier"], each["loaded"]) for each in metaflow.told] == [
        *[("fit/task-0", None), ("fit/task-1", None)],
        *[("fit/task-0", "a"), ("fit/task-1", "b")],
    ]
