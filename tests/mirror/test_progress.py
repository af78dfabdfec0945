"""What takes long at the start and at the end of a run with a mirror is shown."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mirror.support import WAIT_S
from tests.support.terminal import on_a_terminal

# The mirror takes no pack before the run is about to end, unless it is told to be quick.
TRAIN = """
import sys, threading
import holdfast
from holdfast.manager import progress
from holdfast.manager.mirror import Mirror
from holdfast.run import session
from holdfast.stores.local import LocalStore

run, mirror, words = sys.argv[1], sys.argv[2], sys.argv[3:]
progress._BAR_AFTER_S = progress._LINE_AFTER_S = 0.0
session._BRIEFLY_S = 0.0
closing = threading.Event()
put_new, close, finish = LocalStore.put_new, Mirror.close, Mirror.finish
is_last = False

def gated(self, key, parts):
    if self.address == mirror and key.startswith("packs/") and "quick" not in words:
        assert closing.wait(60)
    return put_new(self, key, parts)

def last(self):
    global is_last
    is_last = True
    close(self)

def finished(self):
    finish(self)
    if is_last:  # the bytes are counted from here on
        closing.set()

LocalStore.put_new, Mirror.close, Mirror.finish = gated, last, finished
with holdfast.Run(run, every=1, keep=None, mirror=mirror, quiet="quiet" in words) as training:
    box = training.box(x=b"")
    for step in training.range(4):
        box.x = bytes([step]) * 3_000_000
    if "quick" in words:
        training.manager.wait()
        assert training.manager.wait_mirrored(60)
"""


def trained(folder: Path, *words: str, terminal: bool = False) -> str:
    """What a job writes to stderr."""
    command = [sys.executable, "-c", TRAIN, str(folder / "run"), str(folder / "mirror"), *words]
    if terminal:
        return on_a_terminal(command)
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=WAIT_S
    ).stderr


def test_the_end_in_a_log(tmp_path: Path) -> None:
    said = trained(tmp_path).splitlines()
    run, mirror = tmp_path / "run", tmp_path / "mirror"
    assert f"{run}: copying step 4 and 3 more to {mirror} before this process ends" in said
    rate = r"12\.0 MB in \S+ \w+ \([\d.]+ \wB/s\)"
    assert re.fullmatch(rf"{run}: copied to {mirror}: {rate}", said[-1]), said
    assert steps_there(mirror) == [1, 2, 3, 4]


def test_the_end_on_a_terminal(tmp_path: Path) -> None:
    said = trained(tmp_path, terminal=True)
    last = said.rstrip().rsplit("\r", 1)[-1]
    assert re.search(r"/run: copying to its mirror  \[#+\]  100%  12\.0 MB of 12\.0 MB", last)
    assert "copied to" not in said


@pytest.mark.parametrize("terminal", [False, True])
def test_a_quiet_end(tmp_path: Path, terminal: bool) -> None:
    assert trained(tmp_path, "quiet", terminal=terminal) == ""
    assert steps_there(tmp_path / "mirror") == [1, 2, 3, 4]


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_is_said_of_what_is_there(tmp_path: Path, terminal: bool) -> None:
    """Not either where the mirror was not asked yet when the process ends at once."""
    for _ in range(2):
        said = trained(tmp_path, "quick", terminal=terminal)
        assert "cop" not in said.replace(str(tmp_path), "")


def test_the_start_on_a_new_machine(tmp_path: Path) -> None:
    trained(tmp_path, "quick")
    for terminal in (False, True):
        shutil.rmtree(tmp_path / "run")
        said = trained(tmp_path, "quick", terminal=terminal)
        if terminal:
            bar = r"coming from its mirror  \[#+\]  100%  3\.0\d MB of 3\.0\d MB"
            assert re.search(bar, said), said
            assert "brought back" not in said
        else:
            line = rf"/run: brought back from {tmp_path}/mirror: 3\.0\d MB in "
            assert re.search(line, said), said


def steps_there(mirror: Path) -> list[int]:
    from holdfast import CheckpointManager

    with CheckpointManager(mirror) as copy:
        assert all(found.ok for found in copy.verify())
        return [info.step for info in copy.checkpoints()]
