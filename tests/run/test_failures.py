"""Saves that fail, damaged checkpoints, and what the start says about the last run."""

from __future__ import annotations

import errno
import logging
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.core import file_copies
from holdfast.core.types import Buffer
from holdfast.errors import NoIntactCheckpoint, RunHeld, SaveFailed, StoreFull, StructureMismatch
from holdfast.stores.memory import MemoryStore
from tests.support.damage import damage_newest
from tests.support.jobs import Killed, Model, fresh_address, process


class FullDisk(MemoryStore):
    """A store without space for data while `full`; `refused` counts the saves."""

    full = False
    refused = 0

    def put_new(self, key: str, parts: Any) -> bool:
        if self.full and key.startswith("packs/"):
            self.refused += 1
            raise StoreFull("no space left")
        return super().put_new(key, parts)


def started(store: FullDisk, **settings: Any) -> holdfast.Run:
    run = holdfast.Run(fresh_address(), store=store, quiet=True, keep=None, **settings)
    return run.track(noise=np.zeros(100))


def test_a_failed_save_does_not_stop_training(caplog) -> None:
    store = FullDisk()
    run = started(store, every=1)
    noise = run._session.tracked.objects["noise"]
    for index in run.range(6):
        run.manager.wait()
        noise += 1
        store.full = index in (2, 3)
    assert [info.step for info in run.manager.checkpoints()] == [1, 2, 5, 6]
    assert store.refused >= 2
    assert "no space left" in caplog.text
    run.close()


def test_too_many_failed_saves_in_a_row_raise(caplog) -> None:
    store = FullDisk()
    run = started(store, every=1, max_save_failures=2)
    seen = []
    with pytest.raises(SaveFailed, match="2 saves"):
        for index in run.range(9):
            run.manager.wait()
            seen.append(index)
            run._session.tracked.objects["noise"][:] = index + 1
            store.full = index >= 2
    assert len(seen) == 5
    assert [info.step for info in run.manager.checkpoints()] == [1, 2]
    with pytest.raises(SaveFailed):
        run.close()


def test_the_last_save_is_tried_twice(caplog, capfd) -> None:
    class Once(FullDisk):
        def put_new(self, key: str, parts: list[Buffer]) -> bool:
            try:
                return super().put_new(key, parts)
            except StoreFull:
                self.full = False
                raise

    store = Once()
    run = started(store, every=None)
    for _ in run.range(3):
        store.full = True
    assert [info.step for info in run.manager.checkpoints()] == [3]
    assert "trying again: no space left" in capfd.readouterr().err
    run.close()


def test_a_last_save_that_fails_raises(caplog) -> None:
    store = FullDisk()
    run = started(store, every=None)
    with pytest.raises(StoreFull):
        for _ in run.range(3):
            store.full = True
    with pytest.raises(SaveFailed):
        run.close()


def test_the_programs_own_error_is_not_hidden_by_a_failed_save(caplog) -> None:
    store = FullDisk()
    with pytest.raises(ZeroDivisionError), started(store, every=1) as run:
        for index in run.range(9):
            store.full = True
            if index == 2:
                _ = 1 / 0
    assert "last save" in caplog.text


def two_checkpoints(folder: Path) -> Path:
    with process():
        run = holdfast.Run(folder, every=2, keep=None, quiet=True)
        weights = np.zeros(1000)
        run.track(weights=weights)
        for index in run.range(6):
            weights += index
            if index == 4:
                run.manager.wait()
                raise Killed
    return folder


def test_a_damaged_checkpoint_is_skipped_loudly(tmp_path: Path, capfd, caplog) -> None:
    folder = two_checkpoints(tmp_path / "run")
    damage_newest(folder)
    run = holdfast.Run(folder, quiet=True)
    weights = np.zeros(1000)
    run.track(weights=weights)
    assert list(run.range(6)) == [2, 3, 4, 5]
    assert weights[0] == 1
    err = capfd.readouterr().err
    assert "at step 2 (verified" in err
    assert "1 newer checkpoint damaged and not used" in err
    assert any(record.levelno == logging.ERROR for record in caplog.records)
    run.close()


