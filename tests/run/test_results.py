"""`run.once` and `run.map`, in this process."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.errors import DamagedObject, RunClosed, UnsupportedValue, UsageError
from holdfast.manager.results import Results
from holdfast.repo import keys
from holdfast.repo.repo import Repo
from holdfast.stores.base import Store
from holdfast.stores.faulty import Died, Effect, Fault, FaultPlan, FaultyStore
from holdfast.stores.local import LocalStore
from holdfast.stores.memory import MemoryStore
from tests.core.exactness import assert_exact

ADDRESS = "memory://results"


class Calls:
    """A function that says what it was called with."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def function(self) -> Callable[[int], Any]:
        seen = self.seen

        def prepare(n: int) -> Any:
            seen.append(n)
            return {"n": n, "squares": np.arange(n) ** 2}

        return prepare


def opened(store: Store, **options: Any) -> holdfast.Run:
    return holdfast.Run(ADDRESS, store=store, every=None, **{"quiet": True, **options})


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore("results")


def test_a_result_is_there_after_a_restart(store: MemoryStore) -> None:
    calls = Calls()
    got = []
    for _ in range(2):
        run = opened(store)
        prepare = run.once(version=1)(calls.function())
        got += [prepare(3), prepare(n=3)]
        run.close()
    assert calls.seen == [3]
    for value in got:
        assert_exact(value, {"n": 3, "squares": np.arange(3) ** 2}, "result")
    got[0]["squares"][0] = 7  # nobody else has it
    assert opened(store).once(version=1)(calls.function())(3)["squares"][0] == 0


def test_the_first_call_gives_what_a_later_one_will(store: MemoryStore) -> None:
    shared, base = [1], np.arange(9.0)
    made = {"twice": [shared, shared], "views": (base[:5], base[3:]), "f": np.float32(0.1)}

    def prepare() -> Any:
        return made

    first = opened(store).once(version=1)(prepare)()
    later = opened(store).once(version=1)(prepare)()
    assert first is not made
    for value in (first, later):
        assert_exact(value, made, "result")
        assert value["twice"][0] is value["twice"][1]
        assert np.shares_memory(*value["views"])


def test_changed_code_is_computed_again_and_said(
    store: MemoryStore, capsys: pytest.CaptureFixture[str]
) -> None:
    def made(by: int) -> Callable[[int], int]:
        def prepare(n: int) -> int:
            return n * by

        return prepare

    run = opened(store, quiet=False)
    assert run.once(made(2))(3) == 6
    assert "changed" not in capsys.readouterr().err
    run = opened(store, quiet=False)
    assert run.once(made(5))(3) == 15
    assert run.once(made(5))(4) == 20
    assert capsys.readouterr().err.count("code has changed") == 1
    assert run.once(made(2))(3) == 6, "the older one is still there"


