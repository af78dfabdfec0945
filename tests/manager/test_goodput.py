"""Where a run's time went, from its events alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.interval import Failures
from holdfast.manager.goodput import Goodput, failures, goodput
from holdfast.manager.history import (
    BeatEvent,
    EndEvent,
    Event,
    FallbackEvent,
    NoticeEvent,
    RestoreEvent,
    SaveEvent,
    StartEvent,
)

PARTS = ("productive_s", "saving_s", "replay_s", "restart_s", "unknown_s")


def start(epoch: int, time_s: float, step: int, began_s: float, **more: Any) -> StartEvent:
    more = {"pid": epoch + 100, "beat_s": 30.0, **more}
    return StartEvent(epoch=epoch, time_s=time_s, step=step, began_s=began_s, **more)


def save(epoch: int, time_s: float, step: int, stall_s: float = 0.0, **more: Any) -> SaveEvent:
    return SaveEvent(epoch=epoch, time_s=time_s, step=step, capture_s=stall_s, **more)


def beat(epoch: int, time_s: float, step: int) -> BeatEvent:
    return BeatEvent(epoch=epoch, time_s=time_s, step=step)


def end(epoch: int, time_s: float, why: str, step: int = 0, **more: Any) -> EndEvent:
    more = {"pid": epoch + 100, **more}
    return EndEvent(epoch=epoch, time_s=time_s, why=why, step=step, **more)


def found(events: Sequence[Event], **more: Any) -> Goodput:
    result = goodput(events, **more)
    assert result is not None
    return result


def parts(result: Any) -> dict[str, float]:
    return {name: getattr(result, name) for name in PARTS}


KILLED_ONCE = [
    start(1, 10, 0, began_s=0),
    save(1, 110, 100, stall_s=2),
    beat(1, 150, 140),
    end(1, 160, "killed", signal=9),
    RestoreEvent(epoch=2, time_s=185, step=100, id="a", total_s=5, nbytes=1),
    start(2, 190, 100, began_s=180),
    end(2, 300, "finished", step=210),
]


def test_a_run_that_was_killed_once() -> None:
    result = found(KILLED_ONCE)
    first, second = result.attempts
    assert first.productive_s == 100, "to the save of step 100"
    assert first.saving_s == 2
    assert first.replay_s == 48, "from behind that save to the death"
    assert (first.to_step, first.kept_step, first.replayed_steps) == (140, 100, 40)
    assert first.down_s == 20
    assert (first.startup_s, second.startup_s) == (10, 10)
    assert second.productive_s == 110
    assert parts(result) == {
        "productive_s": 210,
        "saving_s": 2,
        "replay_s": 48,
        "restart_s": 40,
        "unknown_s": 0,
    }
    assert result.wall_s == 300
    assert result.fraction == pytest.approx(0.7)
    assert result.failures == {"killed": 1}
    assert failures(KILLED_ONCE) == Failures(1, 260)


def test_without_a_word_of_the_end_a_beats_time_is_unknown() -> None:
    events = [event for event in KILLED_ONCE if not (isinstance(event, EndEvent) and event.signal)]
    result = found(events)
    first = result.attempts[0]
    assert (first.end, first.end_s) == ("crashed", 150)
    assert first.replay_s == 38
    assert first.unknown_s == 30, "of the 30 s between the last beat and the next process"
    assert result.wall_s == 300
    # No beats: nothing is known of the time behind the save.
    bare = [event for event in events if not isinstance(event, BeatEvent | StartEvent)]
    bare += [start(1, 10, 0, began_s=0, beat_s=0), start(2, 190, 100, began_s=180)]
    result = found(bare)
    assert result.attempts[0].unknown_s == 68
    assert result.attempts[0].replay_s == 0
    assert result.wall_s == 300


def test_a_step_between_two_signs_of_life_is_where_a_steady_pace_puts_it() -> None:
    events = [
        start(1, 0, 0, began_s=0),
        beat(1, 100, 100),
        end(1, 200, "preempted", 200),
        start(2, 200, 150, began_s=200),
    ]
    first = found(events).attempts[0]
    assert (first.productive_s, first.replay_s, first.replayed_steps) == (150, 50, 50)


def test_steps_that_nobody_counted_are_lost_with_their_time() -> None:
    """Killed between two beats; who saw it knows when, but not at which step."""
    events = [
        start(1, 0, 0, began_s=0),
        save(1, 100, 100),
        end(1, 120, "killed"),
        start(2, 120, 100, began_s=120),
    ]
    first = found(events).attempts[0]
    assert (first.productive_s, first.replay_s, first.replayed_steps) == (100, 20, 0)
    events[2] = end(1, 120, "killed", 100)
    assert found(events).attempts[0].replay_s == 20, "a supervisor hears of steps with a delay"
    events[2] = end(1, 120, "error", 100)
    assert found(events).attempts[0].replay_s == 0, "it was at that step"


def test_what_a_later_attempt_does_again_is_lost_in_every_earlier_one() -> None:
    """The newest checkpoints were damaged: a restore fell back behind an attempt's start."""
    events = [
        start(1, 0, 0, began_s=0),
        end(1, 100, "killed", 100),
        start(2, 100, 80, began_s=100),
        end(2, 150, "killed", 130),
        FallbackEvent(epoch=3, time_s=150, step=40, id="b", skipped=2),
        start(3, 150, 40, began_s=150),
        end(3, 160, "finished", 50),
    ]
    result = found(events)
    assert [one.productive_s for one in result.attempts] == [40, 0, 10]
    assert [one.replay_s for one in result.attempts] == [60, 50, 0]
    assert result.replayed_steps == 60 + 50
    assert result.fallbacks == 1


