"""The example, killed with all of its tasks and resumed, ends as if left alone."""

from __future__ import annotations

import os
import re
import signal
import time

from tests.metaflow.support import Metaflow
from tests.support.exhaustive import EXHAUSTIVE
from tests.support.wheel import ROOT

EXAMPLE = str(ROOT / "examples" / "metaflow_flow")
_EPOCHS = ("--epochs", "40")


def result(output: str) -> str:
    [line] = re.findall(r"rate \S+: accuracy \S+, weights \w{16}", output)
    return line


def kill_after(flows: Metaflow, saves: int, *command: str) -> None:
    """SIGKILL the run and its tasks once they have saved that often."""

    def saved() -> int:
        entries = flows.folder.glob(".metaflow/mf.holdfast/Digits/fit/*/*/*/log/*.json")
        return sum(1 for _ in entries)

    goal = saved() + saves
    process = flows.start(EXAMPLE, *command)
    deadline = time.monotonic() + 120
    while saved() < goal:
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_killed_and_resumed(metaflow: Metaflow) -> None:
    left_alone = result(metaflow.run(EXAMPLE, "run", *_EPOCHS).output)
    kill_after(metaflow, 20, "run", *_EPOCHS)
    if EXHAUSTIVE:
        kill_after(metaflow, 10, "resume")
    resumed = metaflow.run(EXAMPLE, "resume").output
    assert "[@checkpoint] goes on from" in resumed
    assert result(resumed) == left_alone
