"""Runs with `compress="zstd"`: the same state comes back, and less is stored."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import holdfast
from holdfast.core.codecs import ZSTD, load_zstd
from holdfast.core.shuffle_zstd import Encoder
from holdfast.errors import DamagedObject, UsageError
from holdfast.manager import cutting, encoding, packer, reader
from holdfast.manager.comparison import compare
from holdfast.repo.repo import Repo
from holdfast.stores.local import LocalStore
from holdfast.stores.memory import MemoryStore
from tests.manager.compression import (
    BLOCK,
    COMPRESS,
    MEMORY,
    codecs,
    manager,
    manifests,
    noise,
    shrink,
    stored_nbytes,
    weights,
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    shrink(monkeypatch)
    yield
    assert not [t for t in threading.enumerate() if t.name == "holdfast-write"], "a thread is left"


# -- what comes back ----------------------------------------------------------------------

DTYPES = ["u1", "?", "<f2", "<i4", "<f4", "<i8", "<f8", "<c8", "<c16"]


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(
        st.sampled_from([(), (0,), (1,), (700,), (3, 5, 70), (4096,), (40, 1025), (9000,)])
    )
    rng = np.random.default_rng(draw(st.integers(0, 5)))
    top = draw(st.sampled_from([1, 4, 256]))
    size = int(np.prod(shape)) * dtype.itemsize
    data = rng.integers(0, min(top, 2) if dtype.kind == "b" else top, size, np.uint8)
    return np.frombuffer(data.tobytes(), dtype).reshape(shape).copy()


@settings(max_examples=60, deadline=None)
@given(
    saves=st.lists(
        st.tuples(
            st.sampled_from(COMPRESS),
            st.dictionaries(
                st.sampled_from(["a", "b", "a[0:8192]", "a[shuffle-zstd]", "a[0:8192]#"]),
                arrays(),
                max_size=4,
            ),
            st.booleans(),
        ),
        min_size=1,
        max_size=4,
    ),
    pack=st.sampled_from([BLOCK, 3 * BLOCK, 100 * BLOCK]),
    smallest=st.sampled_from([1, 64, 4096]),
    keep=st.sampled_from([None, "last=1"]),
)
def test_any_state_comes_back(
    saves: list[tuple[str | None, dict[str, np.ndarray], bool]],
    pack: int,
    smallest: int,
    keep: str | None,
) -> None:
    store = MemoryStore("any")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packer, "PACK_BYTES", pack)
        patch.setattr(packer, "MIN_ENCODED_BYTES", smallest)
        state: dict[str, np.ndarray] = {}
        for step, (compress, changed, block) in enumerate(saves):
            state = {**state, **changed}
            with manager(store, compress, keep=keep) as ckpts:
                info = ckpts.save(step, state, block=block).result()
                # A value that is there twice is one.
                raw = sum({id(value): value.nbytes for value in state.values()}.values())
                assert raw <= info.nbytes < raw + 10_000
                assert all(result.ok for result in ckpts.verify())
                loaded = ckpts.load(step)
                for name, value in state.items():
                    assert loaded[name].tobytes() == value.tobytes(), name
                assert len(ckpts._staging._free) * BLOCK == ckpts._staging.nbytes <= MEMORY


@pytest.mark.parametrize("keep", [None, "last=1"])
def test_equal_bytes_of_another_type_are_not_the_same_when_compressed(keep: str | None) -> None:
    """How they are shuffled depends on the size of an item."""
    whole = np.random.default_rng(1).integers(0, 4, 3 * BLOCK, np.uint8)
    types = ["u1", "<f2", "<i4", "<f4", "<f8", "u1"]
    store = MemoryStore("types")
    for step, dtype in enumerate(types):
        with manager(store, "zstd", keep=keep) as ckpts:
            ckpts.save(step, {dtype: whole.view(dtype)}, block=True)
            assert all(found.ok for found in ckpts.verify())
            assert ckpts.load()[dtype].tobytes() == whole.tobytes()
            written = ckpts.info().new_bytes
            as_large_as_before = dtype == "<f4"
            assert (written < BLOCK) == as_large_as_before


def test_only_what_gets_smaller_is_compressed() -> None:
    store = MemoryStore("only")
    state = {
        "zeros": np.zeros(9 * BLOCK, np.uint8),
        "weights": weights(4 * BLOCK, 1),
        "noise": noise(5 * BLOCK, 2),
        "nearly noise": np.where(np.arange(5 * BLOCK) % BLOCK < 300, 0, noise(5 * BLOCK, 2)),
        "little": np.zeros(encoding.MIN_ENCODED_BYTES - 1, np.uint8),
    }
    with manager(store) as ckpts:
        info = ckpts.save(1, state, block=True).result()
        ckpts.wait()  # until it is in the history
        [event] = ckpts.events()
    [manifest] = manifests(store)
    assert set(codecs(manifest, "zeros")) == {ZSTD}
    assert set(codecs(manifest, "weights")) == {ZSTD}
    assert set(codecs(manifest, "noise")) == {""}
    assert set(codecs(manifest, "nearly noise")) == {""}
    assert codecs(manifest, "little") == [""]
    assert stored_nbytes(manifest, "zeros") < BLOCK / 10
    assert stored_nbytes(manifest, "weights") < 0.94 * state["weights"].nbytes
    raw = sum(value.nbytes for value in state.values())
    assert raw <= info.nbytes < raw + 10_000, "of the state, not of what is stored"
    assert event.new_nbytes == event.nbytes
    assert event.written_nbytes == info.new_bytes < 0.75 * event.new_nbytes
    assert event.compress_s > 0


def test_without_compress_nothing_is() -> None:
    store = MemoryStore("without")
    with manager(store, None) as ckpts:
        ckpts.save(1, {"zeros": np.zeros(9 * BLOCK, np.uint8)}, block=True)
        ckpts.wait()  # until it is in the history
        [event] = ckpts.events()
    assert set(codecs(manifests(store)[0], "zeros")) == {""}
    assert event.compress_s == 0
    assert event.new_nbytes == event.nbytes


def test_the_threads_of_the_save_compress(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()
    real = Encoder.encode

    def encode(self: Encoder, *args: Any) -> Any:
        seen.add(threading.current_thread().name)
        return real(self, *args)

    monkeypatch.setattr(Encoder, "encode", encode)
    with manager(MemoryStore("threads")) as ckpts:
        ckpts.save(1, {"x": np.zeros(9 * BLOCK, np.uint8), "y": np.zeros(300, np.float64)}).result()
    assert seen == {"holdfast-saver"}


@pytest.mark.parametrize("compress", ["gzip", "", "zstd:3", "ZSTD", True, 3])
def test_another_word_is_refused_before_anything_happens(tmp_path: Path, compress: Any) -> None:
    for make in (holdfast.CheckpointManager, holdfast.Run):
        with pytest.raises(UsageError, match=r"compress=.* is not known") as caught:
            make(tmp_path / "run", compress=compress)
        assert 'compress="zstd"' in caught.value.hint
    assert not (tmp_path / "run").exists()


def test_another_word_leaves_an_older_run_open(tmp_path: Path) -> None:
    with holdfast.Run(tmp_path / "run") as older:
        with pytest.raises(UsageError, match="is not known"):
            holdfast.Run(tmp_path / "run", compress="gzip")
        for _ in older.range(2):
            pass
    assert holdfast.open(tmp_path / "run").info.step == 2


# -- packs --------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "then"), [("zstd", None), (None, "zstd")])
def test_what_is_stored_is_not_written_again_when_compress_changes(
    first: str | None, then: str | None
) -> None:
    store = MemoryStore("changes")
    state = {"w": weights(6 * BLOCK, 1), "n": noise(3 * BLOCK, 1)}
    with manager(store, first) as ckpts:
        whole = ckpts.save(1, state, block=True).result().new_bytes
    with manager(store, then) as ckpts:
        again = ckpts.save(2, state, block=True).result().new_bytes
        ckpts.save(3, {**state, "new": weights(2 * BLOCK, 3)}, block=True)
        assert np.array_equal(ckpts.load(3)["w"], state["w"])
    assert again < 0.05 * whole
    expected = {ZSTD if first else ""}
    one, two, three = manifests(store)
    assert set(codecs(one, "w")) == set(codecs(two, "w")) == set(codecs(three, "w")) == expected
    assert set(codecs(three, "new")) == {ZSTD if then else ""}


@pytest.mark.parametrize("then", COMPRESS)
@pytest.mark.parametrize("block", [True, False])
def test_what_moves_to_another_pack(then: str | None, block: bool) -> None:
    """Read in place, it is copied as it is stored; what lies in memory is stored anew."""
    store = MemoryStore("moves")
    frozen = weights(4 * BLOCK, 1)
    with manager(store, "zstd") as ckpts:
        ckpts.save(1, {"frozen": frozen, "trained": noise(30 * BLOCK, 1)}, block=True)
    with manager(store, then, keep="last=1") as ckpts:
        ckpts.save(2, {"frozen": frozen, "trained": noise(30 * BLOCK, 2)}, block=block).result()
        assert np.array_equal(ckpts.load(2)["frozen"], frozen)
        assert all(result.ok for result in ckpts.verify())
    [manifest] = manifests(store)
    assert {pack.born for pack in manifest.packs} == {2}
    assert set(codecs(manifest, "frozen")) == {ZSTD if block or then else ""}


def test_raw_chunks_that_move_are_compressed_on_the_way() -> None:
    store = MemoryStore("moves-raw")
    frozen = weights(4 * BLOCK, 1)
    with manager(store, None) as ckpts:
        ckpts.save(1, {"frozen": frozen, "trained": noise(30 * BLOCK, 1)}, block=True)
    with manager(store, "zstd", keep="last=1") as ckpts:
        ckpts.save(2, {"frozen": frozen, "trained": noise(30 * BLOCK, 2)}, block=True)
        assert np.array_equal(ckpts.load(2)["frozen"], frozen)
    assert set(codecs(manifests(store)[0], "frozen")) == {ZSTD}


def test_a_pack_is_kept_for_the_bytes_it_stores_not_for_what_they_hold() -> None:
    """Forty blocks of zeros in a few bytes do not keep ten of noise."""
    store = MemoryStore("kept")
    zeros = np.zeros(40 * BLOCK, np.uint8)
    with manager(store, keep="last=1") as ckpts:
        for step in (1, 2, 3):
            ckpts.save(step, {"zeros": zeros, "trained": noise(10 * BLOCK, step)}, block=True)
    [manifest] = manifests(store)
    assert {pack.born for pack in manifest.packs} == {3}
    assert sum(info.size_bytes for info in store.list("packs/")) < 13 * BLOCK


def test_a_pack_opens_with_safetensors(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    state = {"w": weights(5 * BLOCK, 1), "n": noise(3 * BLOCK, 1)}
    with manager(LocalStore(tmp_path)) as ckpts:
        ckpts.save(1, state, block=True)
    [pack] = tmp_path.glob("packs/*")
    found = load_file(pack)
    raw = b""
    for name in sorted((name for name in found if name.startswith("w[")), key=_first_byte):
        assert name.endswith("[shuffle-zstd]")
        assert found[name].dtype == np.uint8
        plain = load_zstd().decompress(found[name].tobytes())
        raw += np.frombuffer(plain, np.uint8).reshape(4, -1).T.tobytes()
    assert raw == state["w"].tobytes()
    [name] = [name for name in found if name == "n[0:8192]"]
    assert np.array_equal(found[name], state["n"][:BLOCK])


def _first_byte(name: str) -> int:
    return int(name.partition("[")[2].partition(":")[0])


def test_a_leaf_named_like_another_ones_chunk(tmp_path: Path) -> None:
    state = {
        "a": weights(4 * BLOCK, 1),
        "b": np.zeros(5000, np.uint8),
        "n": noise(2 * BLOCK, 1),
        **{f"a[0:8192]{end}": np.ones(9) for end in ("", "[shuffle-zstd]", "#", "[shuffle-zstd]#")},
        **{f"b[shuffle-zstd]{end}": np.ones(8) for end in ("", "#")},
        "n[0:8192]": np.ones(7),
        **{f"__metadata__{end}": np.ones(6) for end in ("", "#", "##")},  # the header's own
    }
    with manager(LocalStore(tmp_path)) as ckpts:
        ckpts.save(1, state, block=True)
        for name, value in state.items():
            assert np.array_equal(ckpts.load(1)[name], value)


def test_what_moves_is_compared_with_its_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole frame of other bytes, as somebody else could have written it."""
    store = MemoryStore("compared")
    frozen = weights(2000, 1)

    def encoded(self: Any, nbytes: int, itemsize: int) -> memoryview:
        return memoryview(load_zstd().compress(bytes(nbytes)))

    with manager(store) as ckpts:
        with monkeypatch.context() as patch:
            patch.setattr(encoding.EncodingRoom, "encoded", encoded)
            ckpts.save(1, {"frozen": frozen}, block=True)
        [trained] = [noise(30 * BLOCK, 1)]
        with pytest.raises(DamagedObject, match=r"'frozen' in packs/.* do not match their digest"):
            ckpts.save(2, {"frozen": frozen, "trained": trained}, block=True)
        ckpts.save(3, {"frozen": frozen, "trained": trained}, block=True)
        assert np.array_equal(ckpts.load(3)["frozen"], frozen)


