"""Real hangs under PyTorch: they are found, told, and cost no bit of the result."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.launcher import LAUNCHER
from tests.support.nursery import Nursery

LOADER = """
import json, random, sys, threading
from pathlib import Path
import torch
from torch.utils.data import DataLoader, Dataset
import holdfast

here, hangs = Path(sys.argv[1]), len(sys.argv) > 2
torch.set_num_threads(1)
torch.manual_seed(1)

def waits_for_itself():
    lock = threading.Lock()
    with lock:
        lock.acquire()

class Noisy(Dataset):
    def __len__(self):
        return 64
    def __getitem__(self, index):
        if hangs and index == 40 and not (here / "hung").exists():
            (here / "hung").touch()
            waits_for_itself()
        return torch.full((4,), float(index)) * torch.rand(4)

if __name__ == "__main__":
    loader = DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=2)
    weight = torch.zeros(4)
    with holdfast.Run(here / "run", every=2, quiet=True) as run:
        run.track(weight=weight)
        box = run.box(seen=[])
        for epoch in run.epochs(2):
            for x in run.batches(loader):
                weight += x.mean(0) * torch.rand(4)
                box.seen.append(float(weight.sum()).hex())
    (here / "result.json").write_text(json.dumps(box.seen))
"""

RANKS = """
import json, os, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
import holdfast

here, hangs = Path(sys.argv[1]), len(sys.argv) > 2
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(rank)
weight = torch.zeros(8)

def sleeps_for_ever():
    (here / "hung").touch()
    while True:
        time.sleep(60)

with holdfast.Run(here / f"run-{rank}", every=2, quiet=True) as run:
    run.track(weight=weight)
    box = run.box(seen=[])
    for step in run.range(12):
        if hangs and rank == 1 and step == 7 and not (here / "hung").exists():
            sleeps_for_ever()
        gradient = torch.rand(8)
        dist.all_reduce(gradient)
        weight += gradient / (step + 1)
        box.seen.append(float(weight.sum()).hex())
(here / f"result-{rank}.json").write_text(json.dumps(box.seen))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    """For what nobody disturbs, and so nobody has to watch."""
    nursery = Nursery(1, "torch._dynamo")
    yield nursery
    nursery.close()


def run_alone(nursery: Nursery, folder: Path, script: str, *launcher: str) -> None:
    folder.mkdir()
    path = folder / "train.py"
    path.write_text(script)
    first, *words = [*launcher, str(path), str(folder)]
    log = folder / "log"
    ended = nursery.start(Path(first), *words, cwd=folder, log=log).wait(120)
    assert ended == 0, log.read_text()


def run_supervised(folder: Path, script: str, launcher: list[str]) -> str:
    """The program under `holdfast run`, where it hangs once; what the supervisor said."""
    folder.mkdir()
    path = folder / "train.py"
    path.write_text(script)
    command = [sys.executable, "-m", "holdfast", "run", "--log-dir", str(folder / "logs")]
    # Long enough for two ranks that start on a busy machine.
    command += ["--hang-timeout", "10s", "--grace", "1s", "--", *launcher]
    command += [str(path), str(folder), "hang"]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def stacks(folder: Path, said: str) -> list[str]:
    """What was kept of each process, after exactly one hang."""
    assert "no heartbeat for 10" in said
    assert f"stacks in {folder}/logs/hang-1" in said
    assert "attempt 2 ended with status 0" in said
    return [path.read_text() for path in (folder / "logs" / "hang-1").iterdir()]


@pytest.mark.slow
def test_a_deadlock_in_a_worker_of_a_loader(tmp_path: Path, nursery: Nursery) -> None:
    run_alone(nursery, tmp_path / "whole", LOADER)
    said = run_supervised(tmp_path / "hung", LOADER, [sys.executable])
    kept = stacks(tmp_path / "hung", said)
    [worker] = [text for text in kept if "in waits_for_itself" in text]
    assert "_worker_loop" in worker
    assert any("run.batches" in text or "in advance" in text for text in kept)
    whole = (tmp_path / "whole" / "result.json").read_text()
    assert (tmp_path / "hung" / "result.json").read_text() == whole


@pytest.mark.slow
def test_a_collective_that_one_rank_never_comes_to(tmp_path: Path, nursery: Nursery) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    torchrun += ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    run_alone(nursery, tmp_path / "whole", RANKS, str(LAUNCHER), "2", str(tmp_path / "pids"))
    said = run_supervised(tmp_path / "hung", RANKS, torchrun)
    kept = stacks(tmp_path / "hung", said)
    assert sum("in sleeps_for_ever" in text for text in kept) == 1
    assert sum("in all_reduce" in text for text in kept) == 1
    for rank in ("0", "1"):
        whole = (tmp_path / "whole" / f"result-{rank}.json").read_text()
        assert (tmp_path / "hung" / f"result-{rank}.json").read_text() == whole
