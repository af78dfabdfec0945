"""What a run with 10,000 live checkpoints costs, beside one with 10.

    python bench/long_runs.py
    python bench/long_runs.py --checkpoints 10 1000 10000 --rounds 30 --folder /dev/shm

Builds each run once: one real save of a tiny state, whose pack, manifest and record are copied
under new names, so that the folders have the files that as many saves would have left. Then
each operation is done on the runs in turn, A B A B, in one process, and a Markdown table with
the median of the rounds and the ratio to the first run is printed. Times are of the wall clock
and end when a save is durable; on a file system in memory (`--folder /dev/shm`) they show what
the program itself takes. Absolute figures depend on the machine: quote the ratios.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

import holdfast
from holdfast.core.records import Record
from holdfast.core.sealed import seal
from holdfast.manager.listing import Listing
from holdfast.repo import keys
from holdfast.repo.head import Draft
from holdfast.repo.repo import Repo
from holdfast.repo.writer import Writer
from holdfast.stores.local import LocalStore

_AT_ONCE = 1000


def build(folder: Path, count: int) -> None:
    """A run with `count` live checkpoints."""
    with holdfast.CheckpointManager(folder, keep=None) as ckpts:
        ckpts.save(0, {"w": np.arange(8.0)}, metrics={"loss": 1.0}, block=True)
        manifest = ckpts.manifest()
    repo = Repo(LocalStore(folder))
    (record,) = repo.records()
    writer = Writer.open(repo)
    pack = manifest.packs[0]
    data = (folder / keys.pack_key(pack.name)).read_bytes()

    def copy(step: int) -> Record:
        nonce = keys.new_nonce()
        name = keys.pack_name(writer.epoch, nonce, 0, 0)
        ordinal = step + 1
        packs = (msgspec.structs.replace(pack, name=name, born=ordinal),)
        id, sealed = seal(
            msgspec.structs.replace(manifest, nonce=nonce, step=step, ordinal=ordinal, packs=packs)
        )
        (folder / keys.pack_key(name)).write_bytes(data)
        (folder / keys.manifest_key(id)).write_bytes(sealed)
        return msgspec.structs.replace(
            record,
            id=id,
            step=step,
            ordinal=ordinal,
            packs={name: len(data)},
            metrics={"loss": 1 / ordinal},
        )

    for first in range(1, count, _AT_ONCE):
        copies = [copy(step) for step in range(first, min(first + _AT_ONCE, count))]
        writer.amend("copy", lambda records, copies=copies: [*records, *copies])
    # New checkpoints come after the copies.
    writer._commit(lambda head, records: Draft(records, "count", {"ordinal": count}), None)
    writer.close()
    repo.close()


class Run:
    """One of the runs that are compared."""

    def __init__(self, folder: Path, count: int, keep: str | None) -> None:
        self.folder = folder
        self._ckpts = holdfast.CheckpointManager(
            folder, keep=keep and keep.format(n=count), rewrite_every=1
        )
        self._step = count
        self.open()

    def open(self) -> None:
        """Become the writer; the first save of a process looks at every record once."""
        self._ckpts.acquire()
        self.save()

    def save(self) -> None:
        self._step += 1
        state = {"w": np.full(8, float(self._step))}
        self._ckpts.save(self._step, state, metrics={"loss": 2.0}, block=True)

    def latest(self) -> None:
        with Listing(self.folder) as listing:
            assert listing.latest()

    def checkpoints(self) -> None:
        with Listing(self.folder) as listing:
            assert listing.checkpoints()

    def ls(self) -> None:
        """As people call it: with the start of the interpreter."""
        command = [sys.executable, "-m", "holdfast", "ls", str(self.folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def close(self) -> None:
        self._ckpts.close()


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def starting(folder: Path) -> None:
    """What a process does before its first save: open for writing, collect leftovers."""
    with holdfast.CheckpointManager(folder, keep=None) as ckpts:
        ckpts.acquire()


def measure(folders: dict[int, Path], rounds: int) -> dict[str, dict[int, float]]:
    medians: dict[str, dict[int, float]] = {}

    def compare(name: str, works: dict[int, Callable[[], object]], rounds: int = rounds) -> None:
        seen: dict[int, list[float]] = {count: [] for count in works}
        for _ in range(rounds):
            for count, work in works.items():
                seen[count].append(timed(work))
        medians[name] = {count: statistics.median(times) for count, times in seen.items()}

    compare("start a writer", {n: lambda f=f: starting(f) for n, f in folders.items()}, 5)
    for keep in (None, "last={n}", "last={n} every=1000 best=3:loss", "size={n}MB"):
        runs = {count: Run(folder, count, keep) for count, folder in folders.items()}
        if keep is None:
            compare("open + latest()", {n: run.latest for n, run in runs.items()})
            compare("holdfast ls", {n: run.ls for n, run in runs.items()})
            compare("open + checkpoints()", {n: run.checkpoints for n, run in runs.items()})
        compare(f"save, keep={keep}", {n: run.save for n, run in runs.items()})
        for run in runs.values():
            run.close()
    return medians


def table(medians: dict[str, dict[int, float]]) -> str:
    """Milliseconds, and how many times the first column's."""
    first, *others = next(iter(medians.values()))
    head = ["", f"{first:,}", *(f"{count:,}" for count in others)]
    rows = [head, ["---", *("---:" for _ in head[1:])]]
    for name, by_count in medians.items():
        base = by_count[first]
        row = [name, f"{base * 1e3:.2f} ms"]
        row += [f"{by_count[n] * 1e3:.2f} ms ({by_count[n] / base:.2f}x)" for n in others]
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoints", type=int, nargs="+", default=[10, 10_000])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--folder", type=Path, help="where to build the runs")
    args = parser.parse_args()
    top = Path(tempfile.mkdtemp(prefix="holdfast-long-", dir=args.folder))
    try:
        folders = {count: top / str(count) for count in args.checkpoints}
        for count, folder in folders.items():
            build(folder, count)
        print(table(measure(folders, args.rounds)))
    finally:
        shutil.rmtree(top)


if __name__ == "__main__":
    main()
