"""The matrix notices what it is there for: each of these faults turns a program red."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import holdfast
import holdfast.run.engine as engine
import holdfast.run.position as at
import holdfast.run.session as session
from holdfast.run.feeds import FeedBook
from holdfast.run.gradients import Accumulation
from holdfast.run.metrics import MetricBook
from holdfast.run.random_states import RandomStates
from holdfast.run.tracking import Tracked
from tests.matrix import check as checks
from tests.matrix.check import check_at, crashed, killed, left_alone, stopped_then_killed
from tests.matrix.programs import PROGRAMS

Patch = pytest.MonkeyPatch


def random_states_of_marks_are_not_applied(patch: Patch) -> None:
    patch.setattr(RandomStates, "apply", lambda self, states: None)


def the_tail_is_not_run(patch: Patch) -> None:
    def without_tail(position: at.Position) -> at.Replay:
        pending = position.frames and position.top.phase == "tail"
        return at.Replay(at.complete(position) if pending else position)

    patch.setattr(session, "Replay", without_tail)


def what_the_prologue_did_is_not_undone(patch: Patch) -> None:
    patch.setattr(session.Session, "land", lambda self, *, over, rng: None)


def the_box_is_not_saved(patch: Patch) -> None:
    whole = Tracked.state
    patch.setattr(
        Tracked, "state", lambda self: {k: v for k, v in whole(self).items() if k != "box"}
    )


def loaders_start_anew_between_epochs(patch: Patch) -> None:
    patch.setattr(FeedBook, "states", lambda self, feeds: {})


def the_epoch_starts_anew(patch: Patch) -> None:
    patch.setattr(engine.Engine, "snapshot", lambda self: self.position)


def gradients_are_not_put_back(patch: Patch) -> None:
    patch.setattr(Accumulation, "restore", lambda self, state: None)


def metrics_are_those_of_the_prologue_that_ran_again(patch: Patch) -> None:
    patch.setattr(MetricBook, "restore", lambda self, tree, known: None)


def an_exception_finishes_the_run(patch: Patch) -> None:
    whole = holdfast.Run.__exit__
    patch.setattr(holdfast.Run, "__exit__", lambda self, *error: whole(self, None, None, None))


FAULTS: list[tuple[Callable[[Patch], None], str, Callable[[int], checks.Ending]]] = [
    (random_states_of_marks_are_not_applied, "rule_03_prologue", killed),
    (random_states_of_marks_are_not_applied, "rule_12_loops_by_order", killed),
    (the_tail_is_not_run, "rule_04_tail", stopped_then_killed),
    (what_the_prologue_did_is_not_undone, "rule_03_prologue", killed),
    (the_box_is_not_saved, "rule_20_box", killed),
    (loaders_start_anew_between_epochs, "rule_27_persistent_workers", killed),
    (the_epoch_starts_anew, "rule_01_iterators", killed),
    (gradients_are_not_put_back, "rule_15_gradient_accumulation", stopped_then_killed),
    (metrics_are_those_of_the_prologue_that_ran_again, "rule_16_metrics_after_a_loop", killed),
    (an_exception_finishes_the_run, "rule_09_exceptions", crashed),
]


@pytest.mark.parametrize(("fault", "name", "ending"), FAULTS)
def test_a_fault_is_noticed(
    fault: Callable[[Patch], None],
    name: str,
    ending: Callable[[int], checks.Ending],
    monkeypatch: Patch,
) -> None:
    program = PROGRAMS[name]
    whole = left_alone(program, workers=0)  # the matrix itself shows that it is green now
    fault(monkeypatch)
    with pytest.raises(AssertionError, match=r"differ|did not come to its end|before the end"):
        check_at(program, whole, range(len(whole.places)), ending)