def test_a_long_header_finds_a_block_while_chunks_move() -> None:
    """With as few blocks as there may be: two are taken for what moves."""
    store = MemoryStore("blocks-enough")
    zeros = np.zeros(200 * BLOCK, np.uint8)
    with manager(store) as ckpts:
        ckpts.save(1, {"trained": noise(10 * BLOCK, 1), "zeros": zeros}, block=True)
    with manager(store, None) as ckpts:
        ckpts.save(2, {"trained": noise(10 * BLOCK + 99, 2), "zeros": zeros}, block=True)
        assert ckpts._staging.nbytes == MEMORY
        assert not ckpts.load(2)["zeros"].any()
    _, manifest = manifests(store)
    assert manifest.packs[0].head_nbytes > BLOCK
    assert set(codecs(manifest, "zeros")) == {ZSTD}


# -- reading ------------------------------------------------------------------------------


def test_restores_fill_live_arrays_and_single_leaves_are_read_alone() -> None:
    store = MemoryStore("reading")
    state = {name: weights(9 * BLOCK, n) for n, name in enumerate("abc")}
    with manager(store) as ckpts:
        ckpts.save(1, state, block=True)
        live = {name: np.zeros_like(value) for name, value in state.items()}
        addresses = {name: value.ctypes.data for name, value in live.items()}
        ckpts.restore(into=live)
        for name, value in state.items():
            assert np.array_equal(live[name], value)
            assert live[name].ctypes.data == addresses[name]
        live = {name: np.zeros_like(value) for name, value in state.items()}
        ckpts.restore(into=live, only=["b"])
        assert np.array_equal(live["b"], state["b"])
        assert not live["a"].any()


