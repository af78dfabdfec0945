"""What a run does about notices: of the machine's end, of what may come, of a time limit."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import holdfast
from holdfast.notices.notice import Notice
from holdfast.run.costs import Costs
from holdfast.run.deadline import Cost, Deadline, p95_s, slack_s
from holdfast.run.time_limit import TimeLimit
from tests.support.notices import Told
from tests.support.programs import Program

SPOT = "the instance will terminate at 10:00:00Z"


@contextlib.contextmanager
def running(path: Path, told: Told, **options: object) -> Iterator[holdfast.Run]:
    run = holdfast.Run(path, **{"every": None, "keep": None, **options})
    run._session.stopping._listen = told.listen
    try:
        yield run
    finally:
        run.close()
    assert told.listeners == []


def saved(path: Path) -> list[tuple[int, str]]:
    with holdfast.CheckpointManager(path) as manager:
        return [(info.step, info.note) for info in manager.checkpoints()]


def test_a_notice_stops_the_loop_at_its_next_boundary(tmp_path: Path, capfd) -> None:
    told = Told()
    with running(tmp_path / "run", told) as run, pytest.raises(SystemExit) as caught:
        run.track(values=[])
        for step in run.range(5):
            if step == 1:
                told.tell(Notice("AWS spot", SPOT, time.time() + 120))
            assert step < 2
    assert caught.value.code == 75
    err = capfd.readouterr().err
    assert f"AWS spot: {SPOT}: finishing this step, then saving\n" in err
    assert "AWS spot: saved step 2; run the same command again to go on" in err
    assert saved(tmp_path / "run") == [(2, "preempted")]


def test_a_notice_that_stops_nothing_saves_and_goes_on(tmp_path: Path, capfd) -> None:
    told = Told()
    with running(tmp_path / "run", told) as run:
        run.track(values=[])
        for step in run.range(4):
            if step == 1:
                told.tell(Notice("AWS rebalance", "elevated risk", stops=False))
    line = "AWS rebalance: elevated risk: saving when this step is complete, and going on"
    assert line in capfd.readouterr().err
    assert saved(tmp_path / "run") == [(2, "notice"), (4, "final")]


def test_the_earliest_deadline_of_several_notices_counts(tmp_path: Path, capfd) -> None:
    told, now = Told(), time.time()
    with running(tmp_path / "run", told) as run, pytest.raises(SystemExit):
        run.track(values=[])
        for step in run.range(5):
            if step == 1:
                for seconds in (300, 60, 120):
                    told.tell(Notice("Azure", f"in {seconds} s", now + seconds))
                deadline = run._session.stopping.deadline
                assert deadline is not None
                assert deadline.said
                assert 50 < deadline.at_s - time.monotonic() <= 60
    assert capfd.readouterr().err.count("finishing this step") == 1
    assert saved(tmp_path / "run") == [(2, "preempted")]


def test_a_notice_without_a_deadline_is_as_a_signal(tmp_path: Path) -> None:
    told = Told()
    with running(tmp_path / "run", told, grace=45) as run, pytest.raises(SystemExit):
        run.track(values=[])
        for _ in run.range(5):
            told.tell(Notice("GCP", "preempted"))
            deadline = run._session.stopping.deadline
            assert deadline is not None
            assert deadline.said
            assert 40 < deadline.at_s - time.monotonic() <= 45


def test_a_signal_after_a_notice_may_bring_the_deadline_forward(tmp_path: Path) -> None:
    """Kubernetes evicts a pod from a spot node: SIGTERM comes after the cloud's notice."""
    told = Told()
    with running(tmp_path / "run", told, grace=20) as run, pytest.raises(SystemExit):
        run.track(values=[])
        for _ in run.range(5):
            stopping = run._session.stopping
            told.tell(Notice("AWS spot", SPOT, time.time() + 120))
            assert stopping.deadline is not None
            assert stopping.deadline.at_s - time.monotonic() > 100
            for _ in range(2):
                signal.raise_signal(signal.SIGTERM)
                assert stopping.deadline.at_s - time.monotonic() <= 20
    assert saved(tmp_path / "run") == [(1, "preempted")]


def test_a_deadline_that_is_too_near_for_a_save(tmp_path: Path, capfd) -> None:
    told = Told()
    with running(tmp_path / "run", told) as run, pytest.raises(SystemExit) as caught:
        run.track(values=[])
        run._session.saves.costs._own.append(Cost(41.0, 0, blocked=True))
        for step in run.range(5):
            if step == 2:
                told.tell(Notice("AWS spot", SPOT, time.time() + 30))
    assert caught.value.code == 75
    err = capfd.readouterr().err
    assert "AWS spot: no save was begun, for it takes 41.0 s (p95) and " in err
    assert "there is no checkpoint, and 3 steps will run again" in err
    assert saved(tmp_path / "run") == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_loop_in_another_thread_stops(tmp_path: Path, capfd) -> None:
    told, left = Told(), []

    def train() -> None:
        with running(tmp_path / "run", told) as run:
            run.track(values=[])
            try:
                for _ in run.range(5):
                    told.tell(Notice("AWS spot", SPOT))
            except SystemExit as error:
                left.append(error.code)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert left == [75]
    assert saved(tmp_path / "run") == [(1, "preempted")]
    assert "signals will not be waited for" in capfd.readouterr().err


