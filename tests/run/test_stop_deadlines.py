"""Stops with a deadline: a last save is begun only if it fits, and the log says why not."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import holdfast
from tests.support.programs import Program

SLOW = """
from holdfast.stores.local import LocalStore

class Slow(LocalStore):
    def put_new(self, key, parts):
        time.sleep(0.4)
        return super().put_new(key, parts)

run.close()
run = holdfast.Run(sys.argv[1], every=None, keep=None, grace=1.2, store=Slow(sys.argv[1]))
run.track(values=values)
for index in run.range(5):
    values.append(index)
    if index == 0:
        run.save()
    if index == 3 and run.resumed is None:
        run.manager.wait()
        say("ready")
        wait()
say(values)
"""


def test_a_save_that_does_not_fit_is_not_begun(tmp_path: Path) -> None:
    program = Program(tmp_path, SLOW)
    os.kill(program.start().pid, signal.SIGTERM)
    code, _, err = program.end()
    assert code == 75
    assert "SIGTERM: no save was begun, for it takes" in err
    assert "the checkpoint of step 1 stands, and 3 steps will run again" in err
    assert program.saved() == [(1, "asked")]
    assert program.again()[1].strip() == "[0, 1, 2, 3, 4]"


def test_without_a_measured_save_it_is_tried(tmp_path: Path) -> None:
    program = Program(tmp_path, SLOW.replace("if index == 0:", "if False:"))
    os.kill(program.start().pid, signal.SIGTERM)
    assert program.end()[0] == 75
    assert program.saved() == [(4, "preempted")]


def test_earlier_processes_have_measured_it(tmp_path: Path) -> None:
    program = Program(
        tmp_path, SLOW.replace("run.resumed is None", "True").replace("index == 0", "index == 1")
    )
    process = program.start()
    os.kill(process.pid, signal.SIGKILL)
    program.end()
    os.kill(program.start().pid, signal.SIGTERM)
    code, _, err = program.end()
    assert (code, "the checkpoint of step 2 stands, and 2 steps will run again" in err) == (
        75,
        True,
    )
    assert program.saved() == [(2, "asked")]


def test_a_loop_that_does_not_come_back_in_time_is_said(tmp_path: Path) -> None:
    program = Program(
        tmp_path,
        """
        run.save()
        for index in run.range(3):
            values.append(index)
            if index == 2 and run.resumed is None:
                run.manager.wait()
                say("ready")
                time.sleep(60)
        """,
        options="grace=1",
    )
    process = program.start()
    os.kill(process.pid, signal.SIGTERM)
    program.await_error("the loop did not come back in time for a save")
    assert process.poll() is None
    process.kill()
    err = program.end()[2]
    assert "the checkpoint of step 1 stands, and 1 step will run again" in err


@pytest.mark.parametrize("code", [0, -1, 256, True])
def test_statuses_that_would_say_that_the_run_is_complete(tmp_path: Path, code: int) -> None:
    with pytest.raises(holdfast.errors.UsageError, match="is no status of a process"):
        holdfast.Run(tmp_path / "run", exit_code=code)


@pytest.mark.parametrize("grace", [0, "-1s", "soon", float("nan"), float("inf")])
def test_graces_that_are_none(tmp_path: Path, grace: float | str) -> None:
    with pytest.raises(holdfast.errors.UsageError, match="grace"):
        holdfast.Run(tmp_path / "run", grace=grace)


def test_the_grace_of_the_environment(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOLDFAST_GRACE", "2min")
    with holdfast.Run(tmp_path / "run") as run:
        assert run._session.settings.grace_s == 120.0
    with holdfast.Run(tmp_path / "other", grace=5) as run:
        assert run._session.settings.grace_s == 5.0
