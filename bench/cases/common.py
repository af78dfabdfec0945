"""What the cases share: sizes, who takes part, how time is taken."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import machine
from bench.others import Orbax, orbax_is_installed
from bench.outcome import CEILING
from bench.peers import Peer
from bench.states import State

GB = 1e9
MB = 1e6

DIRECT_WRITE = CEILING + "direct write"
BUFFERED_WRITE = CEILING + "buffered write"
MEMORY_COPY = CEILING + "memory copy"
COLD_READ = CEILING + "cold read"
CACHED_READ = CEILING + "cached read"


@dataclass(frozen=True)
class Options:
    """What is measured: sizes and rounds."""

    folder: Path
    """On the disk that is measured."""
    mib: int = 1024
    large_mib: int = 9537  # 10 GB
    tensors: int = 20_000
    rounds: int = 5
    quick: bool = False
    """Only whether it works: no warm-up, no calibrated steps."""

    def kinds(self, *kinds: type[Peer]) -> list[type[Peer]]:
        """Those of the contenders that can run here."""
        return [kind for kind in kinds if kind is not Orbax or orbax_is_installed()]

    def turns(self) -> Iterator[bool]:
        """One item per round: whether it counts. The first warms caches and allocators up."""
        if not self.quick:
            yield False
        for _ in range(self.rounds):
            yield True

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder on the measured disk, removed afterwards."""
        folder = Path(tempfile.mkdtemp(prefix="holdfast-bench-", dir=self.folder))
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


@dataclass(frozen=True)
class Took:
    """Time that passed, and processor time of all threads of this process."""

    wall_s: float
    cpu_s: float


def timed(work: Callable[[], object]) -> Took:
    """Do `work` once. What others left to the disk is written before, not during it."""
    os.sync()
    cpu, start = time.process_time(), time.perf_counter()
    work()
    return Took(time.perf_counter() - start, time.process_time() - cpu)


def check(peer: Peer, state: State) -> None:
    """The newest save of `peer`, restored over zeros, is what `state` holds."""
    expected = state.digest()
    state.clear()
    peer.restore(state)
    if state.digest() != expected:
        raise AssertionError(f"{peer.name} did not restore what was saved")


def write_s(folder: Path, nbytes: int) -> float:
    """Seconds that the disk needs for `nbytes`: the best of three samples, scaled."""
    sample = min(nbytes, 256 << 20)
    direct = machine.direct_io_works(folder)
    write = machine.write_direct if direct else machine.write_buffered
    path = folder / "sample"
    seconds = min(timed(lambda: write(path, sample)).wall_s for _ in range(3))
    path.unlink()
    return seconds * nbytes / sample
