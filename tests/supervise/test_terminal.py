"""On a terminal: the status line, and the keys."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

from tests.supervise.programs import Supervised, wait_for
from tests.support.terminal import on_a_terminal


def test_a_status_line_is_drawn_and_erased(tmp_path: Path) -> None:
    body = """
    n = attempt()
    beat(4321, checkpoint=4100 + n)
    time.sleep(1.5)
    sys.exit(n == 1)
    """
    job = Supervised(tmp_path, body)
    said = on_a_terminal(job.words)
    assert "\r\x1b[K[step 4,321 | checkpoint " in said
    assert "| 1 restart |" in said
    for line in said.replace("\r\n", "\n").split("\n"):
        # What is drawn is taken away before a line of its own begins.
        assert "]\rholdfast run" not in line
    assert "\r\x1b[Kholdfast run: attempt 1 ended" in said
    assert said.count("\x1b[K[") <= 20


def test_no_status_line_where_nobody_looks(tmp_path: Path) -> None:
    job = Supervised(tmp_path, "beat(1)\ntime.sleep(1.2)")
    assert job.run() == 0
    assert "\x1b" not in job.said
    assert "[step" not in job.said
    assert "\x1b" not in on_a_terminal([*job.words[:4], "--no-status", *job.words[4:]])


def test_ctrl_c_reaches_the_command_once_and_a_debugger_reads_the_keys(tmp_path: Path) -> None:
    body = """
    heard = []
    def answer(*_):
        heard.append(1)
        (here / "heard").write_text(str(len(heard)))
    signal.signal(signal.SIGINT, answer)
    (here / "line").write_text(input())
    (here / "foreground").write_text(str(os.tcgetpgrp(0) == os.getpgrp()))
    (here / "ready").touch()
    while not (here / "go on").exists():
        time.sleep(0.02)
    sys.exit(75)
    """
    job = Supervised(tmp_path, body)
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        ["setsid", "--ctty", *job.words], stdin=theirs, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        os.write(ours, b"continue\n")
        wait_for(lambda: job.made("ready"))
        os.write(ours, b"\x03")
        wait_for(lambda: job.made("heard"))
        (tmp_path / "go on").touch()
        said = b""
        try:
            while part := os.read(ours, 65536):
                said += part
        except OSError:  # how Linux says that the other end was closed
            pass
        assert process.wait(60) == 75, said
    os.close(ours)
    assert (tmp_path / "line").read_text() == "continue"
    assert (tmp_path / "foreground").read_text() == "True"
    assert (tmp_path / "heard").read_text() == "1"
    assert b"received SIGINT: passed on" in said
    assert b"attempt 2" not in said


def test_the_interpreter_is_the_one_of_the_supervisor() -> None:
    """A script alone is run by it, as by `holdfast rehearse`."""
    from holdfast.cli.options import python_command

    assert python_command(["train.py", "--lr"]) == [sys.executable, "train.py", "--lr"]
