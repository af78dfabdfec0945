"""Two real processes and one run: the second is refused, an overtaken one cannot commit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast import CheckpointManager
from holdfast.errors import RunHeld
from tests.kill.driver import ROOT, wait_until

WRITER = """
import sys, time
import holdfast
ckpts = holdfast.CheckpointManager(sys.argv[1], keep=None)
step = 0
while True:
    step += 1
    try:
        ckpts.save(step, {"pid": step}).result()
    except holdfast.errors.Fenced as error:
        print("FENCED", error.message, flush=True)
        sys.exit(11)
    print("SAVED", step, flush=True)
    time.sleep(0.02)
"""


@pytest.fixture
def writer(tmp_path: Path):  # type: ignore[no-untyped-def]
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("SAVED")
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_live_writer_is_refused_with_the_pid(
    tmp_path: Path, writer: subprocess.Popen[str]
) -> None:
    with (
        CheckpointManager(tmp_path / "run") as second,
        pytest.raises(RunHeld, match=f"held by process {writer.pid} on") as caught,
    ):
        second.acquire()
    assert f"kill {writer.pid}" in caught.value.hint
    writer.send_signal(signal.SIGSTOP)  # a stopped process is alive
    with CheckpointManager(tmp_path / "run") as second, pytest.raises(RunHeld):
        second.acquire()
    writer.kill()
    writer.wait()
    with CheckpointManager(tmp_path / "run") as second:
        second.save(1_000_000, {"pid": 0}).result()


def test_a_stopped_process_that_was_overtaken_cannot_commit(
    tmp_path: Path, writer: subprocess.Popen[str]
) -> None:
    assert writer.stdout is not None
    writer.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, writer.pid, os.WSTOPPED | os.WNOWAIT)
    with CheckpointManager(tmp_path / "run", keep=None, take_over=True) as second:
        before = [c.step for c in second.checkpoints()]
        second.save(1_000_000, {"pid": 0}).result()
        writer.send_signal(signal.SIGCONT)
        wait_until(lambda: writer.poll() is not None)
        assert writer.returncode == 11
        output = writer.stdout.read()
        assert f"taken over by pid {os.getpid()}" in output
        second.save(1_000_001, {"pid": 0}).result()
        assert [c.step for c in second.checkpoints()] == [*before, 1_000_000, 1_000_001]
        assert all(found.ok for found in second.verify())
