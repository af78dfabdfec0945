"""What tests of mirrors share."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.errors import StoreUnavailable
from holdfast.repo import keys
from holdfast.stores.open import open_store

WAIT_S = 60.0
"""No test waits so long unless it fails."""


class Line:
    """A store at the end of a link that can be cut, or held up."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.down = False
        self.calls: Counter[str] = Counter()
        self.refused = 0
        self.before: Callable[[str, tuple[Any, ...]], None] = lambda name, args: None
        self._gates: list[threading.Event] = []

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.inner, name)
        if not callable(value) or name == "close":
            return value

        def call(*args: Any, **named: Any) -> Any:
            self.before(name, args)
            if self.down:
                self.refused += 1
                raise StoreUnavailable(f"{self.inner.address} does not answer")
            self.calls[name] += 1
            return value(*args, **named)

        return call

    def hold_at_packs(self) -> tuple[threading.Event, threading.Event]:
        """Two events: a pack is about to be written, which waits for the second one."""
        reached, go_on = threading.Event(), threading.Event()
        self._gates.append(go_on)

        def wait(name: str, args: tuple[Any, ...]) -> None:
            if name in ("put_new", "create") and str(args[0]).startswith(keys.PACKS):
                reached.set()
                assert go_on.wait(WAIT_S)

        self.before = wait
        return reached, go_on

    def mend(self) -> None:
        self.down = False
        for gate in self._gates:
            gate.set()


def state(step: int) -> dict[str, Any]:
    """A few KB that differ in every step, and some that never do."""
    return {
        "w": np.random.default_rng(step).normal(size=1000),
        "frozen": np.arange(2000.0),
        "step": step,
    }


def same(found: Any, step: int) -> bool:
    wanted = state(step)
    return found["step"] == step and all(
        np.array_equal(found[name], wanted[name]) for name in ("w", "frozen")
    )


def steps(address: str | Path) -> list[int]:
    """The steps of the run, every byte of which is right."""
    with holdfast.CheckpointManager(address, keep=None) as run:
        for found in run.verify():
            assert found.ok, found.problems
        infos = run.checkpoints()
        for info in infos:
            assert same(run.load(info.id), info.step)
        return [info.step for info in infos]


def damage(address: str | Path, key: str, at: int = -1) -> None:
    """Flip a bit of an object."""
    store = open_store(str(address))
    data = bytearray(store.get(key, max_bytes=1 << 30))
    data[at] ^= 1
    store.delete([key])
    assert store.put_new(key, [bytes(data)])


def mirror_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("holdfast-mirror")]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
