"""Lines about what went wrong where nothing can be raised: beside the loop, behind it, at exit."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import holdfast
from holdfast.errors import RunClosed, StoreFull
from holdfast.stores.memory import MemoryStore
from tests.support.jobs import Killed, fresh_address, process


class FullDisk(MemoryStore):
    """Without space for what begins with `full`."""

    full = "nothing"

    def put_new(self, key: str, parts: Any) -> bool:
        if key.startswith(self.full):
            raise StoreFull("no space left")
        return super().put_new(key, parts)


def run_on(store: FullDisk, **options: Any) -> holdfast.Run:
    return holdfast.Run(fresh_address(), store=store, quiet=True, **options)


def test_metrics_that_cannot_be_added_are_said_and_training_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = FullDisk()
    run = run_on(store, every="epoch", keep=None)
    for epoch in run.epochs(3):
        run.manager.wait()
        if epoch == 1:
            store.full = "log/"
            run.log(val_loss=0.5)  # joins the checkpoint of the epoch before
        list(run.range(2))
        store.full = "nothing"
    assert f"could not add metrics to {run.address}@2: entry 3 of" in caplog.text
    assert "could not be written: no space left" in caplog.text
    assert run.finished
    run.close()


def test_a_finished_run_that_cannot_be_tidied_up_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    store = FullDisk()
    list(run_on(store, every=1, keep=None).track(x=[1]).range(4))
    store.full = "log/"
    run = holdfast.Run("memory://again", store=store, on_finish="final", quiet=True)
    assert list(run.track(x=[0]).range(4)) == []
    err = capfd.readouterr().err
    assert "memory://again: could not tidy up: entry 6 of memory:// could not be written" in err
    assert "no space left\nHint: It is not reported as saved; the next save settles it." in err


def test_a_program_that_ends_before_the_place_of_its_checkpoint_is_told(
    capfd: pytest.CaptureFixture[str],
) -> None:
    address = fresh_address()
    with process():
        run = holdfast.Run(address, every=1, quiet=True)
        for _ in run.epochs(2):
            for _ in run.range(3):
                if run.step == 2:
                    raise Killed
    with holdfast.Run(address, quiet=True) as run:
        next(run.epochs(2))  # the prologue ends the program
    line = (
        f"{address}: the program ended before it came to the place of the checkpoint; "
        "nothing was saved"
    )
    assert line in capfd.readouterr().err.splitlines()
    with holdfast.CheckpointManager(address) as manager:
        assert [info.step for info in manager.checkpoints()] == [1, 2]


def test_an_older_run_that_cannot_be_closed_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    store = FullDisk()
    address = fresh_address()
    older = holdfast.Run(address, store=store, every=1, quiet=True).track(x=[1])
    loop = older.range(3)
    next(loop)
    store.full = "manifests/"
    next(loop)
    older.manager.wait()
    holdfast.Run(address, store=store)
    err = capfd.readouterr().err
    assert f"{address}: closing the Run that this process opened before" in err
    assert f"{address}: the last save of {address} failed: no space left" in err
    assert "Hint: Earlier checkpoints are whole." in err


AT_EXIT = """
import holdfast
from tests.run.test_lines import FullDisk

store = FullDisk()
run = holdfast.Run("memory://x", store=store, every=1, quiet=True).track(x=[1])
for index in run.range(3):
    run.manager.wait()
    if index == 1:
        store.full = "manifests/"
    if index == 2:
        break
"""


def test_a_save_that_failed_is_said_when_python_exits() -> None:
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    lines = done.stderr.splitlines()
    assert "the save of step 2 failed: no space left" in lines
    at = lines.index("memory://x: the last save of memory://x failed: no space left")
    assert lines[at + 1].startswith("Hint: Earlier checkpoints are whole.")


def in_child(address: str, results: Any) -> None:
    for use in (lambda run: run.save(), lambda run: run.manager.save(1, {})):
        try:
            use(_parents[0])
        except RunClosed as error:
            results.put((error.message, error.hint))


_parents: list[holdfast.Run] = []


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_is_told_that_the_run_is_not_its_own() -> None:
    run = holdfast.Run(fresh_address(), quiet=True)
    _parents[:] = [run]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=in_child, args=(run.address, results))
    child.start()
    told = [results.get(timeout=60) for _ in range(2)]
    child.join()
    assert told == [
        (
            f"the run at {run.address} belongs to process {os.getpid()}, not to this child",
            "Use it in the process that made it.",
        ),
        (
            f"{run.address} was opened by process {os.getpid()}, not by this forked child",
            "Open it again in the child; only one process may write.",
        ),
    ]
    assert list(run.range(2)) == [0, 1]
