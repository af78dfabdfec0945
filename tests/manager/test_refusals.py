"""What the manager says when it refuses something or goes on in spite of it: what happened,
where, and a way out."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdfast.errors import (
    CheckpointNotFound,
    FormatTooNew,
    HoldfastError,
    PickleRefused,
    RunClosed,
    SaveFailed,
    StoreFull,
    StoreUnavailable,
    UsageError,
)
from holdfast.manager import CheckpointManager
from holdfast.stores.memory import MemoryStore
from tests.manager.test_hostile import forge, make_run, set_in
from tests.support.jobs import fresh_address
from tests.support.refusals import Refusal


class Failing(MemoryStore):
    """Fails to write what begins with `full`, and to delete while `stuck`."""

    full = "nothing"
    error: Exception = StoreFull("no space left", hint="Make room.")
    stuck = False

    def put_new(self, key: str, parts: Any) -> bool:
        if key.startswith(self.full):
            raise self.error
        return super().put_new(key, parts)

    def delete(self, keys: Any) -> None:
        if self.stuck:
            raise StoreUnavailable("the store does not answer")
        super().delete(keys)


class Pickled:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.path.join, ("a", "b")


def saved(**options: Any) -> CheckpointManager:
    manager = CheckpointManager(fresh_address(), **options)
    manager.save(3, {"x": [1]}, metrics={"loss": 1}, block=True)
    return manager


def closed() -> CheckpointManager:
    manager = saved()
    manager.close()
    return manager


def pickled() -> CheckpointManager:
    with CheckpointManager(address := fresh_address(), allow_pickle=True) as manager:
        manager.save(3, {"x": Pickled()}, block=True)
    return CheckpointManager(address)


def failing(times: int, **options: Any) -> CheckpointManager:
    store = Failing()
    manager = CheckpointManager(fresh_address(), store=store, **options)
    manager.acquire()
    store.full = "packs/"
    for step in range(times):
        manager.save(step, {"x": np.random.default_rng(step).random(100)})
        manager.wait()
    return manager


CASES: dict[str, tuple[Callable[[], Any], type[HoldfastError], str, str]] = {
    "step": (
        lambda: saved().save(-1, {}),
        UsageError,
        "step must be a whole number of completed steps, not -1",
        "Count from 0: manager.save(step=0, state).",
    ),
    "rewrite_every": (
        lambda: saved(rewrite_every=0),
        UsageError,
        "rewrite_every must be at least 1, not 0",
        "Give a number of saves, or leave it out.",
    ),
    "metric": (
        lambda: saved().log_metrics(3, {"loss": "high"}),  # type: ignore[dict-item]
        UsageError,
        "metric 'loss' is not a number: 'high'",
        "keep other values in the state",
    ),
    "reason of a pin": (
        lambda: saved().pin(3, "fork:mine"),
        UsageError,
        "a reason cannot start like a forked run's pin: 'fork:mine'",
        "Word it otherwise.",
    ),
    "tag that nobody has": (
        lambda: saved().untag("paper"),
        CheckpointNotFound,
        "has the tag 'paper'",
        "There are steps 3; metrics loss.",
    ),
    "closed": (
        lambda: closed().save(4, {}),
        RunClosed,
        "the manager of memory://",
        "Open it again",
    ),
    "pickled values": (
        lambda: pickled().restore(),
        PickleRefused,
        "@3 holds pickled values, which run code when they are loaded",
        "If you trust whoever wrote it, pass allow_pickle=True.",
    ),
    "pickled values that are loaded": (
        lambda: pickled().load()["x"],
        PickleRefused,
        "@3 holds pickled values, which run code when they are loaded",
        "If you trust whoever wrote it, pass allow_pickle=True.",
    ),
    "saves that fail": (
        lambda: failing(2, max_save_failures=2).save(9, {}),
        SaveFailed,
        "in a row have failed; the last: no space left",
        "Make room. Earlier checkpoints are whole. Mend the cause and start again.",
    ),
    "the last save failed": (
        lambda: failing(1).close(),
        SaveFailed,
        "failed: no space left",
        "Make room. Earlier checkpoints are whole. Mend the cause and start again.",
    ),
    "no folder": (
        lambda: saved().export(3, __file__),
        UsageError,
        "test_refusals.py is not a folder",
        "Name a new folder.",
    ),
    "a folder with something in it": (
        lambda: saved().export(3, Path(__file__).parent),
        UsageError,
        "is not empty",
        "Name a new folder, or replace what has the same name (replace=True; --force",
    ),
    "no file": (
        lambda: saved().export_tensors(3, Path(__file__).parent),
        UsageError,
        "is not a file",
        "Name a new file.",
    ),
    "a file that exists": (
        lambda: saved().export_tensors(3, __file__),
        UsageError,
        "test_refusals.py exists",
        "Name a new file, or replace it (replace=True; --force on the command line).",
    ),
}


@pytest.mark.parametrize("refusal", CASES.values(), ids=CASES)
def test_what_a_refusal_says(refusal: tuple[Any, ...]) -> None:
    Refusal(*refusal).check()


def test_pickled_values_come_as_the_hint_says() -> None:
    assert pickled().load(allow_pickle=True)["x"] == "a/b"


def test_a_format_of_the_future_is_named(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    forge(tmp_path / "run", set_in("format", 2))
    with CheckpointManager(tmp_path / "run") as manager, pytest.raises(FormatTooNew) as caught:
        manager.restore()
    assert ".json has format 2; this Holdfast reads up to 1" in caught.value.message
    assert caught.value.message.startswith("manifests/")
    assert caught.value.hint == "Upgrade: pip install -U holdfast"


def test_a_save_that_is_not_done_yet_can_be_waited_for_again() -> None:
    go_on = threading.Event()

    class Slow(MemoryStore):
        def put_new(self, key: str, parts: Any) -> bool:
            assert not key.startswith("packs/") or go_on.wait(60)
            return super().put_new(key, parts)

    with CheckpointManager(fresh_address(), store=Slow()) as manager:
        pending = manager.save(7, {"x": np.ones(100)})
        with pytest.raises(SaveFailed) as caught:
            pending.result(0.01)
        assert caught.value.message == "the save of step 7 is not done after 0.01 s"
        assert caught.value.hint == "It goes on; call result() again to wait longer."
        go_on.set()
        assert pending.result(60).step == 7


def test_an_error_of_a_store_that_is_none_of_ours_is_quoted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = Failing()
    manager = CheckpointManager(fresh_address(), store=store)
    manager.acquire()
    store.full, store.error = "packs/", ZeroDivisionError("a bug")
    with pytest.raises(SaveFailed) as caught:
        manager.save(7, {"x": np.ones(100)}, block=True)
    assert caught.value.message == "the save of step 7 failed: ZeroDivisionError('a bug')"
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "the save of step 7 failed: ZeroDivisionError('a bug')" in caplog.text
    with pytest.raises(SaveFailed, match="the last save of"):
        manager.close()


def test_leftovers_that_cannot_be_removed_are_said(caplog: pytest.LogCaptureFixture) -> None:
    store = Failing()
    with CheckpointManager(fresh_address(), store=store) as manager:
        manager.acquire()
        store.full = "log/"
        manager.save(1, {"x": np.ones(100)})
        with pytest.raises(SaveFailed):
            manager.close()
    store.full, store.stuck = "nothing", True
    caplog.clear()
    with CheckpointManager("memory://again", store=store) as manager:
        manager.acquire()
    assert [record.getMessage() for record in caplog.records] == [
        "could not remove leftovers: the store does not answer"
    ]


def test_a_pack_of_another_size_is_named_with_both(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    [pack] = (tmp_path / "run" / "packs").iterdir()
    size = pack.stat().st_size
    pack.chmod(0o644)
    pack.write_bytes(pack.read_bytes()[:-1])
    with CheckpointManager(tmp_path / "run") as manager:
        [found] = manager.verify()
    assert found.problems == (f"packs/{pack.name} is damaged: it has {size - 1} bytes, not {size}",)


def test_what_is_left_as_it_is_is_said(caplog: pytest.LogCaptureFixture) -> None:
    live = {"a": np.zeros(2), "new": np.zeros(1)}
    with CheckpointManager(fresh_address()) as manager:
        manager.save(1, {"a": np.ones(2), "old": np.ones(1)}, block=True)
        manager.restore(live, strict=False)
    assert [record.getMessage() for record in caplog.records] == [
        "restored in part:\n"
        "  missing in the checkpoint (1):\n"
        "    new\n"
        "  unexpected in the checkpoint (1):\n"
        "    old"
    ]
    assert live["a"].tolist() == [1, 1]
