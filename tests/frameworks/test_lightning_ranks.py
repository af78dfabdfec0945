"""Trainings with Lightning on several ranks, killed and stopped at many places and started again,
on other numbers of ranks, too.

The ranks are forked from a process that has imported Lightning, once for all tests here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import holdfast
from tests.support import launcher
from tests.support.jobs import steps_of
from tests.support.nursery import ROOT, Nursery

_RANKS = ROOT / "tests" / "support" / "lightning_ranks.py"
_PROGRAM = """
import logging
import os
import sys
import time
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
logging.disable(logging.INFO)
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

import holdfast
import holdfast.lightning


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        layers = torch.nn.Linear(4, 8), torch.nn.Dropout(), torch.nn.Linear(8, 1)
        self.net = torch.nn.Sequential(*layers)

    def training_step(self, batch, number):
        x, y = batch
        return ((self.net(x) - y) ** 2).mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Telling(pl.Callback):
    def on_fit_start(self, trainer, module):
        Path(f"{sys.argv[2]}.{trainer.global_rank}").write_text(str(os.getpid()))

    def on_train_batch_end(self, trainer, *args):
        if trainer.is_global_zero:
            print(trainer.global_step, flush=True)
            time.sleep(0.05)  # so that signals come in time


torch.set_num_threads(1)
pl.seed_everything(1, verbose=False)
x = torch.randn(80, 4)
run = holdfast.Run(sys.argv[1], every=5, quiet=True)
model = Model()
trainer = pl.Trainer(
    max_epochs=4,
    accelerator="cpu",
    devices=2,
    strategy="ddp",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    callbacks=[holdfast.lightning.Callback(run), Telling()],
)
data = TensorDataset(x, x.sum(1, keepdim=True))
trainer.fit(model, DataLoader(data, 4, shuffle=True, num_workers=1))
if trainer.is_global_zero:
    state = b"".join(one.numpy().tobytes() for one in model.state_dict().values())
    Path(sys.argv[2]).write_bytes(state)