def test_two_runs_of_one_process_both_stop(tmp_path: Path) -> None:
    told = Told()
    with running(tmp_path / "one", told) as one, running(tmp_path / "two", told) as two:
        one.track(values=[])
        two.track(values=[])
        with pytest.raises(SystemExit):
            for _ in one.range(3):
                with pytest.raises(SystemExit):
                    for step in two.range(3):
                        if step == 1:
                            told.tell(Notice("AWS spot", SPOT))
    assert saved(tmp_path / "one") == [(1, "preempted")]
    assert saved(tmp_path / "two") == [(2, "preempted")]


def test_a_run_listens_again_in_its_next_loop(tmp_path: Path) -> None:
    told = Told()
    with running(tmp_path / "run", told) as run:
        run.track(values=[])
        for _ in run.range(2):
            assert len(told.listeners) == 1
        assert told.listeners == []
        with pytest.raises(SystemExit):
            for _ in run.range(2):
                told.tell(Notice("AWS spot", SPOT))
    assert saved(tmp_path / "run")[-1] == (3, "preempted")


def limit(left_s: float, costs: list[Cost]) -> tuple[TimeLimit, list[float]]:
    now = [1000.0]
    known = Costs(list)
    known._own.extend(costs)
    end = now[0] + left_s
    ends = TimeLimit(lambda: end, known, clock=lambda: now[0], wall=lambda: now[0])
    return ends, now


@pytest.mark.parametrize("step_s", [0.3, 7.0, 50.0])
def test_the_last_save_before_a_time_limit_is_at_the_last_boundary_that_leaves_time_for_it(
    step_s: float,
) -> None:
    costs = [Cost(5.0, 0, blocked=True)]
    ends, now = limit(3600.0, costs)
    while (notice := ends.boundary()) is None:
        now[0] += step_s
    deadline = Deadline(4600.0, said=True)
    assert notice.stops
    assert notice.deadline_s == 4600.0
    assert "this job ends at" in notice.text
    save_s = p95_s(costs)
    assert slack_s(now[0], deadline, save_s, 0.0) >= 0  # it fits here
    assert slack_s(now[0], deadline, save_s, step_s) < 0  # and would not, a step later


def test_a_longer_step_moves_the_last_save_forward() -> None:
    ends, now = limit(3600.0, [Cost(5.0, 0, blocked=True)])
    for step_s in (1.0, 600.0, 1.0):
        assert ends.boundary() is None
        now[0] += step_s
    while ends.boundary() is None:
        now[0] += 1.0
    # The long one has been followed by more than 64 others: it is not counted any more.
    assert 4600.0 - now[0] == pytest.approx(6.0, abs=1.5)
    ends, now = limit(1000.0, [Cost(5.0, 0, blocked=True)])
    for step_s in (1.0, 600.0):
        assert ends.boundary() is None
        now[0] += step_s
    assert ends.boundary() is not None


def test_a_time_limit_that_is_over_or_unknown_stops_nothing() -> None:
    ends, _ = limit(-5.0, [])
    assert ends.boundary() is None
    assert TimeLimit(lambda: None, Costs(list)).boundary() is None


STEPS = """
for index in run.range(100_000):
    values.append(index)
    if index == 2:
        say("ready")
    time.sleep(0.02)
"""


def test_a_file_that_appears_stops_a_program(monkeypatch, tmp_path: Path) -> None:
    notice = tmp_path / "notice"
    monkeypatch.setenv("HOLDFAST_NOTICES", "file")
    monkeypatch.setenv("HOLDFAST_NOTICE_FILE", str(notice))
    program = Program(tmp_path, STEPS)
    program.start()
    notice.touch()
    code, _, err = program.end()
    assert code == 75
    assert "notice file: the machine will be taken away" in err
    [(step, note)] = program.saved()
    assert note == "preempted"
    assert f"notice file: saved step {step:,}; run the same command" in err


def test_a_slurm_job_saves_before_its_time_is_over(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOLDFAST_NOTICES", "slurm")
    monkeypatch.setenv("SLURM_JOB_END_TIME", f"{time.time() + 35:.0f}")
    program = Program(tmp_path, STEPS)
    program.start()
    code, _, err = program.end()
    assert code == 75
    assert "this job ends at " in err
    assert [note for _, note in program.saved()] == ["preempted"]
