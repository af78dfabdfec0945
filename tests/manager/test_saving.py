"""Packs that are written block by block: every size, every fault, every place to die."""

from __future__ import annotations

import errno
import gc
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import holdfast
from holdfast.errors import HoldfastError, SaveFailed, StoreFull, UsageError
from holdfast.manager import packer, snapshot, staging
from holdfast.repo import log
from holdfast.repo.repo import Repo
from holdfast.repo.writer import Writer
from holdfast.stores.base import Store
from holdfast.stores.faulty import Died, Effect, Fault, FaultPlan, FaultyStore
from holdfast.stores.local import LocalStore
from holdfast.stores.memory import MemoryStore
from tests.kill.driver import wait_until
from tests.support.crashfs import CrashFileSystem
from tests.support.exhaustive import EXHAUSTIVE

BLOCK = 8192
MEMORY = 5 * BLOCK


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(staging, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(packer, "OWN_PACK_BYTES", 2 * BLOCK)
    monkeypatch.setattr(snapshot, "SMALL_BYTES", BLOCK // 2)
    monkeypatch.setattr(log, "_CREATE_BACKOFF_S", 0.0)
    yield
    assert not [t for t in threading.enumerate() if t.name == "holdfast-write"], "a thread is left"


class Whole(MemoryStore):
    """Takes packs whole, as object stores do."""

    @property
    def whole_bytes(self) -> int:
        return 3 * BLOCK


def manager(store: Store, **options: Any) -> holdfast.CheckpointManager:
    return holdfast.CheckpointManager(
        store.address, store=store, memory=MEMORY, **{"keep": None, **options}
    )


def state(seed: int, *, frozen: int = 0, top: int = 255) -> dict[str, Any]:
    """Six blocks that are another with each seed, and some that stay the same. A smaller
    `top` makes them compressible."""
    return {
        "trained": np.random.default_rng(seed).integers(0, top, 6 * BLOCK + 100, np.uint8),
        "small": {str(n): np.full(50, seed * n) for n in range(20)},
        "frozen": np.random.default_rng(99).integers(0, top, frozen, np.uint8),
    }


def equal(found: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        return all(equal(found[key], value) for key, value in expected.items())
    return np.array_equal(found, expected)


def blocks_are_back(ckpts: holdfast.CheckpointManager) -> bool:
    return len(ckpts._staging._free) * BLOCK == ckpts._staging.nbytes <= MEMORY


# -- sizes --------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(
        st.one_of(
            st.integers(0, 300),
            st.integers(-2, 2).map(lambda n: BLOCK + n),
            st.integers(BLOCK, 5 * BLOCK),
        ),
        max_size=12,
    ),
    pack=st.sampled_from([BLOCK // 2, 3 * BLOCK, 100 * BLOCK]),
    block=st.booleans(),
    changes=st.lists(st.sets(st.integers(0, 11)), max_size=3),
    kind=st.sampled_from([MemoryStore, Whole]),
)
def test_any_sizes_come_back(
    sizes: list[int], pack: int, block: bool, changes: list[set[int]], kind: type[MemoryStore]
) -> None:
    names = [f"leaf{n}" for n in range(len(sizes))]
    rng = np.random.default_rng(len(sizes))
    values = {
        name: rng.integers(0, 255, size, np.uint8) for name, size in zip(names, sizes, strict=True)
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packer, "PACK_BYTES", pack)
        with manager(kind("sizes")) as ckpts:
            for step, changed in enumerate([set(), *changes]):
                for n in changed & set(range(len(sizes))):
                    values[names[n]] = rng.integers(0, 255, sizes[n], np.uint8)
                ckpts.save(step, values, block=block).result()
                assert all(result.ok for result in ckpts.verify())
                loaded = ckpts.load(step)
                assert all(np.array_equal(loaded[name], values[name]) for name in names)
                assert blocks_are_back(ckpts)


def test_memory_is_bounded_while_the_store_is_slow() -> None:
    class Slow(MemoryStore):
        def create(self, key: str, *, at_most_bytes: int) -> Any:
            assert gate.wait(60)
            return super().create(key, at_most_bytes=at_most_bytes)

    gate = threading.Event()
    with manager(Slow("slow")) as ckpts:
        pending = ckpts.save(1, {"x": np.zeros(100 * BLOCK, np.uint8)})
        gate.set()
        pending.result()
        assert ckpts._staging.nbytes == MEMORY
        assert blocks_are_back(ckpts)


def test_too_little_memory_is_refused() -> None:
    with pytest.raises(UsageError, match="memory of 32,768 bytes is too little") as caught:
        holdfast.CheckpointManager("memory://little", memory=4 * BLOCK)
    assert "at least" in caught.value.hint


def test_a_pack_of_blocks_opens_with_safetensors(tmp_path: Any) -> None:
    from safetensors.numpy import load_file

    with manager(LocalStore(tmp_path)) as ckpts:
        ckpts.save(1, state(1), block=True)
    [pack] = tmp_path.glob("packs/*")
    pieces = {
        int(name.partition("[")[2].partition(":")[0]): data
        for name, data in load_file(pack).items()
        if name.startswith("trained")
    }
    trained = np.concatenate([pieces[start] for start in sorted(pieces)])
    assert np.array_equal(trained, state(1)["trained"])


# -- faults -------------------------------------------------------------------------------


COMPRESS = [None, "zstd"]


def story_state(step: int, compress: str | None) -> dict[str, Any]:
    return state(step, frozen=3 * BLOCK, top=16 if compress else 255)


def two_saves(store: Store, compress: str | None) -> None:
    """The second moves a part out of the first one's pack, if that is large."""
    # Not `with`: a process that died closes nothing.
    ckpts = manager(store, keep="last=1", compress=compress)
    ckpts.save(1, story_state(1, compress), block=True)
    ckpts.save(2, story_state(2, compress), block=True)
    ckpts.close()


def check(store: Store, compress: str | None) -> list[int]:
    """Steps of the checkpoints that are there; each is whole."""
    with holdfast.CheckpointManager(store.address, store=store, keep=None) as ckpts:
        steps = [info.step for info in ckpts.checkpoints()]
        assert all(result.ok for result in ckpts.verify())
        for step in steps:
            assert equal(ckpts.load(step), story_state(step, compress))
    return steps


@pytest.fixture(params=[MemoryStore, Whole], ids=["blocks", "whole"])
def kind(request: pytest.FixtureRequest) -> type[MemoryStore]:
    """Of the store below the faults."""
    return request.param


def count_calls(compress: str | None, kind: type[MemoryStore]) -> int:
    store = FaultyStore(kind("every-call"))
    two_saves(store, compress)
    operations = {call.operation for call in store.calls}
    if kind is Whole:
        assert not {"create", "write", "publish"} & operations
    else:
        assert {"create", "write", "publish", "read_into"} <= operations
    [(record, manifest)] = manifests(store)
    codecs = [chunk.codec for leaf in manifest.leaves for chunk in leaf.chunks]
    assert any(codecs) == bool(compress)
    moved = record.new_bytes == sum(pack.nbytes for pack in manifest.packs)
    assert moved or kind is Whole, "small packs are needed as they are"
    return len(store.calls)


def numbers(compress: str | None, kind: type[MemoryStore], *, first: int = 1) -> range:
    """Of the calls that fail: of one after the other with and without compression; in
    `make exhaustive`, all with both."""
    last = count_calls(compress, kind)
    if EXHAUSTIVE:
        return range(first, last + 1)
    return range(first + (compress is None), last + 1, 2)


def manifests(store: Store) -> list[tuple[Any, Any]]:
    repo = Repo(store)
    return [(record, repo.manifest(record)) for record in repo.records()]


@pytest.fixture
def dead_writers_count_as_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The "processes" that die here are this one."""
    open_ = Writer.open.__func__  # type: ignore[attr-defined]

    def opening(cls: Any, repo: Any, **options: Any) -> Writer:
        return open_(cls, repo, **{**options, "take_over": True})

    monkeypatch.setattr(Writer, "open", classmethod(opening))


@pytest.mark.usefixtures("dead_writers_count_as_dead")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("compress", COMPRESS)
@pytest.mark.parametrize("effect", [Effect.DIE_BEFORE, Effect.DIE_AFTER])
def test_dying_at_any_call_leaves_whole_checkpoints(
    effect: Effect, compress: str | None, kind: type[MemoryStore]
) -> None:
    for number in numbers(compress, kind):
        store = FaultyStore(kind("die"), FaultPlan.at(number, effect))
        with suppress(Died, HoldfastError):
            two_saves(store, compress)
        assert check(store.survivor(), compress) in ([], [1], [2]), (
            f"call {number}: {store.calls[-1]}"
        )


@pytest.mark.usefixtures("dead_writers_count_as_dead")
@pytest.mark.parametrize("compress", COMPRESS)
@pytest.mark.parametrize("effect", [Effect.FAIL, Effect.LOSE_REPLY, Effect.DELAY])
def test_a_failing_call_never_halves_anything(
    effect: Effect, compress: str | None, kind: type[MemoryStore]
) -> None:
    for number in numbers(compress, kind):
        store = FaultyStore(kind("fail"), FaultPlan.at(number, effect))
        done = False
        with suppress(HoldfastError):
            two_saves(store, compress)
            done = True
        where = f"call {number}: {store.calls[min(number, len(store.calls)) - 1]}"
        found = check(store.survivor(), compress)
        assert found == [2] if done else found in ([], [1], [2]), where
        store.release()
        assert check(store.survivor(), compress) in ([], [1], [2]), where


@pytest.mark.parametrize("compress", COMPRESS)
def test_a_manager_goes_on_after_any_failing_call(
    compress: str | None, kind: type[MemoryStore]
) -> None:
    for number in numbers(compress, kind, first=8):
        fault = Fault(Effect.FAIL, call=number, error=StoreFull)
        store = FaultyStore(kind("goes-on"), FaultPlan((fault,)))
        options = {"max_save_failures": 10, "compress": compress}
        with suppress(HoldfastError), manager(store, **options) as ckpts:
            for step in range(1, 8):
                with suppress(HoldfastError):
                    ckpts.save(step, story_state(step, compress), block=True)
                assert blocks_are_back(ckpts)
            assert [info.step for info in ckpts.checkpoints()][-1] == 7
        check(store.survivor(), compress)


def test_a_full_disk_in_mid_pack_leaves_no_file(tmp_path: Any) -> None:
    fs = CrashFileSystem()
    store = LocalStore("/runs/x", fs)
    ckpts = manager(store)
    ckpts.save(1, state(1), block=True)
    ckpts.wait()  # until it is in the history, which is a file
    before = {path for path in fs.files() if not path.endswith("/")}
    fs.before = lambda number, name: (
        fs.fail_at.update({number: errno.ENOSPC}) if name == "write" else None
    )
    with pytest.raises(StoreFull, match="No space left on device"):
        ckpts.save(2, state(2), block=True)
    fs.before, fs.fail_at = None, {}
    assert {path for path in fs.files() if not path.endswith("/")} == before
    ckpts.save(3, state(3), block=True)
    ckpts.close()
    assert fs.open_descriptors == 0


@pytest.mark.parametrize("compress", COMPRESS)
def test_a_save_survives_a_loss_of_power_when_it_is_reported(compress: str | None) -> None:
    fs = CrashFileSystem()
    ckpts = manager(LocalStore("/runs/x", fs), compress=compress)
    ckpts.save(1, story_state(1, compress), block=True)
    for disk in fs.crash_states(limit=20):
        with manager(LocalStore("/runs/x", disk)) as found:
            assert [info.step for info in found.checkpoints()] == [1]
            assert all(result.ok for result in found.verify())
            assert equal(found.load(1), story_state(1, compress))
    ckpts.close()


@pytest.mark.parametrize("compress", COMPRESS)
def test_what_moves_is_verified_and_its_pack_distrusted(compress: str | None) -> None:
    """A stored chunk of a leaf that is read in place is to be written again, and is damaged:
    that save fails, the next one writes the bytes anew."""
    reads = Fault(Effect.DAMAGE, operation="read_into", prefix="packs/")
    store = FaultyStore(MemoryStore("moves"), FaultPlan((reads,)))
    ckpts = manager(store, compress=compress)
    ckpts.save(1, story_state(1, compress), block=True)
    with pytest.raises(HoldfastError, match=r"'frozen'.* is damaged"):
        ckpts.save(2, story_state(2, compress), block=True)
    info = ckpts.save(3, story_state(3, compress), block=True).result()
    _, (_, manifest) = manifests(store)
    assert info.new_bytes == sum(pack.nbytes for pack in manifest.packs), "everything was written"
    assert equal(ckpts.load(3), story_state(3, compress))
    ckpts.close()


# -- the loop's side ----------------------------------------------------------------------


def test_ctrl_c_in_a_blocking_save_copies_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller may catch it and go on to change the arrays that are being saved."""
    store = MemoryStore("ctrl-c")
    ckpts = manager(store)
    ckpts.acquire()
    gate = threading.Event()
    put = MemoryStore.create

    def create(self: MemoryStore, key: str, *, at_most_bytes: int) -> Any:
        assert gate.wait(60)
        return put(self, key, at_most_bytes=at_most_bytes)

    monkeypatch.setattr(MemoryStore, "create", create)
    monkeypatch.setattr(
        "holdfast.manager.pending.Pending.result",
        lambda self: (_ for _ in ()).throw(KeyboardInterrupt),
    )
    x = np.arange(100 * BLOCK, dtype=np.uint8)
    expected = x.copy()
    with pytest.raises(KeyboardInterrupt):
        ckpts.save(1, {"x": x}, block=True)
    x[:] = 0
    gate.set()
    ckpts.wait()
    assert np.array_equal(ckpts.load(1)["x"], expected)
    ckpts.close()


def test_the_base_vanishes_while_a_blocking_save_builds_on_it() -> None:
    store = FaultyStore(MemoryStore("base"), on_call=lambda call: hook(call))
    armed: list[bool] = []

    def hook(call: Any) -> None:
        if armed and call.operation == "put_new" and call.key.startswith("manifests/"):
            armed.clear()
            with holdfast.CheckpointManager("x", store=store.survivor(), keep=None) as other:
                other.remove([1], force=True)

    ckpts = manager(store)
    frozen = {"x": np.random.default_rng(1).integers(0, 255, 20 * BLOCK, np.uint8)}
    ckpts.save(1, frozen, block=True)
    armed.append(True)
    info = ckpts.save(2, frozen, block=True).result()
    assert info.new_bytes >= 20 * BLOCK
    assert np.array_equal(ckpts.load(2)["x"], frozen["x"])
    ckpts.close()


def test_nothing_is_read_in_place_unless_the_caller_allows_it() -> None:
    with manager(MemoryStore("copied")) as ckpts:
        x = np.frombuffer(os.urandom(50 * BLOCK), np.uint8).copy()
        for step in range(5):
            expected = x.copy()
            pending = ckpts.save(step, {"x": x})
            x[:] += 1
            pending.result()
            assert np.array_equal(ckpts.load(step)["x"], expected)


def test_errors_of_writes_surface_in_the_result() -> None:
    fault = Fault(Effect.FAIL, operation="write", nth=3, error=StoreFull)
    with suppress(SaveFailed), manager(FaultyStore(MemoryStore("e"), FaultPlan((fault,)))) as ckpts:
        with pytest.raises(StoreFull, match="injected"):
            ckpts.save(1, state(1)).result()
        assert blocks_are_back(ckpts)
        ckpts.save(2, state(2)).result()


@pytest.mark.parametrize("in_place", [None, lambda source, path: True], ids=["copied", "in place"])
def test_what_was_saved_is_let_go_of(in_place: Any) -> None:
    """State that was made for the save only, as by a `state_dict`, is not held up to the next."""
    with holdfast.CheckpointManager("memory://let-go") as ckpts:
        array = np.ones(100_000)
        alive = weakref.ref(array)
        ckpts.save(1, {"array": array}, in_place=in_place).result()
        del array
        ckpts.wait()
        wait_until(lambda: gc.collect() >= 0 and alive() is None)
