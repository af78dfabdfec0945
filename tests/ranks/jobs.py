"""Starting trainings of several ranks, and ending some of them."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import holdfast
from holdfast.core.process import pid_exists
from tests.support.nursery import Forked, kill_group, nurseries

_HERE = Path(__file__).parent
_LAUNCHER = _HERE.parent / "support" / "launcher.py"
_TIMEOUT_S = 120.0


@dataclass
class Job:
    """One run of `train.py` and its starts."""

    folder: Path
    kind: str
    epochs: int = 2
    every: str = "3"
    address: str = ""
    """Of the run; by default a folder beside the rest."""
    stop: int = 0
    """In each step from this one on it is asked to stop."""
    starts: int = 0

    @property
    def run(self) -> str:
        return self.address or str(self.folder / "run")

    def words(self) -> list[str]:
        """The program of each rank, and its arguments."""
        given = [self.run, str(self.folder / "result"), self.kind, str(self.epochs), self.every]
        return [str(_HERE / "train.py"), *given, str(self.stop)]

    def start(self, size: int) -> Forked:
        """All ranks of it, not waited for."""
        self.folder.mkdir(exist_ok=True)
        self.starts += 1
        pids = self.pids()
        pids.unlink(missing_ok=True)
        given = [str(size), str(pids), *self.words()]
        nursery = nurseries()[self.starts % 2]
        return nursery.start(_LAUNCHER, *given, cwd=self.folder, log=self.log())

    def pids(self) -> Path:
        return self.folder / "pids"

    def log(self) -> Path:
        return self.folder / "log"

    def ranks(self) -> list[int]:
        """The processes of the ranks, once they are there."""
        self.wait(self.pids().exists)
        return [int(line) for line in self.pids().read_text().split()]

    def finish(self, size: int) -> int:
        """The status of a start that nobody disturbs."""
        return self.end(self.start(size))

    def end(self, process: Forked) -> int:
        try:
            return process.wait(_TIMEOUT_S)
        finally:
            kill_group(process.pid)

    def killed(self, size: int, rng: random.Random, *, saved: bool = False) -> int:
        """The status of a start of which a rank, or all, are killed at a random moment; `saved`:
        soon after one has saved."""
        before = self.steps() if saved else []
        process = self.start(size)
        ranks = self.ranks()
        whom = rng.choice([ranks, [ranks[0]], [rng.choice(ranks)]])
        if saved:
            self.wait_saved(process, before)
        time.sleep(rng.uniform(0.0, 0.05 if saved else 1.2))
        for rank in whom:
            try:
                os.kill(rank, signal.SIGKILL)
            except ProcessLookupError:
                break  # it came to its end before
        return self.end(process)

    def steps(self) -> list[int]:
        """Of its checkpoints, oldest first."""
        with holdfast.CheckpointManager(self.run) as ckpts:
            return [each.step for each in ckpts.checkpoints()]

    def wait(self, condition: Callable[[], object]) -> None:
        until = time.monotonic() + _TIMEOUT_S
        while not condition():
            assert time.monotonic() < until, self.log().read_text()
            time.sleep(0.05)

    def wait_saved(self, process: Forked, before: list[int]) -> None:
        """Until there are other checkpoints than `before`, or the start has come to its end."""
        self.wait(lambda: self.steps() != before or not pid_exists(process.pid))

    def results(self, size: int) -> list[Any]:
        """What each rank has found at the end."""
        return [json.loads((self.folder / f"result.{rank}").read_text()) for rank in range(size)]

    def lines(self) -> list[str]:
        return self.log().read_text().splitlines()
