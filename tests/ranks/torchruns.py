"""Trainings that the real `torchrun` starts, by itself or under `holdfast run`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress

from tests.ranks.jobs import Job

TIMEOUT_S = 120.0
_SETTINGS = {
    "OMP_NUM_THREADS": "1",
    # Else processes that torchrun starts again may find addresses of those before them.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


def torchrun(size: int, *options: str) -> list[str]:
    module = [sys.executable, "-m", "torch.distributed.run"]
    here = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(size)]
    return [*module, *here, *options]


class Launched:
    """Starts of the training of a `Job` by a command that is put in front of it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._environment = {**os.environ, **_SETTINGS}
        self._running: list[subprocess.Popen[bytes]] = []
        job.folder.mkdir(exist_ok=True)

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        with self.job.log().open("ab") as log:
            process = subprocess.Popen(
                [*command, *self.job.words()],
                env=self._environment,
                cwd=self.job.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._running.append(process)
        return process

    def starts(self) -> list[tuple[int, int, int]]:
        """Of each process that trains: torchrun's count of restarts, the rank, the pid."""
        with suppress(FileNotFoundError):
            lines = (self.job.folder / "result.starts").read_text().splitlines()
            return [(int(count), int(rank), int(pid)) for count, rank, pid in map(str.split, lines)]
        return []

    def saved(self) -> int:
        """The newest step of which there is a checkpoint."""
        return max(self.job.steps(), default=0)

    def kill(self, rank: int) -> None:
        """SIGKILL to the newest process of this rank."""
        os.kill([pid for _, one, pid in self.starts() if one == rank][-1], signal.SIGKILL)

    def end(self, process: subprocess.Popen[bytes]) -> int:
        return process.wait(TIMEOUT_S)

    def close(self) -> None:
        """Leave nothing behind, whatever has failed."""
        for process in self._running:
            if process.poll() is None:
                process.kill()
                process.wait()
                for _, _, pid in self.starts():
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