def test_what_took_long_is_said_to_be_used(
    store: MemoryStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count(0.0, 60.0)
    monkeypatch.setattr("holdfast.run.results.time.perf_counter", lambda: next(ticks))
    run = opened(store, quiet=False)
    prepare = run.once(Calls().function(), version=1)
    prepare(1)
    prepare(1)
    prepare(1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "prepare: stored result used (now, computed in 1 min)" in lines[0]


def test_an_exception_is_not_stored(store: MemoryStore) -> None:
    fails = [True]

    def prepare() -> int:
        if fails.pop():
            raise ValueError("not yet")
        return 1

    fails.insert(0, False)
    run = opened(store)
    once = run.once(version=1)(prepare)
    with pytest.raises(ValueError, match="not yet"):
        once()
    assert once() == 1


def test_what_cannot_be_stored_is_an_error_that_names_it(store: MemoryStore) -> None:
    run = opened(store)
    with pytest.raises(UnsupportedValue, match="result/model") as error:
        run.once(version=1)(lambda: {"model": object()})()
    assert error.value.hint
    with pytest.raises(UsageError, match="version"):
        run.once(version=1.5)(lambda: 1)  # type: ignore[arg-type]


def test_random_numbers_go_on_as_if_nothing_was_drawn(store: MemoryStore) -> None:
    def draw() -> float:
        return random.random() + np.random.rand()

    following = []
    for _ in range(2):
        random.seed(3)
        np.random.seed(3)
        run = opened(store)
        run.once(version=1)(draw)()
        list(run.map(lambda n: draw() + n, range(2), version=1))
        following.append((random.random(), np.random.rand()))
    assert following[0] == following[1]


def test_a_method_and_a_key(store: MemoryStore) -> None:
    class Reader:
        """Nothing that a result could be found by."""

        def __init__(self) -> None:
            self.read: list[str] = []

        def lines(self, name: str) -> int:
            self.read.append(name)
            return len(self.read)

    run, reader = opened(store), Reader()
    with pytest.raises(UnsupportedValue, match="'self'"):
        run.once(reader.lines)("a")
    lines = run.once(reader.lines, key=lambda name: name)
    assert [lines("a"), lines("b"), lines("a")] == [1, 2, 1]


def test_a_closed_run_says_so(store: MemoryStore) -> None:
    run = opened(store)
    once = run.once(version=1)(lambda: 1)
    mapped = run.map(abs, range(10))
    assert next(mapped) == 0
    run.close()
    with pytest.raises(RunClosed):
        once()
    with pytest.raises(RunClosed):
        list(mapped)


def test_two_at_the_same_time_give_the_same_result(store: MemoryStore) -> None:
    meet = threading.Barrier(2)
    run = opened(store)
    runs = [Results.of(run.manager), Results.of(run.manager)]
    from holdfast.core.calls import call_of, rule_for

    call = call_of(rule_for(abs, 1, None, ()), (1,), {})

    def compute(number: int) -> Any:
        meet.wait(60)
        return runs[number].keep(call, {"by": number})

    with ThreadPoolExecutor(2) as pool:
        values = list(pool.map(compute, range(2)))
    assert values[0] == values[1]
    assert run.manager.stored_results().count == 1


# -- damage and lost replies ---------------------------------------------------------------


def key_in(store: Store) -> str:
    return next(iter(store.list(keys.RESULTS))).key


def spoil(store: Store) -> None:
    key = key_in(store)
    data = bytearray(store.get(key, max_bytes=1 << 30))
    data[-1] ^= 1
    store.delete([key])
    store.put_new(key, [data])


def test_a_damaged_result_is_computed_again_loudly(
    store: MemoryStore, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = Calls()
    run = opened(store)
    prepare = run.once(version=1)(calls.function())
    prepare(3)
    spoil(store)
    assert Results.of(run.manager).verify()
    assert_exact(prepare(3), {"n": 3, "squares": np.arange(3) ** 2}, "result")
    assert "is damaged and is computed again" in capsys.readouterr().err
    assert Results.of(run.manager).verify() == []
    spoil(store)
    for executor in (None, ThreadPoolExecutor(1)):
        assert [v["n"] for v in run.map(prepare, [3], executor=executor)] == [3]
    assert calls.seen == [3, 3, 3]


def compute(store: Store, seen: list[int]) -> list[int]:
    def double(n: int) -> int:
        seen.append(n)
        return 2 * n

    run = opened(store)
    try:
        once = run.once(version=1)(double)
        return [once(7), *run.map(double, range(4), version=1)]
    finally:
        run._closed = True  # the process is gone: nobody closes it


@pytest.mark.parametrize("effect", [Effect.DIE_BEFORE, Effect.DIE_AFTER, Effect.LOSE_REPLY])
def test_after_a_stop_at_any_call_only_what_is_missing_is_computed(effect: Effect) -> None:
    whole: list[int] = []
    expected = compute(MemoryStore("whole"), whole)
    for number in itertools.count(1):
        inner = MemoryStore("stopped")
        seen: list[int] = []
        faulty = FaultyStore(inner, FaultPlan.at(number, effect))
        ended = False
        with suppress(Died, holdfast.HoldfastError):
            assert compute(faulty, seen) == expected
            ended = True
        stored = len(list(inner.list(keys.RESULTS)))
        again: list[int] = []
        assert compute(inner, again) == expected
        assert len(again) == len(whole) - stored
        if ended and len(faulty.calls) < number:
            break
    assert number > 10


@pytest.mark.parametrize("effect", [Effect.DAMAGE, Effect.SPOIL])
def test_spoiled_bytes_are_never_used(effect: Effect) -> None:
    expected = compute(MemoryStore("whole"), [])
    for nth in range(1, 9):
        inner = MemoryStore("spoiled")
        store = FaultyStore(inner, FaultPlan((Fault(effect, prefix=keys.RESULTS, nth=nth),)))
        assert compute(store, []) == expected
        assert compute(store, []) == expected
        assert Results(Repo(inner)).verify() == []


def test_a_store_that_spoils_everything_is_an_error() -> None:
    class Spoiling(MemoryStore):
        def put_new(self, key: str, parts: Any) -> bool:
            whole = bytearray(b"".join(parts))
            if key.startswith(keys.RESULTS):
                whole[-1] ^= 1
            return super().put_new(key, [whole])

    with pytest.raises(DamagedObject):
        opened(Spoiling("x")).once(version=1)(lambda: np.arange(3))()


# -- map ------------------------------------------------------------------------------------


class OnlySubmit:
    """An executor that has nothing but `submit`: a thread for each item."""

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(fn(*args))
            except Exception as error:
                future.set_exception(error)

        threading.Thread(target=run).start()
        return future


@pytest.fixture(params=["none", "threads", "submit"])
def executor(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "threads":
        with ThreadPoolExecutor(3) as pool:
            yield pool
    else:
        yield None if request.param == "none" else OnlySubmit()


def test_results_come_in_the_order_of_the_items(store: MemoryStore, executor: Any) -> None:
    calls = Calls()
    for _ in range(2):
        run = opened(store)
        function = calls.function()
        got = list(run.map(function, iter(range(12)), executor=executor, version=1, max_pending=4))
        assert [value["n"] for value in got] == list(range(12))
    assert sorted(calls.seen) == list(range(12))


def test_only_missing_items_are_computed(
    store: MemoryStore, executor: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = Calls()
    run = opened(store, quiet=False)
    list(run.map(calls.function(), [1, 3], version=1))
    run.once(version=1)(calls.function())(5)  # `once` and `map` find each other's
    calls.seen.clear()
    items = [0, 1, 2, 3, 4, 5, 6, 7]
    got = list(run.map(calls.function(), items, executor=executor, version=1, max_pending=4))
    assert [value["n"] for value in got] == items
    assert sorted(calls.seen) == [0, 2, 4, 6, 7]
    assert "prepare: 8 items (3 were stored)" in capsys.readouterr().err


def test_an_endless_iterable_is_taken_no_further_than_allowed(store: MemoryStore) -> None:
    taken = itertools.count()
    mapped = opened(store).map(abs, taken, executor=OnlySubmit(), max_pending=4)
    assert list(itertools.islice(mapped, 10)) == list(range(10))
    assert next(taken) <= 14
    mapped.close()  # type: ignore[attr-defined]


def test_other_items_are_stored_when_one_fails(store: MemoryStore) -> None:
    started = threading.Event()

    def prepare(n: int) -> int:
        if n == 1:
            started.wait(60)
            raise ValueError("bad item")
        started.set()
        if n == 2:
            time.sleep(0.05)
        return n

    run = opened(store)
    with ThreadPoolExecutor(2) as pool, pytest.raises(ValueError, match="bad item") as error:
        list(run.map(prepare, [1, 2, *range(10, 500)], executor=pool, version=1, max_pending=400))
    assert error.value.__notes__ == ["in run.map(prepare), item 0"]
    stored = run.manager.stored_results().count
    assert 1 <= stored < 400, "what had not begun was cancelled"
    with pytest.raises(ValueError) as error:
        list(run.map(prepare, [2, 1], version=1))
    assert "item 1" in error.value.__notes__[0]


def test_what_runs_when_the_loop_is_left_is_stored_when_it_ends(store: MemoryStore) -> None:
    go = threading.Event()

    def prepare(n: int) -> int:
        if n:
            go.wait(60)
        return n

    run = opened(store)
    with ThreadPoolExecutor(3) as pool:
        for value in run.map(prepare, range(50), executor=pool, version=1):
            assert value == 0
            break
        go.set()
    assert 1 <= run.manager.stored_results().count <= 4


def test_arguments_of_map_are_checked(store: MemoryStore) -> None:
    run = opened(store)
    with pytest.raises(UsageError, match="max_pending"):
        run.map(abs, [1], max_pending=0)
    with pytest.raises(UsageError, match="says itself"):
        run.map(run.once(abs, version=1), [1], version=2)
    with pytest.raises(UnsupportedValue, match="'x'"):
        list(run.map(lambda x: x, [object()], version=1))
    keyed = run.map(lambda x: 5, [object(), object()], version=1, key=lambda x: "all")
    assert list(keyed) == [5, 5]
    assert run.manager.stored_results().count == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_between_two_items(
    store: MemoryStore, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    def prepare(n: int) -> int:
        if n == 3:
            os.kill(os.getpid(), number)
        return n

    before = signal.getsignal(number)
    usual = signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler
    signal.signal(number, usual)
    try:
        run = opened(store, quiet=False, exit_code=76)
        with pytest.raises(SystemExit) as ended:
            list(run.map(prepare, range(8), version=1))
        assert ended.value.code == 76
        assert signal.getsignal(number) == usual
    finally:
        signal.signal(number, before)
    assert 4 <= run.manager.stored_results().count < 8
    assert f"{number.name}: " in capsys.readouterr().err


def test_many_small_items_take_one_listing_and_a_read_each(store: MemoryStore) -> None:
    list(opened(store).map(abs, range(200), version=1))
    faulty = FaultyStore(store, FaultPlan())
    assert sum(opened(faulty).map(abs, range(200), version=1)) == sum(range(200))
    operations = [call.operation for call in faulty.calls]
    assert operations.count("get") == 200
    assert len(operations) == 201


def test_a_run_without_a_loop_is_a_run(tmp_path: Path) -> None:
    with holdfast.Run(tmp_path / "run", quiet=True) as run:
        assert run.once(version=1)(lambda: 3)() == 3
    manager = holdfast.CheckpointManager(tmp_path / "run")
    assert manager.stored_results().count == 1
    with holdfast.Run(tmp_path / "run", quiet=True, every=1) as run:
        for _ in run.range(2):
            pass
    assert [info.step for info in manager.checkpoints()] == [1, 2]
    assert manager.gc() == []
    assert manager.stored_results().count == 1
    manager.close()
    assert LocalStore(tmp_path / "run").remove_debris(thorough=True) == 0


def test_each_result_is_a_sign_of_life(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    beats: list[None] = []
    monkeypatch.setattr("holdfast.manager.heartbeat.alive", lambda: beats.append(None))
    for _ in range(2):
        list(opened(store).map(abs, range(4), version=1))
    assert len(beats) == 8
