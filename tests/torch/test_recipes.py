"""Errors that people know from `torch.save` and `torch.load`: the real one, and that there is
none here. Those of `docs/recipes.md`; what that page runs itself is not repeated."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import holdfast
from holdfast.errors import SaveFailed
from holdfast.stores.faulty import Effect, Fault, FaultPlan, FaultyStore
from holdfast.stores.memory import MemoryStore
from holdfast.torch import save_checkpoint
from tests.support.jobs import fresh_address
from tests.support.waiting import within
from tests.torch.roundtrip import assert_same


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


@pytest.fixture
def one_process() -> Any:
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_saved_under_ddp_and_loaded_without(one_process: None, tmp_path: Path) -> None:
    model = nn.parallel.DistributedDataParallel(net())
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"module\.0\.weight"'):
        net().load_state_dict(torch.load(tmp_path / "model.pt"))

    with holdfast.CheckpointManager(fresh_address(), keep=None) as ckpts:
        ckpts.save(1, {"model": model, "optimizer": optimizer}).result()
        plain = net()
        fresh = torch.optim.Adam(plain.parameters())
        ckpts.restore({"model": plain, "optimizer": fresh})
        for one, other in zip(plain.parameters(), model.parameters(), strict=True):
            assert torch.equal(one, other)
            assert torch.equal(fresh.state[one]["exp_avg"], optimizer.state[other]["exp_avg"])
        ckpts.save(2, {"model": plain, "optimizer": fresh}).result()
        wrapped = nn.parallel.DistributedDataParallel(net())
        ckpts.restore({"model": wrapped}, only=["model"])
        for one, other in zip(wrapped.parameters(), plain.parameters(), strict=True):
            assert torch.equal(one, other)


_RANK = """
import sys
import torch, torch.distributed as dist
from torch import nn
import holdfast
rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", store=dist.FileStore(path + "/store", 2), rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.parallel.DistributedDataParallel(
    nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
)
optimizer = torch.optim.Adam(model.parameters())
for _ in range(3):
    optimizer.zero_grad()
    model(torch.randn(8, 4) + rank).square().mean().backward()
    optimizer.step()
if rank == 0:
    with holdfast.CheckpointManager(path + "/run", keep=None) as ckpts:
        ckpts.save(3, {"model": model, "optimizer": optimizer}).result()
    state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, path + "/expected")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_saved_by_two_processes_and_resumed_by_one(one_process: None, tmp_path: Path) -> None:
    commands = [[sys.executable, "-c", _RANK, str(rank), str(tmp_path)] for rank in range(2)]
    ranks = [subprocess.Popen(command) for command in commands]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    expected = torch.load(tmp_path / "expected")
    for wrap in (lambda model: model, nn.parallel.DistributedDataParallel):
        model = wrap(net())
        optimizer = torch.optim.Adam(model.parameters())
        with holdfast.CheckpointManager(tmp_path / "run", keep=None) as ckpts:
            ckpts.restore({"model": model, "optimizer": optimizer})
        inner = getattr(model, "module", model)
        assert_same(dict(inner.state_dict()), dict(expected["model"]))
        assert_same(optimizer.state_dict()["state"], expected["optimizer"]["state"])


# To read its file the usual way needs the model's 192 MiB once more, and there are 96. Ours needs
# some 30; stacks of threads that end later (8 MiB each) are not enough for the other.
_LOAD = """
import resource, sys
import torch
import holdfast
from holdfast.torch import load_checkpoint
how, path = sys.argv[1:]
torch.set_num_threads(1)
model = torch.nn.Linear(2048, 24576, bias=False)
def used():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmData:"))
with holdfast.CheckpointManager("memory://warm") as warm:
    warm.save(1, {"x": torch.zeros(9)}).result()
limit = used() + (96 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
if how == "torch":
    model.load_state_dict(torch.load(path + "/model.pt"))
else:
    load_checkpoint(path + "/run", model=model)
assert model.weight[7, 7] == 7
"""


def test_out_of_memory_while_loading(tmp_path: Path) -> None:
    model = nn.Linear(2048, 24576, bias=False)
    with torch.no_grad():
        model.weight[7, 7] = 7
    torch.save(model.state_dict(), tmp_path / "model.pt")
    save_checkpoint(tmp_path / "run", model=model, step=1)

    def load(how: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", _LOAD, how, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    native = load("torch")
    assert native.returncode == 1
    assert "can't allocate memory" in native.stderr
    ours = load("holdfast")
    assert ours.returncode == 0, ours.stderr


_SAVE = """
import sys
import torch
import holdfast
how, path = sys.argv[1:]
state = {"x": torch.arange(24 << 20)}
print("ready", flush=True)
manager = holdfast.CheckpointManager(path + "/run", keep="last=1")
for step in range(2, 1000):
    if how == "torch":
        torch.save(state, path + "/model.pt")
    else:
        state["x"] += 1
        manager.save(step, state, block=True)
"""


@pytest.mark.parametrize("how", ["torch", "holdfast"])
def test_killed_in_the_middle_of_a_save(how: str, tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(3)}, tmp_path / "model.pt")
    with holdfast.CheckpointManager(tmp_path / "run") as ckpts:
        ckpts.save(1, {"x": torch.zeros(3)}).result()
    command = [sys.executable, "-c", _SAVE, how, str(tmp_path)]
    for _ in range(20):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            assert within(60, lambda: _half_written(tmp_path, how), every=0.0005)
            process.send_signal(signal.SIGKILL)
        if how == "holdfast" or _half_written(tmp_path, how):
            break  # else that save had ended when the signal came
    if how == "torch":
        with pytest.raises(RuntimeError, match="failed finding central directory"):
            torch.load(tmp_path / "model.pt")
        return
    with holdfast.CheckpointManager(tmp_path / "run") as ckpts:
        info = ckpts.latest()
        assert info is not None
        assert all(result.ok for result in ckpts.verify())
        ckpts.restore({"x": torch.zeros(3) if info.step == 1 else torch.zeros(24 << 20).long()})
        ckpts.save(info.step + 1, {"x": torch.zeros(3)}).result()


def _half_written(folder: Path, how: str) -> bool:
    if how == "torch":
        return 16 << 20 < (folder / "model.pt").stat().st_size < 160 << 20
    newest = max((folder / "run").rglob("*"), key=_nbytes)
    return _nbytes(newest) > 16 << 20


def _nbytes(path: Path) -> int:
    try:
        return os.stat(path).st_blocks * 512
    except FileNotFoundError:
        return 0


def test_uploads_that_fail_end_the_training() -> None:
    fault = Fault(Effect.FAIL, operation="put_new", prefix="manifests/", times=None)
    store = FaultyStore(MemoryStore(), FaultPlan((fault,)))
    run = holdfast.Run("memory://uploads", store=store, every=1)
    run.track(x=torch.zeros(3))
    trained = 0
    with pytest.raises(SaveFailed, match="3 saves of memory://uploads in a row have"):
        for _ in run.range(100):
            trained += 1
    assert 3 <= trained <= 5
    assert run.manager.latest() is None
    with pytest.raises(SaveFailed):
        run.close()


def test_an_upload_that_failed_is_told_at_the_end() -> None:
    fault = Fault(Effect.FAIL, operation="put_new", prefix="manifests/", times=None)
    store = FaultyStore(MemoryStore(), FaultPlan((fault,)))
    ckpts = holdfast.CheckpointManager("memory://uploads", store=store)
    ckpts.save(1, {"x": torch.zeros(3)})
    with pytest.raises(SaveFailed, match=r"the last save of .* failed"):
        ckpts.close()
