"""Starts scripts, lets them die, starts them again until they finish.

Those that use torch are forked from a process that has imported it, see `Nursery`; the ones that
all others must equal are started by themselves.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast import CheckpointManager
from tests.support.nursery import ROOT, Forked, kill_group, nurseries

HERE = Path(__file__).parent

SAVING = ("capture", "pack", "fsync", "manifest", "log", "retention", "restore")
OVERLAP = ("read", "barrier")
PLACES = ("prologue", "body", "last batch", "tail", "after")


@dataclass
class Script:
    """One script in one folder, and what became of its processes."""

    name: str
    folder: Path
    args: tuple[str, ...] = ()
    address: str = ""
    """Of its run; "": a folder beside the results."""
    forked: bool = True
    """From a nursery, if it uses torch."""
    kills: Counter[str] = field(default_factory=Counter)
    starts: int = 0

    @property
    def where(self) -> str:
        """The address of its run."""
        return self.address or str(self.folder / "run")

    @property
    def result(self) -> Path:
        return self.folder / "result.json"

    @property
    def counts(self) -> Path:
        return self.folder / "counts.json"

    def start(self, die: str | None = None) -> subprocess.Popen[bytes] | Forked:
        """One process, with another hash seed than the one before, and a working directory of
        its own."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.starts += 1
        elsewhere = self.folder / f"cwd{self.starts}"
        elsewhere.mkdir()
        args = ["--count", str(self.counts)]
        if die:
            args += ["--die", die]
        args += [
            str(HERE / "scripts" / f"{self.name}.py"),
            self.where,
            str(self.result),
            *self.args,
        ]
        child, said = HERE / "child.py", self.folder / "log.txt"
        if self.forked and self.name == "torch_train":
            nursery = nurseries()[self.starts % 2]
            return nursery.start(child, *args, cwd=elsewhere, log=said)
        environment = {
            **os.environ,
            "PYTHONHASHSEED": str(self.starts),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        with open(said, "ab") as log:
            return subprocess.Popen(
                [sys.executable, str(child), *args],
                cwd=elsewhere,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def run(self, die: str | None = None, kill_after_s: float | None = None) -> bool:
        """One process until it ends; True if it was killed. Fails if it ended badly."""
        process = self.start(die)
        try:
            if kill_after_s is not None:
                try:
                    process.wait(kill_after_s)
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
            process.wait(120)
        finally:
            # Loader workers see that their parent is gone; do not wait for them.
            kill_group(process.pid)
        if process.returncode == -signal.SIGKILL:
            self.kills[die.rpartition(":")[0] if die else "any moment"] += 1
            self.check_readable()
            return True
        assert process.returncode == 0, (self.folder / "log.txt").read_text()[-3000:]
        return False

    def check_readable(self) -> None:
        """Whatever the kill left: every checkpoint that is listed is whole."""
        with CheckpointManager(self.where) as ckpts:
            for found in ckpts.verify():
                assert found.ok, found.problems

    def finish(self) -> dict[str, Any]:
        """Run to the end and give the result."""
        while self.run():
            pass
        return json.loads(self.result.read_text())

    def passed(self) -> Counter[str]:
        """How often the last process that ended by itself passed each point."""
        return Counter(json.loads(self.counts.read_text()))


def differing(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Names of results that are not the same, with the first step of a curve."""
    lines: list[str] = []
    for name, value in wanted.items():
        if found[name] == value:
            continue
        at = ""
        if isinstance(value, list):
            pairs = zip(value, found[name], strict=False)
            first = next((i for i, (a, b) in enumerate(pairs) if a != b), "length")
            at = f" from {first} on"
        lines.append(f"{name} differs{at}")
    return lines


def choose(counts: Counter[str], point: str, chance: random.Random, share: int = 1) -> str:
    """A random passing of `point`, in the first `share`-th part of them."""
    assert counts[point], f"the script never passes {point!r}: {dict(counts)}"
    return f"{point}:{chance.randint(1, max(1, counts[point] // share))}"


def reference(name: str, folder: Path, *args: str) -> tuple[dict[str, Any], Counter[str]]:
    """The uninterrupted run's result, and how often it passed each point."""
    script = Script(name, folder / "whole", args, forked=False)
    result = script.finish()
    assert script.starts == 1
    return result, script.passed()


def kill_at_each(script: Script, points: tuple[str, ...], counts: Counter[str], seed: int) -> None:
    """One kill at a random passing of each point, in random order, in one run."""
    chance = random.Random(seed)
    # "after" ends the run; each other kill comes early in what is left of it.
    order = chance.sample(points, len(points))
    order.sort(key=lambda point: point == "after")
    for point in order:
        if point == "restore":
            # Only a resuming process restores: any of its reads.
            script.run(f"restore:{chance.randint(1, 3)}")
        else:
            script.run(choose(counts, point, chance, share=2 * len(order)))


def wait_until(condition: Any, timeout_s: float = 60.0) -> None:
    """Poll until `condition()` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
