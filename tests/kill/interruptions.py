"""Runs that are interrupted at random moments, alone and under `holdfast run`.

    python -m tests.kill.interruptions --number 200

Each run is started again until it ends, as a scheduler would do it, and must end with the
results of the one that nobody interrupted. After each end no process of it may be left, and at the
end of a run no temporary file.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.kill.driver import HERE, ROOT, differing, wait_until

ALONE = ("SIGKILL", "SIGTERM", "SIGINT", "SIGUSR1", "notice")
SUPERVISED = (*ALONE, "SIGKILL of holdfast run")
PREEMPTED = 75

_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans(adopt: bool = True) -> None:
    """Processes whose parent dies become children of this one, where they are seen."""
    assert ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0) == 0


@dataclass
class Job:
    """One run, which is started again and again."""

    folder: Path
    supervised: bool = False
    script: str = "interrupted"
    interruptions: Counter[str] = field(default_factory=Counter)
    starts: int = 0

    @property
    def result(self) -> Path:
        return self.folder / "result.json"

    @property
    def notice(self) -> Path:
        return self.folder / "notice"

    def start(self) -> subprocess.Popen[bytes]:
        self.starts += 1
        for name in ("cwd", "tmp"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.notice.unlink(missing_ok=True)  # the next machine has none
        program = [sys.executable, str(HERE / "scripts" / f"{self.script}.py")]
        program += [str(self.folder / "run"), str(self.result)]
        around = [sys.executable, "-m", "holdfast", "run", "--"] if self.supervised else []
        environment = {
            **os.environ,
            "HOLDFAST_NOTICE_FILE": str(self.notice),
            "PYTHONHASHSEED": str(self.starts),
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(self.folder / "tmp"),
            "HOME": str(self.folder / "home"),
        }
        with open(self.folder / "log.txt", "ab") as log:
            return subprocess.Popen(
                [*around, *program],
                cwd=self.folder / "cwd",
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def run(self, kind: str = "", after_s: float = 0.0) -> bool:
        """One start until its end; whether the run is complete. Fails if it ended badly."""
        before = children()
        process = self.start()
        interrupted = False
        try:
            if kind:
                try:
                    process.wait(after_s)
                except subprocess.TimeoutExpired:
                    interrupted = self.interrupt(kind, process.pid)
            process.wait(120)
        finally:
            process.kill()
            process.wait()
        # What a signal has killed at once left what it had started (a program; git, which a start
        # asks for the commit). That ends by itself, and is ours to reap.
        self._check_nobody_is_left(before, kind, reap=process.returncode < 0)
        if process.returncode == 0:
            # It came too late, but for what the supervisor has answered by itself.
            if interrupted and self.supervised and kind == "SIGKILL":
                self.interruptions[kind] += 1
            return True
        # A signal in the first moments, before anybody waits for it, does what it always does.
        early = (getattr(signal, kind).value,) if kind.isupper() else ()
        allowed = {PREEMPTED, *(-one for one in early), *(128 + one for one in early)}
        if kind == "SIGKILL of holdfast run":
            allowed = {-signal.SIGKILL}
        text = (self.folder / "log.txt").read_text()[-3000:]
        if kind == "SIGINT" and "KeyboardInterrupt" in text:
            allowed.add(1)  # while Python itself was starting
        if not interrupted or process.returncode not in allowed:
            raise AssertionError(f"{kind or 'nothing'}: status {process.returncode}\n{text}")
        self.interruptions[kind] += 1
        return False

    def interrupt(self, kind: str, pid: int) -> bool:
        """Whether there was still something to interrupt."""
        if kind == "notice":
            self.notice.write_text("soon")
            return True
        if kind == "SIGKILL of holdfast run":
            os.kill(pid, signal.SIGKILL)
            return True
        # A machine that goes away tells the outermost process; the kernel kills any of them.
        victim = pid
        if self.supervised and kind == "SIGKILL":
            inner = children(pid)
            if not inner:
                return False  # not begun, or already over
            victim = min(inner)
        try:
            os.kill(victim, getattr(signal, kind))
        except ProcessLookupError:
            return False
        return True

    def finish(self) -> dict[str, Any]:
        """Run to the end, uninterrupted from now on, and give the result."""
        assert self.run(), (self.folder / "log.txt").read_text()[-3000:]
        folders = [self.folder / name for name in ("tmp", "cwd", "run/tmp")]
        left = [path for folder in folders for path in folder.glob("*")]
        assert left == [], left
        return json.loads(self.result.read_text())

    def _check_nobody_is_left(self, before: set[int], kind: str, *, reap: bool) -> None:
        """Orphans would be children of this process (see `adopt_orphans`), zombies, too."""

        def gone() -> bool:
            left = children() - before
            if reap:
                for pid in left:
                    os.waitpid(pid, os.WNOHANG)
            return not left

        try:
            wait_until(gone, 60)
        except AssertionError:
            left = [Path(f"/proc/{pid}/stat").read_text()[:60] for pid in children() - before]
            raise AssertionError(f"{self.folder}, after {kind}: {left}") from None


def children(pid: int | None = None) -> set[int]:
    """Of a process, or of this one."""
    tasks = Path(f"/proc/{pid or os.getpid()}/task")
    found: set[int] = set()
    try:
        for task in tasks.iterdir():
            found.update(map(int, (task / "children").read_text().split()))
    except (FileNotFoundError, ProcessLookupError):
        pass
    return found


def interrupt_all(job: Job, chance: random.Random, number: int) -> None:
    """Interrupt a run up to `number` times, each in the first part of what a start lasts."""
    kinds = SUPERVISED if job.supervised else ALONE
    for _ in range(number):
        if job.run(chance.choice(kinds), chance.uniform(0.05, 1.6)):
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--number", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    # Where a shell has started this with `&`, it is ignored, here and in what is started.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    adopt_orphans()
    folder = Path(tempfile.mkdtemp(prefix="holdfast-interruptions-"))
    print(f"seed {options.seed}, folder {folder}", flush=True)
    chance = random.Random(options.seed)
    wanted = Job(folder / "whole").finish()
    done: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
    runs = starts = 0
    began = time.monotonic()
    while sum(counter.total() for counter in done.values()) < options.number:
        job = Job(folder / f"run{runs}", supervised=runs % 2 == 1)
        interrupt_all(job, chance, 6)
        differences = differing(job.finish(), wanted)
        if differences:
            print(f"DIFFERENT in {job.folder}: {differences}, {dict(job.interruptions)}")
            sys.exit(1)
        runs, starts = runs + 1, starts + job.starts
        done[job.supervised] += job.interruptions
        shutil.rmtree(job.folder)
        total = sum(counter.total() for counter in done.values())
        print(f"{total:5} interruptions, {runs} runs equal", flush=True)
    shutil.rmtree(folder)
    minutes = (time.monotonic() - began) / 60
    print(f"\n{runs} runs ({starts} starts) in {minutes:.0f} min, all equal; interrupted by:")
    for supervised, counter in done.items():
        for kind, count in sorted(counter.items()):
            print(f"  {'under holdfast run' if supervised else 'alone':<20} {kind:<26} {count:>5}")


if __name__ == "__main__":
    main()
