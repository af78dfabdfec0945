from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from holdfast.core.retention import parse_keep
from holdfast.core.schedule import parse_every
from holdfast.run.triggers import Triggers


def triggers(every: Any = None, keep: str | None = None, records: Any = ()) -> Triggers:
    made = Triggers(parse_every(every), parse_keep(keep), lambda: records)
    made.start(None, 0.0)
    return made


def record(step: int, **metrics: float) -> Any:
    return SimpleNamespace(step=step, ordinal=step, metrics=metrics)


def due(made: Triggers, step: int, now: float = 0.0, *, epoch_end=False, last=False) -> str:
    return made.due(step, now, epoch_end=epoch_end, last=last)


def test_steps_and_time() -> None:
    made = triggers("10s 5")
    assert due(made, 4, 9.0) == ""
    assert due(made, 5, 9.0) == "every=5"
    made.saved(5, 9.0)
    assert due(made, 6, 18.0) == ""
    assert due(made, 7, 19.0) == "every=10s"


def test_a_save_due_after_the_last_item_is_held() -> None:
    made = triggers(5)
    assert due(made, 5, last=True) == ""
    assert due(made, 5, epoch_end=True) == "every=5"
    made.saved(5, 0.0)
    assert due(made, 6) == ""


def test_a_wish_is_held_until_it_was_done() -> None:
    made = triggers()
    made.want("asked")
    assert due(made, 1, last=True) == ""
    assert due(made, 1) == "asked"
    assert due(made, 2) == "asked"  # was not possible there
    made.saved(2, 0.0)
    assert due(made, 3) == ""


def test_best() -> None:
    made = triggers(keep="best=1:loss best=1:acc:max", records=[record(1, loss=0.5, acc=0.5)])
    assert not made.improves({"other": 0.1})
    assert not made.improves({"loss": 0.6})
    assert made.improves({"loss": 0.4})
    assert made.improves({"acc": 0.6})
    assert not made.improves({"loss": float("nan")})
    made.committed(record(2, loss=0.3))
    assert not made.improves({"loss": 0.4})
    assert made.best_metric == ("loss", "min")


def test_each_checkpoint_is_ranked_once() -> None:
    """And not all of them again for each metric that is logged."""
    reads = 0

    class Metrics(dict[str, float]):
        def get(self, name: str, default: Any = None) -> Any:
            nonlocal reads
            reads += 1
            return super().get(name, default)

    def counted(step: int, loss: float) -> Any:
        return SimpleNamespace(step=step, ordinal=step, metrics=Metrics(loss=loss))

    checkpoints = [counted(step, 1 / step) for step in range(1, 10_001)]
    made = triggers(keep="best=3:loss", records=checkpoints)
    for number in range(1_000):
        assert not made.improves({"loss": 1.0})
        if number % 10 == 0:
            made.committed(counted(20_000 + number, 0.5))
    assert len(checkpoints) <= reads <= len(checkpoints) + 100 * 5


def test_metrics_that_no_rule_names_are_not_read() -> None:
    class Unreadable:
        def __float__(self) -> float:
            raise AssertionError("waited for a device")

    made = triggers(keep="best=1:val_loss")
    assert not made.improves({"loss": Unreadable()})
    assert made.improves({"loss": Unreadable(), "val_loss": 1.0})
