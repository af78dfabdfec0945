"""A machine that is about to be taken away: what the task does, and what the next attempt has."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import holdfast
from holdfast.errors import Preempted
from holdfast.metaflow.current import CurrentCheckpoint
from holdfast.metaflow.stopping import Stopping, Watch
from tests.metaflow.support import Metaflow
from tests.metaflow.tasks import task
from tests.metaflow.test_card import within
from tests.support.servers.machine import machine_on_loopback


def test_a_task_stops_at_its_next_save_and_the_next_attempt_goes_on(metaflow: Metaflow) -> None:
    """With the file that Metaflow names on AWS Batch and Kubernetes."""
    notice = str(metaflow.folder / "notice")
    output = metaflow.run("preempted", "run", NOTICE=notice, NAMED="1").output
    assert metaflow.told == [
        {"attempt": 0, "loaded": 0},
        {"attempt": 1, "loaded": 4},
    ]
    assert "the task stops when its next save is durable, and is retried" in output
    assert "Preempted" in output
    assert "the next attempt of the task goes on from there" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_task_on_a_spot_instance_is_told(metaflow: Metaflow) -> None:
    """By the machine. It does not stop by itself: its next attempt would begin there, too."""
    notice = metaflow.folder / "notice"
    with machine_on_loopback() as machine:
        machine.notice = notice
        output = metaflow.run(
            "preempted",
            "run",
            NOTICE=str(notice),
            STOPS="1",
            AWS_EC2_METADATA_SERVICE_ENDPOINT=machine.url,
            AWS_EC2_METADATA_DISABLED="false",
            HOLDFAST_NOTICES="aws",
        ).output
    assert metaflow.told == [
        {"attempt": 0, "loaded": 0},
        {"preempted": 4},
        {"attempt": 1, "loaded": 4},
    ]
    assert "the instance will terminate at 2026-11-26T19:00:00Z: what is saved by then" in output


class Heard:
    """What `current.checkpoint` is given."""

    watch: Watch | None = None
    stops = False

    def heed(self, watch: Watch | None, *, stops: bool) -> None:
        self.watch, self.stops = watch, stops


@pytest.mark.parametrize(
    ("policy", "may_retry", "named", "looks", "stops"),
    [
        ("stop", True, True, True, True),
        ("stop", False, True, True, False),  # there is no next attempt
        ("stop", True, False, False, False),  # on a machine of nobody's
        ("tell", True, True, True, False),
        ("none", True, True, False, False),  # nobody looks
    ],
)
def test_who_stops(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
    may_retry: bool,
    named: bool,
    looks: bool,
    stops: bool,
) -> None:
    """The task, and every Run in it."""
    runs: list[str] = []
    monkeypatch.setattr("holdfast.notices.signals.stop_all", runs.append)
    notice = tmp_path / "notice"
    notice.write_text("soon")
    told: list[str] = []
    heard: Any = Heard()
    current = {"spot_termination_notice": str(notice)} if named else {}
    stopping = Stopping(current, heard, policy=policy, may_retry=may_retry, tell=told.append)
    assert (heard.watch is not None, heard.stops) == (looks, stops)
    if looks:
        assert within(20, lambda: bool(told))
        assert ("is retried" in told[0]) == stops
        assert within(20, lambda: bool(runs) == stops)
    stopping.close()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


class Noticed(Watch):
    """A watch to which it was said."""

    def __init__(self) -> None:
        self.notice = "soon"


def test_a_save_that_stops_the_task_is_durable_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever catches what it raises may rely on it; `block=False` or not."""
    listed: list[int] = []

    def stop(notice: str, url: str) -> None:
        with holdfast.CheckpointManager(url.rpartition("@")[0], keep=None) as other:
            listed.append(len(other.checkpoints()))
        raise Preempted(notice)

    monkeypatch.setattr("holdfast.metaflow.current.stop", stop)
    current = CurrentCheckpoint(task(tmp_path / "ds"))
    current.heed(Noticed(), stops=True)
    (tmp_path / "large").write_bytes(os.urandom(30_000_000))
    for number in (1, 2):
        with pytest.raises(Preempted, match="soon"):
            current.save(tmp_path / "large", block=number == 1)
        (tmp_path / "large").write_bytes(os.urandom(30_000_000))
    assert listed == [1, 2]
    assert [each["version_id"] for each in current.saved] == [1, 2]
    current.save(tmp_path / "large", latest=False)
    current.heed(Noticed(), stops=False)
    current.save(tmp_path / "large")
    assert current.preempted
    current.finish()


# Between `Termination()` and its `close`, as a step of Metaflow's is.
TERMINATED = """
import os, signal, sys, time
from holdfast.metaflow.stopping import Termination
termination = Termination()
"""


def ends(code: str) -> tuple[int, str]:
    """The exit status and the output of a process, which may send itself a signal."""
    done = subprocess.run(
        [sys.executable, "-c", TERMINATED + code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


TERM = "os.kill(os.getpid(), signal.SIGTERM)\n"


def test_sigterm_unwinds_the_step() -> None:
    status, output = ends(f"try:\n    {TERM}finally:\n    print('finished its saves')")
    assert (status, output) == (143, "finished its saves\n")


def test_a_handler_of_the_step_is_left_alone() -> None:
    mine = "signal.signal(signal.SIGTERM, lambda *_: print('mine'))\n"
    assert ends(mine + TERM + "termination.close()\n" + TERM) == (0, "mine\nmine\n")
    assert ends(mine + "Termination()\n" + TERM) == (0, "mine\n")


def test_after_the_step_the_signal_is_what_it_was() -> None:
    assert ends("termination.close()\n" + TERM) == (-signal.SIGTERM, "")


def test_a_forked_child_dies_of_it_as_ever() -> None:
    status, output = ends(
        f"if (child := os.fork()) == 0:\n    try:\n        {TERM}    finally:\n        print('x')\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    assert (status, output) == (0, f"{-signal.SIGTERM}\n")


@pytest.mark.parametrize("asked", [TERM, "stop_all('preempted')\n"], ids=["SIGTERM", "a notice"])
def test_a_run_in_the_step_stops_at_its_boundary(tmp_path: Path, asked: str) -> None:
    """By either it saves and leaves with its own status."""
    status, output = ends(
        "import holdfast\n"
        "from holdfast.notices.signals import stop_all\n"
        f"run = holdfast.Run({str(tmp_path / 'run')!r}, every=100)\n"
        "box = run.box(steps=0)\n"
        "for step in run.range(10):\n"
        "    if step == 3:\n"
        f"        {asked}"
        "    box.steps += 1\n"
    )
    assert status == 75, output
    assert "saved step 4" in output
