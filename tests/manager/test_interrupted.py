"""A signal's handler may raise at any instruction: nothing hangs, and the next save works."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast.core.adapters import LeafSource
from holdfast.errors import SaveFailed
from holdfast.manager import CheckpointManager
from holdfast.manager.overlap import Overlap
from holdfast.manager.saver import Order, Saver

ROOT = Path(__file__).parents[2]


def run(folder: Path, what: str, *numbers: int) -> int:
    """What the program says at its end. In a process of its own: the limit of a test's time is
    an alarm, too, and coverage traces."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.manager.interrupted",
            folder / "run",
            what,
            *map(str, numbers),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return int(done.stdout)


@pytest.mark.parametrize(
    ("what", "stride", "at_least"),
    [
        ("save", 9, 250),
        ("block", 9, 250),
        ("drain", 2, 20),
        ("result", 1, 15),
        ("wait", 1, 15),
        pytest.param("close", 2, 30, marks=pytest.mark.slow),
        pytest.param("first", 11, 300, marks=pytest.mark.slow),
        pytest.param("run", 1801, 10_000, marks=pytest.mark.slow),
    ],
)
def test_at_each_place(tmp_path: Path, what: str, stride: int, at_least: int) -> None:
    assert run(tmp_path, what, 1, stride) > at_least


@pytest.mark.slow
def test_alarms_at_any_moment(tmp_path: Path) -> None:
    assert run(tmp_path, "alarms", 300) > 100


@pytest.mark.parametrize("again", [False, True])
def test_an_interrupted_barrier_fails_the_save_and_not_the_next(
    again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of what it was to copy is copied: the program may change the rest."""
    reading, go_on = threading.Event(), threading.Event()
    read, copy_rest = Overlap.reach, Overlap._copy_rest

    def reach(self: Overlap) -> None:
        reading.set()
        assert go_on.wait(60)
        read(self)

    def interrupted(self: Overlap) -> None:
        copy_rest(self)
        raise TimeoutError

    live = np.zeros(100_000)
    with CheckpointManager(tmp_path / "run") as ckpts:
        with monkeypatch.context() as patch:
            patch.setattr(Overlap, "reach", reach)
            patch.setattr(Overlap, "_copy_rest", interrupted)
            pending = ckpts.save(1, {"live": live}, in_place=lambda source, path: True)
            assert reading.wait(60)
            with pytest.raises(TimeoutError):
                ckpts.drain()
            if again:
                ckpts.drain()  # it copies nothing over what is half done
            live += 1
            go_on.set()
            with pytest.raises(SaveFailed, match="handler"):
                pending.result()
        ckpts.save(2, {"live": live}).result()
        assert ckpts.load()["live"].tolist() == live.tolist()


class Breaking:
    """A state that cannot be taken."""

    def state_dict(self) -> dict[str, Any]:
        raise KeyboardInterrupt

    def load_state_dict(self, state: object) -> None: ...


def test_a_save_that_is_broken_off_leaves_the_next_its_memory(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "run") as ckpts:
        for step in range(3):
            with pytest.raises(KeyboardInterrupt):
                ckpts.save(2 * step, {"x": np.arange(100_000), "breaking": Breaking()})
            ckpts.save(2 * step + 1, {"x": np.arange(100_000)}).result()


def test_a_save_in_a_handler_that_came_into_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are whole: each copies into memory of its own."""
    outer, inner = np.full(100_000, 1), np.full(100_000, 2)
    copied, submit, reach = threading.Event(), Saver.submit, Overlap.reach

    def handle(number: int, frame: object) -> None:
        ckpts.save(2, {"x": inner})

    def interrupt(source: LeafSource, path: str) -> bool:
        if path == "y":
            signal.raise_signal(signal.SIGUSR1)
        return False

    def submitted(self: Saver, order: Order, **options: Any) -> None:
        if order.pending.step == 1:
            copied.set()
        submit(self, order, **options)

    def reached(self: Overlap) -> None:
        assert copied.wait(60)  # by the outer one, before the inner one is read
        reach(self)

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        with CheckpointManager(tmp_path / "run") as ckpts:
            # Now there is memory to be used again.
            ckpts.save(0, {"x": outer + 5, "y": outer + 6}).result()
            monkeypatch.setattr(Saver, "submit", submitted)
            monkeypatch.setattr(Overlap, "reach", reached)
            pending = ckpts.save(1, {"x": outer, "y": outer + 3}, in_place=interrupt)
            assert pending.result().step == 1
            assert ckpts.load(1)["x"].tolist() == outer.tolist()
            assert ckpts.load(1)["y"].tolist() == (outer + 3).tolist()
            assert ckpts.load(2)["x"].tolist() == inner.tolist()
    finally:
        signal.signal(signal.SIGUSR1, before)