def test_no_intact_checkpoint_is_an_error_and_never_a_silent_start(tmp_path: Path, caplog) -> None:
    folder = two_checkpoints(tmp_path / "run")
    for manifest in (folder / "manifests").iterdir():
        manifest.chmod(0o644)
        manifest.write_bytes(b"{}")
    with pytest.raises(NoIntactCheckpoint):
        holdfast.Run(folder, quiet=True).track(weights=np.zeros(1000)).epochs(3)


def test_what_cannot_be_filled_in_place_is_refused(tmp_path: Path) -> None:
    folder = two_checkpoints(tmp_path / "run")
    for other, words in (
        (np.ones(999), r"float64\[1000\], live is float64\[999\]"),
        ([], "list"),
    ):
        run = holdfast.Run(folder, quiet=True).track(weights=other)
        with pytest.raises(StructureMismatch, match=words):
            run.range(6)


def test_things_of_many_kinds_are_restored_in_place() -> None:
    def things() -> dict[str, Any]:
        return {
            "array": np.zeros(3),
            "list": [0],
            "dict": {"a": [0]},
            "set": {0},
            "generator": np.random.default_rng(0),
            "python": random.Random(0),
            "pair": (np.zeros(2), Model()),
            "object": Model(),
        }

    address = fresh_address()
    run, first = holdfast.Run(address, quiet=True), things()
    for _ in run.track(**first).range(2):
        first["array"] += 1
        first["list"].append(1)
        first["dict"]["a"].append(2)
        first["set"].add(3)
        first["generator"].random()
        first["python"].random()
        first["pair"][0][:] = 5
        first["pair"][1].seen = 6
        first["object"].seen = 7
    run, second = holdfast.Run(address, quiet=True), things()
    list(run.track(**second).range(2))
    assert second["array"].tolist() == [2.0] * 3
    assert (second["list"], second["dict"], second["set"]) == ([0, 1, 1], {"a": [0, 2, 2]}, {0, 3})
    assert second["generator"].random() == first["generator"].random()
    assert second["python"].random() == first["python"].random()
    assert second["pair"][0].tolist() == [5.0] * 2
    assert (second["pair"][1].seen, second["object"].seen) == (6, 7)


def test_a_second_process_is_told_who_holds_the_run(tmp_path: Path) -> None:
    import subprocess
    import sys

    run = holdfast.Run(tmp_path / "run", quiet=True)
    next(run.range(3))
    code = f"import holdfast; holdfast.Run({str(tmp_path / 'run')!r}).range(3)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert RunHeld.__name__ in done.stderr
    run.close()


def test_the_start_says_what_differs_from_the_last_run(monkeypatch, capfd) -> None:
    from holdfast.run import environment

    address = fresh_address()
    real = environment.collect()
    facts = [real, {**real, "python": "9.9.9", "packages": {**real["packages"], "numpy": "0.1"}}]
    for fact in facts:
        monkeypatch.setattr(environment, "collect", lambda fact=fact: fact)
        list(holdfast.Run(address).range(2))
    lines = capfd.readouterr().err.splitlines()
    now, numpy = real["python"], real["packages"]["numpy"]
    assert f"since the last run: python {now} -> 9.9.9; numpy {numpy} -> 0.1" in lines


