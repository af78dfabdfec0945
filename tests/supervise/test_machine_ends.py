"""What the supervisor makes of how a command ended, or of what ended it."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest

from holdfast.supervise.machine import (
    Begun,
    Dumped,
    Exit,
    Life,
    Record,
    Requeue,
    SaveStacks,
    Signalled,
)
from holdfast.supervise.rules import Rules
from tests.supervise.play import Play


@pytest.mark.parametrize(("status", "why"), [(137, "killed"), (9, "exited"), (0, None), (75, None)])
def test_ends_that_the_process_could_not_tell_are_told_for_it(status: int, why: str | None) -> None:
    play = Play()
    play.start()
    begun = Begun("run", 101, 7)
    other = Begun("other", 102, 9, over=True)
    play.life = Life(1, True, "run", "training", 7, began=(begun, other))
    actions = play.end(status)
    assert actions[:1] == ([Record(why, status, (begun,))] if why else actions[:1])
    assert why or not any(isinstance(action, Record) for action in actions)


def test_a_hang_is_told_as_one_whatever_the_status() -> None:
    play = Play(hang_timeout_s=60.0)
    play.start()
    begun = Begun("run", 101, 7)
    play.life = Life(1, True, "run", "training", 7, began=(begun,))
    assert play.watch(100.0) == [SaveStacks(1)]
    play.give(Dumped(play.now_s, ""))
    # It could still save, and said so: that it hung it did not know.
    play.life = replace(play.life, began=(replace(begun, over=True),))
    assert play.end(75) == [Record("hang", 75, play.life.began)]


def test_a_launcher_that_hides_a_preemption() -> None:
    play = Play(requeue=True)
    play.start()
    play.give(Signalled(1.0, signal.SIGUSR1))
    play.life = Life(3, False, "run", "ended", 7, left=75)
    assert play.end(1) == [Requeue(), Exit(75)]


def test_a_launcher_that_dies_of_the_warning_is_not_asked() -> None:
    """Slurm sends SIGUSR1 to every process of a step, also to a `torchrun`."""
    play = Play(requeue=True)
    play.start()
    play.give(Signalled(play.now_s, signal.SIGUSR1))
    play.life = Life(3, False, "run", "ended", 7, left=75)
    assert play.end(128 + signal.SIGUSR1) == [Requeue(), Exit(75)]
    play = Play(requeue=True)
    play.start()
    play.life = Life(3, False, "run", "ended", 7, left=75)
    assert play.end(128 + signal.SIGSEGV) == [], "nobody had warned it"


def test_what_dies_of_the_warning_while_it_starts_again_is_requeued() -> None:
    """Slurm's signal comes to every process of a step, and one that imports has no handler yet.
    Only where there is something to go on with: else it might die of it each time."""
    for saved in (True, False):
        play = Play(requeue=True)
        play.start()
        if saved:
            play.beat(checkpoint=7)
        play.end(1)
        play.start()
        play.give(Signalled(play.now_s, signal.SIGUSR1))
        end = Exit(128 + signal.SIGUSR1)
        assert play.end(128 + signal.SIGUSR1) == ([Requeue(), end] if saved else [end])


def test_what_a_notice_has_ended_is_not_started_again() -> None:
    """Another attempt on the same machine would hear the same."""
    left = Life(3, False, "run", "ended", 7, left=75, notice="AWS spot")
    play = Play()
    play.start()
    play.life = left
    assert play.end(75) == [Exit(75)]
    assert "the notice of AWS spot had asked for it" in play.lines[-1]
    play = Play(rules=Rules.parse(["75=restart"]))
    play.start()
    play.life = left
    assert play.end(75) == []
    play = Play()
    play.start()
    play.life = replace(left, notice="")
    assert play.end(75) == [], "somebody sent the training itself a signal"
