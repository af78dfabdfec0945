"""`hold=`: a state held in memory becomes a checkpoint when the loop does not come back."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.errors import BadPolicy
from holdfast.manager.history import EndEvent, NoticeEvent
from tests.support.programs import Program

# Random numbers, an array that is changed in place, the box, a loader with a place: what a
# resume from the held state has to bring back.
TRAIN = """
import hashlib, random
random.seed(1)
np.random.seed(2)
weights = np.zeros(50_000)
run.track(weights=weights)
box = run.box(history=[])
for epoch in run.epochs(3):
    for item in run.batches(LOADER):
        weights += np.random.default_rng(item).random(50_000) + random.random() + np.random.rand()
        box.history.append((epoch, item, run.step))
        BODY
    weights *= 0.5
    TAIL
say(hashlib.sha256(weights.tobytes() + repr(box.history).encode()).hexdigest())
"""


def program(
    tmp_path: Path,
    *,
    loader: str = "range(4)",
    body: str = "",
    tail: str = "",
    before: str = "",
    grace: int = 2,
) -> Program:
    text = TRAIN.replace("LOADER", loader).replace("BODY", body or "pass").replace("TAIL", tail)
    return Program(tmp_path, before + text, options=f"grace={grace}, hold=True")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> str:
    code, out, err = program(tmp_path_factory.mktemp("whole")).again()
    assert code == 0, err
    return out


# The way out may take ten of twelve seconds: on a busy machine, who watches is late.
MARGIN = """
import holdfast.run.deadline
holdfast.run.deadline.MARGIN_S = 10.0
"""

ENDLESS = """
        if (epoch, item) == (1, 2) and run.resumed is None:
            weights[:] = -1.0  # half a step
            say("ready")
            time.sleep(600)
"""
STUCK_TAIL = """
    if epoch == 1 and run.resumed is None:
        say("ready")
        time.sleep(600)
"""


@pytest.mark.parametrize(
    ("body", "tail", "saved"),
    [(ENDLESS.strip(), "", 6), ("", STUCK_TAIL.strip(), 7)],
    ids=["in the body", "in the tail"],
)
def test_a_loop_that_does_not_come_back_leaves_what_is_held(
    tmp_path: Path, uninterrupted: str, body: str, tail: str, saved: int
) -> None:
    training = program(tmp_path, body=body, tail=tail)
    os.kill(training.start().pid, signal.SIGTERM)
    code, _, err = training.end()
    assert code == 75
    assert "hold= keeps a copy of the state in memory: " in err
    assert f"the loop did not come back in time: saved the state held of step {saved}" in err
    assert training.saved() == [(saved, "held")]
    code, out, err = training.again()
    assert code == 0, err
    assert out == uninterrupted
    with holdfast.CheckpointManager(training.address) as manager:
        found = manager.goodput()
    assert found is not None
    assert [(one.end, one.text) for one in found.attempts] == [
        ("preempted", "SIGTERM"),
        ("finished", ""),
    ]
    assert found.attempts[0].kept_step == found.attempts[1].from_step == saved


STALLS = """
class Stalls:
    def __len__(self):
        return 4
    def __getitem__(self, index):
        if index == 4:
            raise IndexError
        if (run.epoch, index) == (1, 3) and run.resumed is None:
            say("ready")
            time.sleep(600)
        return index