@pytest.mark.parametrize("why", ["finished", "interrupted", "closed"])
def test_a_pause_that_somebody_wanted_is_no_part_of_the_time(why: str) -> None:
    events = [
        start(1, 0, 0, began_s=0),
        end(1, 100, why, 100),
        start(2, 1010, 100, began_s=1000),
        end(2, 1100, "finished", 190),
    ]
    result = found(events)
    assert (result.wall_s, result.paused_s) == (200, 900)
    assert result.failures == {}
    assert failures(events) == Failures(0, 190)


@pytest.mark.parametrize("why", ["preempted", "error", "killed", "exited", "hang", "timeout", "x"])
def test_other_ends_are_failures(why: str) -> None:
    events = [
        start(1, 0, 0, began_s=0),
        beat(1, 100, 100),
        end(1, 100, why, 100),
        start(2, 120, 100, began_s=110),
    ]
    result = found(events)
    assert result.failures == {why: 1, "crashed": 1}, "and the second has not ended"
    assert failures(events, running=2).count == 1
    assert result.restart_s == 20


def test_a_hang_is_no_training() -> None:
    events = [
        start(1, 0, 0, began_s=0),
        beat(1, 60, 60),
        end(1, 660, "error", 60),
        end(1, 661, "hang", signal=9),
    ]
    first = found(events).attempts[0]
    assert (first.end, first.productive_s, first.down_s) == ("hang", 60, 600)


def test_of_two_words_about_one_end_the_better_informed_counts() -> None:
    own = end(1, 100, "preempted", 100, exit_code=75)
    seen = end(1, 101, "exited", exit_code=75)
    [first] = found([start(1, 0, 0, began_s=0), seen, own]).attempts
    assert (first.end, first.end_s, first.exit_code) == ("preempted", 100, 75)


def test_the_end_of_a_process_that_never_came_to_the_loop_is_not_that_of_the_one_before() -> None:
    events = [start(1, 0, 0, began_s=0), beat(1, 90, 90), end(1, 500, "exited", pid=7)]
    [first] = found(events).attempts
    assert (first.end, first.end_s) == ("crashed", 90)


def test_a_live_run_goes_on_until_now() -> None:
    events = [start(1, 10, 0, began_s=0), save(1, 60, 50)]
    [first] = found(events, now_s=100.0, running=1).attempts
    assert (first.end, first.productive_s) == ("running", 90)
    rate = found(events, running=1)
    assert (rate.attempts[0].end, rate.attempts[0].productive_s) == ("unknown", 50)
    assert rate.failures == {}
    assert failures(events, running=1).count == 0
    [first] = found(events, now_s=100.0, running=2).attempts
    assert (first.end, first.productive_s) == ("crashed", 50)


def test_time_in_which_a_writer_without_a_start_trained_is_unknown() -> None:
    events = [
        start(1, 0, 0, began_s=0),
        end(1, 100, "killed", 100),
        save(2, 150, 140),
        start(3, 200, 140, began_s=190),
    ]
    assert found(events).attempts[0].unknown_s == 90
    without = [event for event in events if event.epoch != 2]
    assert found(without).attempts[0].unknown_s == 90, "its lines may be lost"