def test_an_export_and_a_comparison_are_those_of_the_state(tmp_path: Path) -> None:
    state = {"w": weights(5 * BLOCK, 1), "n": noise(3 * BLOCK, 1)}
    other = {**state, "w": state["w"].copy()}
    other["w"][1234] += 1
    files = []
    for compress in COMPRESS:
        with manager(LocalStore(tmp_path / str(compress)), compress) as ckpts:
            ckpts.save(1, state, block=True)
            ckpts.save(2, other, block=True)
            ckpts.export(1, tmp_path / f"{compress}-out")
            files.append((tmp_path / f"{compress}-out" / "state.safetensors").read_bytes())
    assert files[0] == files[1]
    raw, compressed = (Repo(LocalStore(tmp_path / str(compress))) for compress in COMPRESS)
    same = compare(raw, raw.records()[0], compressed, compressed.records()[0], values=True)
    assert [d for d in same.differences if d.section == "state"] == []
    found = compare(raw, raw.records()[0], compressed, compressed.records()[1], values=True)
    [difference] = [d for d in found.differences if d.section == "state"]
    assert difference.apart is not None
    assert (difference.path, difference.apart.differing) == ("w", 1)
    assert difference.apart.elements == state["w"].size
    assert difference.apart.largest == pytest.approx(1)


