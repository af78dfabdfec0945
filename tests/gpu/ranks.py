"""Ranks on one device, killed and resumed: two with DistributedDataParallel over gloo (NCCL does
not take two on one device), and one with FSDP2, and with FSDP1, over NCCL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu.checks import Place

_ROOT = Path(__file__).parent.parent
_TIMEOUT_S = 120
_KILLED_AT = 2
"""Checkpoints that are there when a rank is killed."""


def ranks(place: Place, folder: Path) -> str:
    sharded = "cpu:gloo,cuda:nccl" if place.is_gpu else "gloo"
    for kind, size, backend in (("ddp", 2, "gloo"), ("fsdp", 1, sharded), ("fsdp1", 1, sharded)):
        job = _Job(place, kind, size, backend)
        (folder / kind).mkdir()
        whole = job.finish(folder / kind / "whole")
        job.kill(folder / kind / "parts")
        assert job.finish(folder / kind / "parts") == whole, kind
    return "ddp, fsdp and fsdp1"


@dataclass
class _Job:
    place: Place
    kind: str
    size: int
    backend: str

    def start(self, folder: Path) -> subprocess.Popen[bytes]:
        folder.mkdir(exist_ok=True)
        launcher, script = _ROOT / "support" / "launcher.py", _ROOT / "ranks" / "train.py"
        job = [str(folder / "run"), str(folder / "result"), self.kind, "3", "3", "0"]
        command = [sys.executable, str(launcher), str(self.size), str(folder / "pids"), str(script)]
        more = {"DEVICE": str(self.place.device), "BACKEND": self.backend}
        more["PYTHONPATH"] = os.pathsep.join([*sys.path, str(_ROOT.parent)])
        return subprocess.Popen([*command, *job], env={**os.environ, **more})

    def finish(self, folder: Path) -> list[Any]:
        assert self.start(folder).wait(_TIMEOUT_S) == 0
        results = [folder / f"result.{rank}" for rank in range(self.size)]
        return [json.loads(result.read_text()) for result in results]

    def kill(self, folder: Path) -> None:
        """The last rank, once there are some checkpoints."""
        process = self.start(folder)
        until = time.monotonic() + _TIMEOUT_S
        while len(list((folder / "run" / "manifests").glob("*.json"))) < _KILLED_AT:
            assert time.monotonic() < until
            assert process.poll() is None, "it came to its end before it was killed"
            time.sleep(0.005)
        last = (folder / "pids").read_text().split()[-1]
        os.kill(int(last), signal.SIGKILL)
        process.wait(_TIMEOUT_S)