def test_older_runs_have_none() -> None:
    assert (
        goodput([save(1, 10, 1), RestoreEvent(time_s=1, step=1, id="", total_s=1, nbytes=1)])
        is None
    )
    assert goodput([]) is None
    assert failures([save(1, 10, 1)]) == Failures(0, 0.0)


def test_clocks_that_differ_between_hosts_make_no_negative_time() -> None:
    events = [
        start(1, 10_000, 0, began_s=9_990),
        end(1, 10_100, "preempted", 100),
        start(2, 5_020, 100, began_s=5_000),
        end(2, 5_120, "finished", 200),
    ]
    result = found(events)
    assert parts(result) == {
        "productive_s": 200,
        "saving_s": 0,
        "replay_s": 0,
        "restart_s": 30,
        "unknown_s": 0,
    }


# -- any events ---------------------------------------------------------------

TIMES = st.floats(-1e13, 1e13) | st.integers(0, 1000).map(float)
SMALL = st.integers(0, 50)
EPOCHS = st.integers(0, 5)
SECONDS = st.floats(0, 1e12)
WHY = st.sampled_from(["finished", "preempted", "killed", "hang", "closed", "exited", "later"])
EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.builds(
        StartEvent, time_s=TIMES, step=SMALL, began_s=TIMES, epoch=EPOCHS, beat_s=SECONDS, pid=SMALL
    ),
    st.builds(BeatEvent, time_s=TIMES, step=SMALL, epoch=EPOCHS),
    st.builds(
        SaveEvent, time_s=TIMES, step=SMALL, epoch=EPOCHS, capture_s=SECONDS, waited_s=SECONDS
    ),
    st.builds(EndEvent, time_s=TIMES, why=WHY, step=SMALL, epoch=EPOCHS, pid=SMALL),
    st.builds(NoticeEvent, time_s=TIMES, source=st.just("x"), epoch=EPOCHS),
)


@given(st.lists(EVENTS, max_size=15), st.randoms(use_true_random=False), st.none() | TIMES)
def test_the_parts_come_to_the_whole(
    events: list[Event], order: random.Random, now_s: float | None
) -> None:
    """Whatever is missing or wrong; and in any order."""
    result = goodput(events, now_s=now_s, running=3)
    if result is None:
        return
    assert sum(parts(result).values()) == pytest.approx(result.wall_s)
    assert all(seconds >= 0 for seconds in (*parts(result).values(), result.paused_s))
    assert result.restart_s == pytest.approx(result.down_s + result.startup_s)
    assert result.fraction is None or 0 <= result.fraction <= 1
    assert all(one.replayed_steps >= 0 for one in result.attempts)
    shuffled = list(events)
    order.shuffle(shuffled)
    again = found(shuffled, now_s=now_s, running=3)
    assert again.wall_s == pytest.approx(result.wall_s)
    rate = failures(events)
    assert rate.count <= len(result.attempts)
    assert rate.observed_s >= 0


LIVES = st.lists(
    st.tuples(
        st.integers(0, 20),  # down
        st.integers(0, 9),  # start-up
        st.integers(1, 100),  # steps, one per second
        st.integers(0, 100),  # of which are saved
        st.booleans(),  # somebody saw it end
    ),
    min_size=1,
    max_size=8,
)


@given(LIVES)
def test_of_a_life_that_is_known_every_second_is_accounted_for(
    lives: list[tuple[int, int, int, int, bool]],
) -> None:
    """From the first start to the last end, on one clock, and each in the right part."""
    events: list[Event] = []
    now, step, productive, lost, starting = 0, 0, 0, 0, 0
    for epoch, (down, startup, steps, saved, seen) in enumerate(lives, start=1):
        now += down if events else 0
        events.append(start(epoch, now + startup, step, began_s=now))
        now += startup
        starting += startup
        last = epoch == len(lives)
        kept = steps if last else min(saved, steps)
        if kept:
            events.append(save(epoch, now + kept, step + kept))
        now += steps
        events.append(beat(epoch, now, step + steps))
        if seen or last:
            events.append(end(epoch, now, "finished" if last else "killed"))
        step += kept
        productive += kept
        lost += steps - kept
    result = found(events)
    assert result.wall_s == pytest.approx(now)
    assert result.productive_s == pytest.approx(productive)
    assert result.replay_s == pytest.approx(lost)
    assert result.replayed_steps == lost
    assert result.startup_s == pytest.approx(starting)