"""


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery(1, preload="tests.support.lightning_ranks")
    yield nursery
    nursery.close()


@pytest.fixture
def under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")


def through(nursery: Nursery, size: int, scenario: str, folder: Path) -> list[Any]:
    """What a scenario returned on each of `size` ranks."""
    forked(nursery, size, folder, str(_RANKS), scenario, str(folder))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


def forked(nursery: Nursery, size: int, folder: Path, *argv: str) -> None:
    """Run a script on each of `size` ranks."""
    log = folder / "log"
    log.touch()
    command = str(size), str(folder / "pids"), *argv
    process = nursery.start(Path(launcher.__file__), *command, cwd=folder, log=log)
    assert process.wait(200) == 0, log.read_text()


@pytest.mark.usefixtures("under_torchrun")
def test_killed_anywhere(nursery: Nursery, tmp_path: Path) -> None:
    ranks = through(nursery, 2, "killed", tmp_path)
    first, second = ranks
    assert first["epoch"] < 5
    assert first["metrics"]["error"] == second["metrics"]["error"]
    assert first["model"]["net.0.weight"] == second["model"]["net.0.weight"]
    assert first["drawn"] != second["drawn"]
    rows, score = first["more"]
    assert len(rows.splitlines()) > 4
    assert score is not None


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_on_another_number_of_ranks_no_sample_is_lost_or_doubled(
    before: int, after: int, nursery: Nursery, tmp_path: Path
) -> None:
    old = through(nursery, before, "leave", tmp_path)
    new = through(nursery, after, "go_on", tmp_path)
    each = 10 // before
    inside: set[int] = set()
    for name, found in new[0].items():
        more, steps = found["seen"], found["run"][0]
        taken = steps - len(more)
        parts = [*(one["seen"][:taken] for one in old), *(one[name]["seen"] for one in new)]
        samples = [
            (epoch, number) for part in parts for epoch, *numbers in part for number in numbers
        ]
        assert sorted(samples) == [(epoch, n) for epoch in (0, 1) for n in range(20)], name
        first = each if taken >= each else taken + sum(epoch == 0 for epoch, *_ in more)
        heard = [one for one in found["heard"] if one.startswith("validated")]
        assert heard[1:] == [f"validated at {first}", f"validated at {steps}"]
        assert found["rates"] == pytest.approx([0.02 * 0.7**2])
        if after > before:
            assert found["metrics"]["number_epoch"] == 9.5
        if taken % each:
            inside.add(taken // each)
    assert inside == {0, 1}
    if after == 1:
        (said,) = through(nursery, 1, "without_a_rule", tmp_path)
        assert "the number of ranks was 2, is 1" in said
        assert 'strategy="ddp"' in said


def test_what_one_rank_knows_all_do(nursery: Nursery, tmp_path: Path) -> None:
    """Those that Lightning has started leave with 0: else its launcher kills the first one."""
    assert through(nursery, 2, "asked", tmp_path) == [[75, 75], [0, 0]]
    assert sorted(steps_of(str(tmp_path / "job" / "run"))) == [4, 8, 14, 15]
    with holdfast.CheckpointManager(tmp_path / "rules" / "run") as manager:
        best = manager.best("val_loss")
        checkpoints = manager.checkpoints()
    assert "every=2s" in {info.note for info in checkpoints}
    assert best is not None
    assert best.step % 5 == 0
    values = [one.metrics["val_loss"] for one in checkpoints if "val_loss" in one.metrics]
    assert best.metrics["val_loss"] == min(values)


@pytest.mark.usefixtures("under_torchrun")
def test_under_torchrun_all_leave_with_75_and_what_is_refused(
    nursery: Nursery, tmp_path: Path
) -> None:
    for in_training, before, apart, hook in through(nursery, 2, "left", tmp_path):
        assert (in_training, before) == (75, 75)
        assert apart.startswith("the trainer has 2 processes, and 1 save this run")
        assert hook.startswith("the state of a communication hook")


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["sharded", "folds"])
def test_other_trainings(scenario: str, nursery: Nursery, tmp_path: Path) -> None:
    first, second = through(nursery, 2, scenario, tmp_path)
    if scenario == "sharded":
        first, second = first["model"], second["model"]
    assert first == second


@pytest.mark.slow
def test_gradients_of_three_are_summed_in_the_order_of_before(
    nursery: Nursery, tmp_path: Path
) -> None:
    models = [found["model"] for found in through(nursery, 3, "of_more_than_two", tmp_path)]
    assert models[0] == models[1] == models[2]


@pytest.mark.slow
def test_sharded_by_fsdp1(nursery: Nursery, tmp_path: Path) -> None:
    (first, whole), (second, _) = through(nursery, 2, "sharded_by_fsdp1", tmp_path)
    # torch gathers those of inner wrappers for a state_dict; the rest are the outer one's.
    for name in ("net.0.weight", "net.0.bias", "head.weight", "head.bias"):
        assert first[name] == second[name] == whole[name]
    for name in ("net.1.weight", "net.1.bias"):
        assert first[name] + second[name] == whole[name]


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_by_lightnings_own_launcher(nursery: Nursery, tmp_path: Path) -> None:
    """Stopped (at the end of an epoch, if nothing holds the signal up), started again, and a rank
    killed; the ranks go together. The end, to which another launcher brings them, is that of ranks
    that it has started and nobody has stopped."""
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)

    def finish(run: str, result: str) -> bytes:
        forked(nursery, 2, tmp_path, *(str(tmp_path / one) for one in ("program.py", run, result)))
        return (tmp_path / result).read_bytes()

    whole = finish("a", "whole")

    def start(upto: int) -> subprocess.Popen[str]:
        command = [sys.executable, str(program), str(tmp_path / "run"), str(tmp_path / "result")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        assert any(int(line) >= upto for line in process.stdout)
        return process

    def ranks() -> list[int]:
        return [int((tmp_path / f"result.{rank}").read_text()) for rank in (0, 1)]

    first = start(9)
    os.kill(first.pid, signal.SIGTERM)
    first.communicate(timeout=60)
    assert first.returncode == 75
    assert not any(map(is_there, ranks()))
    second = start(18)
    os.kill(ranks()[1], signal.SIGKILL)
    second.communicate(timeout=20)  # its launcher looks every 5 seconds
    assert second.returncode not in (0, 75)
    assert finish("run", "result") == whole
