"""However an attempt ends, what it has saved is there for the next one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.metaflow.checkpoints import Checkpoints
from holdfast.metaflow.places import Place, Root, RunName
from tests.metaflow.support import Metaflow

_RETRY = "--with=retry:times=1,minutes_between_retries=0"


@pytest.mark.parametrize("how", ["3", "75", "raises", "terminated"])
def test_saves_in_the_background_are_finished_when_the_step_ends_early(
    metaflow: Metaflow, how: str
) -> None:
    """By `sys.exit`, which reaches none of Metaflow's hooks, by an exception, and by SIGTERM."""
    metaflow.run("ending", "run", _RETRY, HOW=how)
    assert metaflow.told[:2] == [{"attempt": 0, "loaded": 0}, {"attempt": 1, "loaded": 5}]
    assert metaflow.told[2]["count"] == 10


def test_the_fallback_of_catch_has_nothing_to_do_with_checkpoints(metaflow: Metaflow) -> None:
    ran = metaflow.run("ending", "run", _RETRY, "--with=catch:var=failed", HOW="fails")
    first, retried, end = metaflow.told
    assert (first["loaded"], retried["loaded"]) == (0, 5)
    assert "told to fail" in end["failed"]
    assert ran.output.count("goes on from") == 1


@pytest.mark.parametrize("outside", ["", "1"], ids=["in a save", "between saves"])
def test_a_timeout_ends_an_attempt_and_its_last_save_is_there(
    metaflow: Metaflow, outside: str
) -> None:
    ran = metaflow.run(
        "ending", "run", _RETRY, "--with=timeout:seconds=60", HOW="timeout", OUTSIDE=outside
    )
    assert "timed out after" in ran.output
    lines = metaflow.told
    begin = lines.index(next(line for line in lines if line.get("attempt") == 1))
    saved = [line["saved"] for line in lines[1:begin]]
    assert lines[begin]["loaded"] in (saved[-1], saved[-1] + 1)  # one that the alarm came into
    assert (lines[begin]["loaded"] == saved[-1]) or not outside
    assert lines[-1]["count"] == max(10, lines[begin]["loaded"])


@pytest.mark.parametrize("kills", [6, pytest.param(15, marks=pytest.mark.slow)])
@pytest.mark.timeout(600)
def test_killed_at_any_moment_it_goes_on_from_a_whole_checkpoint(
    metaflow: Metaflow, kills: int
) -> None:
    """And from none that is older than the last save that returned."""
    command = "run"
    while not any("count" in line for line in metaflow.told):
        assert sum("attempt" in line for line in metaflow.told) <= kills + 1
        retry = "--with=retry:times=4,minutes_between_retries=0"
        metaflow.run("ending", command, retry, status=None, HOW="killed", KILLS=str(kills))
        command = "resume"
    returned = 0
    for line in metaflow.told:
        if "attempt" in line:
            assert line["loaded"] in (returned, returned + 1)
        returned = line.get("saved", line.get("loaded", returned))
    assert metaflow.told[-1]["count"] == returned >= 10
    assert sum("attempt" in line for line in metaflow.told) == kills + 1


def test_an_alarm_at_any_moment_of_a_save_leaves_its_task_able_to_save(tmp_path: Path) -> None:
    """As `@timeout` raises it: in the main thread, at any instruction."""
    done = subprocess.run(
        [sys.executable, "-c", SAVES_WITH_ALARMS, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    returned, interrupted = map(int, done.stdout.split())
    assert interrupted > 10
    later = _checkpoints(tmp_path / "store", attempt=1)
    newest = next(later.to_go_on_from("fresh"))
    assert newest.metadata["count"] >= returned > 0
    (tmp_path / "loaded").mkdir()
    for reference in later.list():
        later.load(reference, tmp_path / "loaded")
        count = reference.metadata["count"]
        assert (tmp_path / "loaded" / "state").read_bytes() == count.to_bytes(8, "big") * 20_000


# A process of its own: the limit of a test's time is an alarm, too.
SAVES_WITH_ALARMS = """
import random, signal, sys, time
from pathlib import Path
from holdfast.metaflow.checkpoints import Checkpoints
from holdfast.metaflow.places import Place, Root, RunName

class Alarm(Exception): pass

def ring(signum, frame): raise Alarm

folder = Path(sys.argv[1])
place = Place("Flow", "start", RunName("1"))
checkpoints = Checkpoints(
    Root(str(folder / "store")), place, pathspec="Flow/1/start/1", attempt=0
)
signal.signal(signal.SIGALRM, ring)
(folder / "state").write_bytes(bytes(160_000))
for _ in range(2):  # of the first one, which opens the run, more is written
    start = time.monotonic()
    checkpoints.save(folder / "state", metadata={"count": 0})
    takes_s = time.monotonic() - start
returned = interrupted = 0
began = time.monotonic()
for count in range(1, 120):
    if interrupted > 20 and returned and time.monotonic() - began > 5:
        break  # a machine with much else to do
    (folder / "state").write_bytes(count.to_bytes(8, "big") * 20_000)
    try:
        try:
            start = time.monotonic()
            if count % 5:  # some are left alone, however slow the machine is by now
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 2 * takes_s))
            checkpoints.save(folder / "state", metadata={"count": count})
            returned = count
            takes_s = time.monotonic() - start  # it may have been slow for a moment
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Alarm:
        interrupted += 1
checkpoints.close()
print(returned, interrupted)
"""


def _checkpoints(store: Path, attempt: int) -> Checkpoints:
    place = Place("Flow", "start", RunName("1"))
    return Checkpoints(Root(str(store)), place, pathspec="Flow/1/start/1", attempt=attempt)
