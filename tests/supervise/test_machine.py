"""What the supervisor decides: no process, no clock."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from holdfast.supervise import machine
from holdfast.supervise.machine import (
    Action,
    Dumped,
    Exit,
    Exited,
    Forward,
    Kill,
    Life,
    PassedOn,
    Requeue,
    SaveStacks,
    Send,
    Signalled,
    Start,
    Started,
    Watched,
)
from holdfast.supervise.rules import Rules
from tests.supervise.play import Play


def test_a_command_that_ends_well_is_done() -> None:
    play = Play()
    play.start()
    assert play.end(0) == [Exit(0)]
    assert play.give(Watched(100.0)) == []


@pytest.mark.parametrize(
    ("status", "restarted"), [(1, True), (75, True), (137, True), (2, False), (127, False)]
)
def test_which_statuses_are_worth_a_restart(status: int, restarted: bool) -> None:
    play = Play()
    play.start()
    assert play.end(status) == ([] if restarted else [Exit(status)])


def test_rules_come_before_the_defaults() -> None:
    play = Play(rules=Rules.parse(["1-9=stop", "0,2=restart"]))
    play.start()
    assert play.end(2) == []
    play.start()
    assert play.end(0) == []
    play.start()
    assert play.end(3) == [Exit(3)]


def test_a_crash_loop_ends_for_lack_of_progress() -> None:
    """However long it had gone on: here after 20 restarts with a new checkpoint each."""
    play = Play(max_stuck=3)
    for step in range(20):
        play.start()
        play.beat(step, checkpoint=step)
        assert play.end(1) == []
    for _ in range(3):
        play.start()
        play.beat(19, checkpoint=19)  # where it went on from, or was saved again
        assert play.end(1) == []
    play.start()
    play.beat(19, checkpoint=18)
    assert play.end(1) == [Exit(1)]
    assert play.lines[-1].endswith("no new checkpoint in 3 restarts: giving up")


def test_what_never_came_to_its_loop_is_tried_a_few_times() -> None:
    play = Play(max_stuck=2)
    for _ in range(2):
        play.start()
        assert play.end(1) == []
    play.start()
    assert play.end(1) == [Exit(1)]
    assert play.now_s < 10


def test_a_command_without_a_heartbeat_gets_on_by_running() -> None:
    play = Play(max_stuck=0)
    for _ in range(5):
        play.start()
        assert play.watch(machine.UNHEARD_PROGRESS_S, each_s=5.0) == []
        assert play.end(1) == []
    play.start()
    assert play.end(1) == [Exit(1)]


def test_waits_grow_and_progress_ends_that() -> None:
    play = Play(max_stuck=9, longest_backoff_s=10.0)
    waits: list[float] = []
    for _ in range(6):
        play.start()
        play.end(1)
        waits.append(play.wait_s())
    assert waits == [1, 2, 4, 8, 10, 10]
    play.start()
    play.beat(5, checkpoint=5)
    play.end(1)
    assert play.wait_s() == 1
    play.start()
    play.end(1, jitter=0.0)
    assert play.wait_s() == 0


def test_a_hang_is_ended_after_its_stacks_are_saved() -> None:
    play = Play(hang_timeout_s=60.0, grace_s=10.0)
    play.start()
    assert play.watch(300.0) == []  # no beat yet: it may be compiling, or loading data
    play.beat(7, checkpoint=6)
    assert play.watch(59.0) == []
    play.beat(8)
    assert play.watch(59.0) == []
    assert play.watch(2.0) == [SaveStacks(1)]
    assert play.watch(30.0) == []  # as long as that takes
    assert play.give(Dumped(play.now_s, "there/hang-1")) == [Send(signal.SIGTERM)]
    assert "stacks in there/hang-1" in play.lines[-1]
    assert play.watch(9.0) == []
    assert play.watch(1.0) == [Kill()]
    assert play.watch(99.0) == []
    assert play.end(137) == []
    play.start()
    assert play.lines[-1].endswith("goes on from step 6")


def test_a_hang_whose_command_answers_sigterm_with_0_is_not_done() -> None:
    play = Play(hang_timeout_s=60.0)
    play.start()
    play.beat()
    assert play.watch(60.0) == [SaveStacks(1)]
    play.give(Dumped(play.now_s, ""))
    assert play.end(0) == []


def test_after_its_loop_a_command_may_be_silent() -> None:
    play = Play(hang_timeout_s=60.0)
    play.start()
    play.beat()
    play.beat(phase="ended")
    assert play.watch(1000.0) == []


def test_the_time_in_which_the_supervisor_was_stopped_is_no_silence() -> None:
    play = Play(hang_timeout_s=60.0)
    play.start()
    play.beat()
    assert play.watch(50.0) == []
    assert play.watch(3600.0, each_s=3600.0) == []
    assert play.watch(9.0) == []
    assert play.watch(1.0) == [SaveStacks(1)]


def test_a_start_that_takes_too_long() -> None:
    play = Play(start_timeout_s=100.0)
    play.start()
    assert play.watch(100.0) == [SaveStacks(1)]
    assert play.give(Dumped(play.now_s, "")) == [Send(signal.SIGTERM)]
    play.end(143)
    play.start()
    play.beat()
    assert play.watch(500.0) == []


def test_an_attempt_that_takes_too_long_is_started_again() -> None:
    play = Play(timeout_s=100.0, grace_s=5.0)
    play.start()
    play.beat(1, checkpoint=1)
    assert play.watch(100.0) == [Send(signal.SIGTERM)]
    assert play.watch(5.0) == [Kill()]
    assert play.end(137) == []


def test_all_of_it_takes_too_long() -> None:
    play = Play(total_timeout_s=100.0)
    play.start()
    play.beat(1, checkpoint=1)
    assert play.watch(50.0) == []
    assert play.end(1) == []
    play.start()
    assert play.watch(50.0) == [Send(signal.SIGTERM)]
    assert play.end(75) == [Exit(124)]


def test_the_time_may_be_over_between_two_attempts() -> None:
    play = Play(total_timeout_s=10.0, max_stuck=9)
    while play.state.phase != "ended":
        play.now_s = max(play.now_s, play.state.start_at_s)
        actions = play.give(Watched(play.now_s))
        if actions == [Exit(124)]:
            break
        play.give(Started(play.now_s, 1))
        play.end(1)
    assert play.state.phase == "ended"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_is_passed_on_and_its_answer_is_the_end(number: signal.Signals) -> None:
    play = Play(hang_timeout_s=60.0, timeout_s=60.0)
    play.start()
    play.beat()
    assert play.give(Signalled(play.now_s, number)) == [Forward(number)]
    assert play.watch(100.0) == []  # a long save: who sent the signal decides how long it may take
    assert play.end(75) == [Exit(75)]


def test_a_second_ctrl_c_kills() -> None:
    play = Play()
    play.start()
    assert play.give(Signalled(1.0, signal.SIGINT)) == [Forward(signal.SIGINT)]
    assert play.give(Signalled(2.0, signal.SIGINT)) == [Kill()]
    assert play.end(137) == [Exit(137)]


def test_a_signal_between_two_attempts_ends_it() -> None:
    play = Play()
    play.start()
    play.end(1)
    assert play.give(Signalled(play.now_s, signal.SIGTERM)) == [Exit(143)]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_warning_that_is_answered_is_the_end_and_another_is_not(number: signal.Signals) -> None:
    play = Play()
    play.start()
    assert play.give(Signalled(1.0, number)) == [Forward(number)]
    assert play.end(1) == []  # a crash, hours later perhaps
    play.start()
    assert play.give(Signalled(play.now_s, number)) == [Forward(number)]
    assert play.end(75) == [Exit(75)]


def test_a_warning_that_a_later_attempt_hears_and_answers_is_the_end() -> None:
    play = Play()
    play.start()
    play.give(Signalled(1.0, signal.SIGUSR1))
    assert play.end(1) == []
    play.start()
    assert play.give(PassedOn(signal.SIGUSR1)) == []
    assert play.lines[-1] == "SIGUSR1 is handled now: passed on"
    assert play.end(75) == [Exit(75)]


def test_a_job_is_requeued_when_it_was_preempted() -> None:
    play = Play(requeue=True)
    play.start()
    play.give(Signalled(1.0, signal.SIGUSR1))
    assert play.end(75) == [Requeue(), Exit(75)]


def test_a_job_that_saw_its_deadline_itself_is_requeued() -> None:
    play = Play(requeue=True)
    play.start()
    assert play.end(75) == [Requeue(), Exit(75)]


def test_a_job_that_is_cancelled_is_not_requeued() -> None:
    """`scancel` sends SIGTERM."""
    play = Play(requeue=True)
    play.start()
    play.give(Signalled(1.0, signal.SIGTERM))
    assert play.end(75) == [Exit(75)]


def test_silence_is_told_where_nothing_is_done_about_it() -> None:
    play = Play()
    play.start()
    play.beat()
    assert play.watch(2000.0) == []
    assert [line for line in play.lines if "no heartbeat for 10 min" in line] == play.lines[1:]


def test_a_restart_that_gives_no_heartbeat_is_told() -> None:
    play = Play()
    play.start()
    assert play.watch(2000.0) == []  # as any command without a run
    play.beat(1, checkpoint=5)
    play.end(137)
    play.start()
    assert play.watch(500.0) == []
    assert not [line for line in play.lines if "no heartbeat" in line]
    assert play.watch(2000.0) == []
    told = [line for line in play.lines if "no heartbeat since it began, 10 min ago" in line]
    assert len(told) == 1
    assert "--start-timeout" in told[0]


def test_a_hang_timeout_without_a_heartbeat_is_told() -> None:
    play = Play(hang_timeout_s=5.0)
    play.start()
    assert play.watch(100.0) == []
    assert [line for line in play.lines if "no heartbeat so far" in line] == play.lines[1:]


SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]
MOMENTS = st.one_of(
    st.tuples(st.just("wait"), st.integers(1, 200)),
    st.tuples(st.just("beat"), st.integers(0, 5)),
    st.tuples(st.just("end"), st.sampled_from([0, 1, 2, 75, 137])),
    st.tuples(st.just("signal"), st.sampled_from(SIGNALS)),
    st.tuples(st.just("dumped"), st.just(0)),
)
TIMES = st.sampled_from([None, 50.0, 300.0])


@limits(max_examples=300, deadline=None)
@given(
    moments=st.lists(MOMENTS, max_size=40),
    hang_s=TIMES,
    timeout_s=TIMES,
    total_s=TIMES,
    requeue=st.booleans(),
)
def test_whatever_happens(
    moments: list[tuple[str, int]],
    hang_s: float | None,
    timeout_s: float | None,
    total_s: float | None,
    requeue: bool,
) -> None:
    """At most one attempt at a time; SIGKILL only after SIGTERM and its grace, or a second
    Ctrl-C; nothing is started after a stop was asked for; nothing follows the end."""
    play = Play(
        hang_timeout_s=hang_s, timeout_s=timeout_s, total_timeout_s=total_s, requeue=requeue
    )
    running = asked = over = False
    terminated_s: float | None = None
    interrupts = 0

    def check(actions: list[Action]) -> None:
        nonlocal running, over, terminated_s
        for action in actions:
            assert not over
            match action:
                case Start():
                    assert not running
                    assert not asked
                    running, terminated_s = True, None
                    play.life = Life()
                    check(play.give(Started(play.now_s, 1)))
                case Kill():
                    assert running
                    late = terminated_s is not None and play.now_s - terminated_s >= 30
                    assert late or interrupts > 1
                case Send() if not isinstance(action, Forward):
                    assert running
                    terminated_s = play.now_s
                case Exit():
                    over = True
                    assert not running
                case _:
                    pass

    for what, number in moments:
        match what:
            case "wait":
                for _ in range(number):
                    play.now_s += 1
                    check(play.give(Watched(play.now_s, play.life)))
            case "beat" if running:
                steps = (("run", number),)
                play.life = Life(play.life.beats + 1, True, "run", "training", number, steps)
                check(play.give(Watched(play.now_s, play.life)))
            case "end" if running:
                running = False
                check(play.give(Exited(play.now_s, number, play.life, 0.5)))
            case "signal" if not over:
                asked = asked or number != signal.SIGUSR1
                interrupts += number == signal.SIGINT
                check(play.give(Signalled(play.now_s, number)))
            case "dumped":
                check(play.give(Dumped(play.now_s, "there")))
            case _:
                pass
    assert play.state.stuck <= play.settings.max_stuck + 1
