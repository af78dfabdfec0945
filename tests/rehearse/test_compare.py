"""Differences between traces, and between states."""

from __future__ import annotations

import torch

import holdfast
from holdfast.rehearse.compare import Difference, compare, differing
from holdfast.rehearse.report import causes
from holdfast.run.rehearsal import Completed, Entered, Line, Started
from holdfast.stores.memory import MemoryStore


def entered(step: int, **changes: object) -> Entered:
    values = {
        "process": 1,
        "run": "r",
        "loop": "epochs#0/batches#0",
        "step": step,
        "item": f"item {step}",
        "random": {"python": f"state {step}"},
        "variables": [("best", "number", "0.5"), ("ema", "float32[2]", "ab")],
    }
    return Entered(**{**values, **changes})  # type: ignore[arg-type]


def completed(step: int, **metrics: float) -> Completed:
    texts = {name: repr(value) for name, value in metrics.items()}
    return Completed(1, "r", "epochs#0/batches#0", step, texts, 0.1)


def started(step: int | None) -> Started:
    return Started(1, "r", step)


ALONE: list[Line] = [started(None), *(entered(n) for n in range(6))]


def test_equal_traces() -> None:
    assert compare(ALONE, [started(2), entered(2), entered(3), started(3), entered(3)]) == []


def test_variables_count_only_where_a_process_goes_on() -> None:
    other = [("best", "number", "inf"), ("ema", "float32[2]", "ab"), ("late", "number", "1")]
    found = compare(ALONE, [started(3), entered(3, variables=other), entered(4)])
    assert [(one.kind, one.name, one.step, one.resumed) for one in found] == [
        ("variable", "best", 3, 3)
    ]
    assert (found[0].alone, found[0].killed) == ("0.5", "inf")
    assert compare(ALONE, [started(3), entered(3), entered(4, variables=other)]) == []


def test_the_first_step_of_each_difference_counts() -> None:
    found = compare(
        ALONE,
        [
            started(2),
            *(entered(n, item="other") for n in (2, 3)),
            started(2),
            entered(3, random={"python": "other"}),
        ],
    )
    assert [(one.kind, one.name, one.step) for one in found] == [
        ("data", "epochs#0/batches#0", 2),
        ("random", "python", 3),
    ]


def test_a_start_from_zero_and_steps_of_only_one() -> None:
    found = compare(ALONE, [started(None), entered(0), started(5), entered(9)])
    assert [(one.kind, one.step) for one in found] == [("start", 0), ("place", 9)]


def test_metrics_and_their_tolerance() -> None:
    nan = float("nan")
    alone: list[Line] = [completed(1, loss=1.0, acc=nan), completed(2, loss=2.0)]
    assert compare(alone, [completed(1, loss=1.0, acc=nan), completed(2, loss=2.0)]) == []
    found = compare(alone, [completed(1, loss=1.0), completed(2, loss=2.0 + 1e-9)])
    assert [(one.name, one.killed) for one in found] == [("acc", "(none)"), ("loss", "2.000000001")]
    assert not compare(alone, [completed(2, loss=2.0 + 1e-9)], tolerance=1e-6)


def compared(one: dict[str, object], other: dict[str, object], tolerance: float) -> list[str]:
    with (
        holdfast.CheckpointManager("memory://one", store=MemoryStore("one")) as here,
        holdfast.CheckpointManager("memory://other", store=MemoryStore("other")) as there,
    ):
        here.save(1, one).result()
        there.save(1, other).result()
        comparison = here.compare(1, there, 1, values=bool(tolerance))
        return differing(comparison, tolerance)


def test_checkpoints_and_their_tolerance() -> None:
    model = {"w": torch.ones(2), "b": 2.0}
    assert compared({"model": model}, {"model": {**model}}, 0.0) == []
    near = {"w": torch.tensor([1.0, 1.0 + 1e-6]), "b": 2.0 + 1e-6}
    assert compared({"model": model}, {"model": near}, 0.0) == ["model/w", "model/b"]
    assert compared({"model": model}, {"model": near}, 1e-3) == []
    assert compared({"model": model}, {"model": {**near, "more": 1}}, 1e-3) == ["model/more"]
    nan = {"w": torch.tensor([1.0, float("nan")]), "b": "2.0"}
    assert compared({"model": model}, {"model": nan}, 1e3) == ["model/w", "model/b"]


def test_the_first_difference_is_named_where_no_variable_is() -> None:
    found = [
        Difference("state", "model/w", 10, None),
        Difference("metric", "loss", 7, 5),
        Difference("data", "epochs#0/batches#0", 7, 5),
    ]
    [cause] = causes(found)
    assert (cause.name, cause.kind, cause.step) == ("batches", "data", 7)
    assert "run.batches" in cause.remedy
    [cause] = causes(found[:2])
    assert (cause.kind, cause.name) == ("metric", "loss")
    assert "not tracked" in cause.remedy
    assert "DistributedDataParallel" not in cause.remedy
    [cause] = causes(found[:2], ranks=4)
    assert "DistributedDataParallel" in cause.remedy


def test_what_a_callback_forgets_is_told_with_the_way_to_keep_it() -> None:
    one = Difference(
        "variable", "Counter.seen", 3, 3, "number", alone="3", killed="0", by_framework=True
    )
    [cause] = causes([one])
    assert (cause.name, cause.why) == ("Counter.seen", "is 0 after a resume, and 3 without")
    assert cause.remedy == (
        "Give it state_dict and load_state_dict, and track it: run.track(Counter=Counter)."
    )