"""


def test_a_loader_that_stalls(tmp_path: Path, uninterrupted: str) -> None:
    training = program(tmp_path, loader="Stalls()", before=STALLS)
    os.kill(training.start().pid, signal.SIGTERM)
    code, _, err = training.end()
    assert code == 75, err
    assert training.saved() == [(7, "held")]
    code, out, err = training.again()
    assert code == 0, err
    assert out == uninterrupted


def test_a_tail_that_gets_stuck_behind_the_last_save(tmp_path: Path, uninterrupted: str) -> None:
    """Nothing is lost then, but the status says that there is more to do."""
    body = 'if (epoch, item) == (1, 3) and run.resumed is None: say("ready"); wait()'
    tail = "if epoch == 1 and run.resumed is None: time.sleep(600)"
    training = program(tmp_path, body=body, tail=tail, before=MARGIN, grace=12)
    os.kill(training.start().pid, signal.SIGTERM)
    code, _, err = training.end()
    assert code == 75, err
    assert "saved step 8; stopping when epochs goes on" in err
    assert "the loop did not come back in time: its last step is saved" in err
    assert training.saved() == [(8, "preempted")]
    code, out, err = training.again()
    assert code == 0, err
    assert out == uninterrupted


def test_a_guarded_evaluation_that_is_too_long_saves_what_is_held(
    tmp_path: Path, uninterrupted: str
) -> None:
    evaluation = """
    for _ in run.guard(range(10_000 if epoch == 1 and run.resumed is None else 1)):
        if _ == 0 and epoch == 1: say("ready")
        if epoch == 1 and run.resumed is None: time.sleep(0.02)
"""
    # Else who watches the loop leaves half a second later, if the loop is not there before.
    patient = "import holdfast.run.stopping\nholdfast.run.stopping._AFTER_S = 30.0\n"
    training = program(tmp_path, tail=evaluation.strip(), before=patient)
    os.kill(training.start().pid, signal.SIGTERM)
    code, _, err = training.end()
    assert code == 75
    assert "stopped in an evaluation; saved the state held of step 7" in err
    assert training.saved() == [(7, "held")]
    assert training.again()[1].split()[-1] == uninterrupted.strip()


SLOW = """
from holdfast.stores.local import LocalStore

class Slow(LocalStore):
    def put_new(self, key, parts):
        if values:
            time.sleep(2)
        return super().put_new(key, parts)

run.close()
run = holdfast.Run(
    sys.argv[1], every=None, keep=None, grace=1.5, hold=True, store=Slow(sys.argv[1])
)
run.track(values=values)
for index in run.range(3):
    values.append(index)
    if index == 1:
        say("ready")
        wait()
"""


def test_nobody_leaves_while_the_loop_is_in_its_last_save(tmp_path: Path) -> None:
    """The time is over in the midst of it: it is newer than what is held."""
    training = Program(tmp_path, SLOW)
    os.kill(training.start().pid, signal.SIGTERM)
    code, _, err = training.end()
    assert code == 75, err
    assert "saved step 2" in err
    assert training.saved() == [(2, "preempted")]


TWO = """
other = holdfast.Run(sys.argv[1] + "-other", every=None, keep=None, grace=2, hold=True)
more = []
other.track(values=more)
for index in run.range(3):
    values.append(index)
    for part in other.range(index * 10, index * 10 + 4):
        more.append(part)
        if (index, part) == (0, 2):
            run.save()
        if (index, part) == (0, 3) and other.resumed is None:
            say("ready")
            time.sleep(600)
    break