def test_a_comparison_of_other_cuts_reads_compressed_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"w": weights(5 * BLOCK, 1)}
    repos = []
    for size in (BLOCK, BLOCK // 2):
        monkeypatch.setattr(cutting, "CHUNK_BYTES", size)
        store = LocalStore(tmp_path / str(size))
        with manager(store) as ckpts:
            ckpts.save(1, state, block=True)
        repos.append(Repo(store))
    a, b = repos
    found = compare(a, a.records()[0], b, b.records()[0])
    assert [d for d in found.differences if d.section == "state"] == []


def test_a_restore_has_two_blocks_for_each_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = reader.new_block

    def block(nbytes: int) -> memoryview:
        made.append(nbytes)
        return real(nbytes)

    with manager(MemoryStore("blocks")) as ckpts:
        state = {"w": weights(100 * BLOCK, 1)}
        ckpts.save(1, state, block=True)
        monkeypatch.setattr(reader, "new_block", block)
        monkeypatch.setattr(reader, "READ_BYTES", BLOCK)
        ckpts.restore(into={"w": np.zeros_like(state["w"])})
    assert len(made) <= 2 * MemoryStore().parallel
    assert made.count(BLOCK) == len(made) / 2, "the other ones are as long as the header"


# -- forks --------------------------------------------------------------------------------


def test_a_fork_shares_compressed_chunks(tmp_path: Path) -> None:
    state = {"w": weights(9 * BLOCK, 1)}
    with manager(LocalStore(tmp_path / "a")) as ckpts:
        ckpts.save(1, state, block=True)
        ckpts.fork(1, tmp_path / "b")
    with manager(LocalStore(tmp_path / "b")) as ckpts:
        info = ckpts.save(2, {**state, "x": np.ones(3)}, block=True).result()
        assert info.new_bytes < 2 * BLOCK, "a header"
        assert np.array_equal(ckpts.load(2)["w"], state["w"])
