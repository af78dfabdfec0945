"""Starting the processes of a rehearsal, and preparing the folders that they go to."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from holdfast.core.records import Entry
from holdfast.core.sealed import unseal
from holdfast.manager.comparison import Comparison
from holdfast.manager.listing import Listing
from holdfast.repo import keys
from holdfast.run.rehearsal import VARIABLE, Part

_END_OF_LOG = 4000  # characters that are shown of a process that failed


@dataclass(frozen=True)
class Ended:
    """How one process ended."""

    status: int | None
    """As `subprocess` gives it: negative for a signal. None: it took too long."""
    seconds: float
    output: str
    """The end of what it wrote, stdout and stderr together."""

    def killed_by(self, name: str) -> bool:
        return self.status == -signal.Signals[name]


def play(command: Sequence[str], part: Part, *, hash_seed: int, timeout_s: float) -> Ended:
    """Run `command` as one part of a rehearsal, until it ends."""
    Path(part.folder).mkdir(parents=True, exist_ok=True)
    log_path = Path(part.folder, f"output-{part.process}.txt")
    environment = {
        **os.environ,
        VARIABLE: msgspec.json.encode(part).decode(),
        # Orders that depend on it must not decide anything: a restart has another one.
        "PYTHONHASHSEED": str(hash_seed),
        "PYTHONUNBUFFERED": "1",
    }
    began = time.monotonic()
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            list(command),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            # The loader's workers too, which a SIGKILL of their parent leaves behind.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    output = log_path.read_text(errors="backslashreplace")[-_END_OF_LOG:]
    return Ended(status, time.monotonic() - began, output)


def cut(whole: Path, folder: Path, run: str, step: int) -> None:
    """Begin `folder` with the run as it was in `whole` when `step` was its newest checkpoint."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.joinpath("runs").mkdir(parents=True)
    target = folder / "runs" / run
    shutil.copytree(whole / "runs" / run, target)
    # Entries are immutable and each lists all checkpoints: without the newer ones the run
    # is what it was. (The writer that opens it removes the packs that nothing lists.)
    for path in sorted(target.joinpath(keys.LOG).iterdir()):
        _, entry = unseal(path.read_bytes(), Entry, path.name)
        if entry.records and entry.records[-1].step > step:
            path.unlink()


def checkpoints_of(folder: Path, run: str) -> list[int]:
    """Steps of the run's checkpoints, oldest first."""
    with Listing(folder / "runs" / run) as listing:
        return [info.step for info in listing.checkpoints()]


def comparison(
    folders: tuple[Path, Path], run: str, step: int, *, values: bool = False
) -> Comparison:
    """Of the checkpoints of one step in two folders."""
    one, other = (folder / "runs" / run for folder in folders)
    with Listing(one) as here, Listing(other) as there:
        return here.compare(step, there, step, values=values)


def ranks_apart(folders: tuple[Path, Path], run: str, step: int) -> list[int]:
    """Ranks beside the first whose own values differ in the checkpoints of one step in two
    folders, of which `comparison` has found that all else is equal: leaves, and what rank 0 has."""
    one, other = (folder / "runs" / run for folder in folders)
    with Listing(one) as here, Listing(other) as there:
        others = [listing.manifest(step).others or () for listing in (here, there)]
    # Each says how the values of a rank differ from those of rank 0.
    return [a.rank for a, b in zip(*others, strict=True) if a.tree != b.tree]