"""


def test_of_two_runs_each_saves_what_it_holds(tmp_path: Path) -> None:
    training = Program(tmp_path, TWO, options="grace=2, hold=True")
    os.kill(training.start().pid, signal.SIGTERM)
    os.kill(training.process.pid if training.process else 0, signal.SIGTERM)  # again: no matter
    code, _, err = training.end()
    assert code == 75, err
    with holdfast.CheckpointManager(f"{training.address}-other") as manager:
        assert [(info.step, info.note) for info in manager.checkpoints()] == [(3, "held")]


def stuck(until: str, capfd: Any) -> str:
    """A body that gets a signal, and does not come to its end before a line has been printed."""
    signal.raise_signal(signal.SIGTERM)
    err, end = "", time.monotonic() + 60
    while until not in err:
        assert time.monotonic() < end, err
        time.sleep(0.01)
        err += capfd.readouterr().err
    return err


def test_a_notebook_is_not_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd) -> None:
    monkeypatch.setattr("holdfast.run.stopping.in_notebook", lambda: True)
    run = holdfast.Run(tmp_path / "run", every=None, keep=None, hold=True, grace=2)
    run.track(values=[])
    with pytest.raises(holdfast.Preempted, match="step 3"):
        for step in run.range(5):
            if step == 2:
                stuck("saved the state held of step 2", capfd)
    assert (first := run.manager.checkpoints()[0].step) == 2, first
    run.close()


def test_when_what_is_held_cannot_be_saved_the_loop_may_still_come_back(
    tmp_path: Path, capfd
) -> None:
    run = holdfast.Run(tmp_path / "run", every=None, keep=None, hold=True, grace=2)
    run.track(values=[])
    with pytest.raises(SystemExit):
        for step in run.range(5):
            if step == 2:
                captured: Any = run._session.held._held[0][1]
                captured._check = refuse
                err = stuck("did not come back in time for a save", capfd)
                assert "the state held could not be saved: full" in err
    assert [info.step for info in run.manager.checkpoints()] == [3]
    run.close()


def refuse() -> None:
    raise holdfast.errors.SaveFailed("full")


def test_what_a_save_made_superfluous_is_not_saved_again(tmp_path: Path) -> None:
    training = Program(
        tmp_path,
        MARGIN
        + """
for index in run.range(4):
    values.append(index)
    if index == 1:
        run.save()
    if index == 2:
        run.manager.wait()
        say("ready")
        time.sleep(600)
""",
        options="grace=12, hold=True",
    )
    os.kill(training.start().pid, signal.SIGTERM)
    code, _, err = training.end()
    assert code == 75
    assert "its last step is saved; the checkpoint of step 2 stands" in err
    assert training.saved() == [(2, "asked")]
    with holdfast.CheckpointManager(training.address) as manager:
        *_, notice, end = manager.history.read()
    assert isinstance(notice, NoticeEvent)
    assert notice.source == "SIGTERM"
    assert isinstance(end, EndEvent)
    assert (end.why, end.exit_code, end.step) == ("preempted", 75, 2)


def test_a_held_state_uses_its_memory_again_and_is_whole(tmp_path: Path) -> None:
    weights = np.zeros(1_000_000)
    with holdfast.CheckpointManager(tmp_path / "run", keep=None) as manager:
        places: list[int] = []
        held = None
        for step in range(4):
            weights += 1.0
            if held is not None:
                held.drop()
            held = manager.hold(step, {"weights": weights})
            assert held.nbytes >= weights.nbytes
            data: Any = held._order[0].snapshot.leaves[0].data
            places.append(np.frombuffer(data, np.uint8).ctypes.data)
        assert len(set(places)) == 1
        weights += 100.0
        manager.save(3, {"weights": weights}).result()  # a save beside it takes other memory
        assert held is not None
        info = held.commit()
        assert (info.step, info.note) == (3, "held")
        assert (manager.load(info.id)["weights"] == 4.0).all()
        with pytest.raises(holdfast.errors.SaveFailed, match="not there any more"):
            held.commit()
        held.drop()
        event: Any = manager.history.read()[-1]
        assert event.id == info.id
        assert event.memory_nbytes >= 2 * weights.nbytes


def test_intervals_of_hold(tmp_path: Path) -> None:
    now = [0.0]
    run = holdfast.Run(tmp_path / "run", every=None, hold="1min", quiet=True, clock=lambda: now[0])
    run.track(values=[])
    taken: list[int] = []
    manager: Any = run.manager
    hold = manager.hold

    def noted(step: int, *args: Any, **kwargs: Any) -> Any:
        taken.append(step)
        return hold(step, *args, **kwargs)

    manager.hold = noted
    for step in run.range(10):
        now[0] += 25.0
        if step == 4:
            run.save()
    assert taken == [3, 8]  # a save counts as well
    run.close()


@pytest.mark.parametrize("hold", ["soon", 0, "auto", -5, ""])
def test_holds_that_are_none(tmp_path: Path, hold: Any) -> None:
    with pytest.raises(BadPolicy, match="hold="):
        holdfast.Run(tmp_path / "run", hold=hold)