def test_publish_best(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    run = holdfast.Run(
        fresh_address(), keep="best=1:loss", publish=f"best:{tmp_path / 'best'}", quiet=True
    )
    weights = np.zeros(2)
    run.track(weights=weights)
    for index in run.range(5):
        weights += 1
        run.log(loss=abs(index - 2))
    run.close()
    assert load_file(tmp_path / "best" / "state.safetensors")["weights"].tolist() == [
        3.0,
        3.0,
    ]


def test_an_untracked_optimizer_earns_one_line(capfd) -> None:
    import torch

    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = holdfast.Run(fresh_address(), quiet=True).track(model=model)
    for _ in run.epochs(2):
        list(run.range(2))
    err = capfd.readouterr().err
    assert err.count("optimizer will not be saved") == 1
    assert "run.track(optimizer=optimizer)" in err
    assert optimizer.param_groups


def test_an_optimizer_that_is_declared_late_earns_none(capfd) -> None:
    import torch

    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = holdfast.Run(fresh_address(), quiet=True, late=["optimizer"]).track(model=model)
    for _ in run.epochs(1):
        run.track(optimizer=optimizer)
    assert "will not be saved" not in capfd.readouterr().err


def test_torch_metrics_and_state() -> None:
    import torch

    def train(address: str, stop: int) -> list[float]:
        torch.manual_seed(0)
        first = torch.nn.Linear(4, 4)
        model = torch.nn.Sequential(first, torch.nn.Dropout(0.5))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        data = torch.utils.data.TensorDataset(torch.arange(48.0).reshape(12, 4))
        loader = torch.utils.data.DataLoader(data, batch_size=3, shuffle=True)
        run = holdfast.Run(address, every=1, quiet=True)
        run.track(model=model, optimizer=optimizer, scheduler=scheduler, data=loader)
        for epoch in run.epochs(4):
            for (batch,) in run.batches(loader):
                loss = model(batch).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                run.log(loss=loss)
                if run.step == stop:
                    raise Killed
            scheduler.step()
            run.log(epoch=epoch)
        return [*first.weight.flatten().tolist(), run.metrics["loss"]]

    whole = train(fresh_address(), -1)
    for stop in (0, 3, 4, 9, 15):
        address = fresh_address()
        with process():
            train(address, stop)
        assert train(address, -1) == whole


def test_a_run_whose_log_cannot_be_read_at_all_goes_on(caplog) -> None:
    """Its writer rebuilds the list; nobody has to come at night."""
    store = MemoryStore("run-no-log")
    for start in (1, 2):
        run = holdfast.Run("memory://run-no-log", store=store, every=1, keep=None, quiet=True)
        box = run.box(seen=[])
        with process():
            for step in run.range(5):
                box.seen.append(step)
                if start == 1 and step == 3:
                    run.manager.wait()
                    raise Killed
        if start == 1:
            run.close()  # it would add one more entry when the next Run closes it
            for entry in list(store.list("log/")):
                data = bytearray(store.get(entry.key, max_bytes=1 << 20))
                data[100] ^= 1
                store.delete([entry.key])
                store.put_new(entry.key, [data])
            caplog.clear()
    assert run.resumed is not None
    assert run.resumed.step == 3
    assert box.seen == [0, 1, 2, 3, 4]
    assert "rebuilt its list from 3 whole checkpoint(s)" in caplog.text


def test_a_damaged_checkpoint_is_told_once_per_start(caplog) -> None:
    store = MemoryStore("run-told-once")
    for start in (1, 2):
        run = holdfast.Run("memory://run-told-once", store=store, every=1, keep=None, quiet=True)
        with process():
            for step in run.range(5):
                if start == 1 and step == 3:
                    run.manager.wait()
                    raise Killed
        if start == 1:
            key = f"manifests/{run.manager.info().id}.json"
            store.delete([key])
            caplog.clear()
    assert run.resumed is not None
    assert run.resumed.step == 2
    told = [record.getMessage() for record in caplog.records if "@3" in record.getMessage()]
    assert told == [
        "checkpoint memory://run-told-once@3 is damaged, trying the one before it:\n"
        f"  {key}: it is missing (checkpoint 3)"
    ]
    assert caplog.text.count("fell back to") == 1


def test_the_last_save_is_tried_again_when_a_file_could_not_be_copied(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(file_copies, "MEMORY_BYTES", 0)
    path = tmp_path / "log"
    path.write_bytes(b"1")
    real, refused = tempfile.TemporaryFile, []

    def full_once(**named: Any) -> Any:
        if len(refused) < 2:  # in its folder, and in the system's
            refused.append(named)
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(**named)

    monkeypatch.setattr(tempfile, "TemporaryFile", full_once)
    run = holdfast.Run(fresh_address(), every=None, quiet=True)
    run.track(log=holdfast.File(path))
    list(run.range(2))
    run.close()
    assert len(refused) == 2
    with holdfast.CheckpointManager(run.address) as manager:
        assert manager.load()["log"].read() == b"1"
