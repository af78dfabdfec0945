"""Compressed chunks that are damaged or forged, or that nothing here can decompress."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.core.codecs import ZSTD, load_zstd
from holdfast.errors import DamagedObject, FormatTooNew, StateError, UsageError
from holdfast.manager import encoding
from holdfast.stores.local import LocalStore
from holdfast.stores.memory import MemoryStore
from tests.manager.test_hostile import forge, refused, set_in
from tests.support.compression import (
    BLOCK,
    PACKAGE,
    codecs,
    manager,
    manifests,
    noise,
    stored_nbytes,
    weights,
)

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.fixture
def damaged_run(tmp_path: Path) -> Path:
    with manager(LocalStore(tmp_path / "run")) as ckpts:
        ckpts.save(1, {"w": weights(3 * BLOCK, 1), "n": noise(BLOCK, 1)}, block=True)
        ckpts.save(2, {"w": weights(3 * BLOCK, 2), "n": noise(BLOCK, 2)}, block=True)
    return tmp_path / "run"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def newest_pack(run: Path) -> Path:
    manifest = manifests(LocalStore(run))[-1]
    return run / "packs" / f"{manifest.packs[0].name}.safetensors"


@pytest.mark.parametrize("part", ["head", "raw", "frame head", "first", "middle", "last"])
def test_a_flipped_bit_is_found_in_every_part(
    damaged_run: Path, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = manifests(LocalStore(damaged_run))[-1]
    [leaf] = [leaf for leaf in manifest.leaves if leaf.path == "w"]
    [other] = [leaf for leaf in manifest.leaves if leaf.path == "n"]
    chunk = leaf.chunks[1]
    assert chunk.codec
    at = {
        "head": 20,
        "raw": other.chunks[0].offset + 5,
        "frame head": chunk.offset,
        "first": chunk.offset + 12,
        "middle": chunk.offset + chunk.nbytes // 2,
        "last": chunk.offset + chunk.nbytes - 1,
    }[part]
    flip(newest_pack(damaged_run), at)
    expected = {"head": "the header", "raw": "n"}.get(part, "w")
    with manager(LocalStore(damaged_run)) as ckpts:
        one, two = sorted(ckpts.verify(), key=lambda result: result.info.step)
        assert one.ok
        [problem] = two.problems
        assert f"'{expected}' in packs/" in problem
        caplog.set_level(logging.ERROR, "holdfast")
        found = ckpts.restore()
        assert found.info.step == 1
        assert np.array_equal(found.values["w"], weights(3 * BLOCK, 1))
        with pytest.raises(DamagedObject, match=f"'{expected}' in packs/"):
            ckpts.restore(ref=2)


def test_a_damaged_pack_is_no_source_for_the_next_save(damaged_run: Path) -> None:
    manifest = manifests(LocalStore(damaged_run))[-1]
    [leaf] = [leaf for leaf in manifest.leaves if leaf.path == "w"]
    flip(newest_pack(damaged_run), leaf.chunks[0].offset + 50)
    with manager(LocalStore(damaged_run)) as ckpts:
        ckpts.restore()
        ckpts.save(3, {"w": weights(3 * BLOCK, 2), "n": noise(BLOCK, 2)}, block=True)
        assert np.array_equal(ckpts.load(3)["w"], weights(3 * BLOCK, 2))


FORGED: dict[str, Callable[[bytes, bytes], bytes]] = {
    "cut off": lambda frame, raw: frame[:-1],
    "trailing garbage": lambda frame, raw: frame + b"x",
    "two frames": lambda frame, raw: frame + frame,
    "longer": lambda frame, raw: load_zstd().compress(raw + b"x"),
    "shorter": lambda frame, raw: load_zstd().compress(raw[:-1]),
    "a bomb": lambda frame, raw: load_zstd().compress(bytes(64 << 20)),
    "other bytes": lambda frame, raw: load_zstd().compress(raw[::-1]),
    "no frame": lambda frame, raw: raw[:100],
}


@pytest.mark.parametrize("kind", FORGED)
def test_forged_chunks_are_damage(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Written by somebody else: the manifest and its digests are in order."""
    store = MemoryStore("forged")
    state = {"w": np.arange(2000, dtype=np.int32)}
    with manager(store) as ckpts:
        ckpts.save(1, state, block=True)
        real = encoding.EncodingRoom.encoded

        def encoded(self: Any, nbytes: int, itemsize: int) -> memoryview:
            raw = bytes(self.room(nbytes))
            frame = real(self, nbytes, itemsize)
            assert frame is not None
            forged = FORGED[kind](bytes(frame), raw)
            assert len(forged) < nbytes
            return memoryview(forged)

        monkeypatch.setattr(encoding.EncodingRoom, "encoded", encoded)
        changed = {"w": np.arange(2000, dtype=np.int32) * 3}
        ckpts.save(2, changed, block=True)
        caplog.set_level(logging.ERROR, "holdfast")
        live = {"w": np.zeros(2000, np.int32)}
        with pytest.raises(DamagedObject, match="'w' in packs/"):
            ckpts.restore(into=live, ref=2)
        assert not live["w"].any(), "nothing live was touched"
        assert ckpts.restore(into=live).info.step == 1
        assert np.array_equal(live["w"], state["w"])
        assert [result.ok for result in ckpts.verify()].count(False) == 1


def one_chunk_run(folder: Path) -> None:
    with holdfast.CheckpointManager(folder, compress="zstd") as ckpts:
        ckpts.save(1, {"a": np.zeros(1000, np.float64)}, block=True)
    assert codecs(manifests(LocalStore(folder))[0], "a") == [ZSTD]


@pytest.mark.parametrize("nbytes", [0, -1, 8000, 1 << 60])
def test_sizes_that_cannot_be_are_refused(tmp_path: Path, nbytes: int) -> None:
    one_chunk_run(tmp_path / "run")
    forge(tmp_path / "run", set_in("leaves/0/chunks/0/4", nbytes))
    assert "bytes do not fit its shape" in refused(tmp_path / "run")


def test_a_small_pack_cannot_pose_as_a_state_of_any_size(tmp_path: Path) -> None:
    one_chunk_run(tmp_path / "run")
    stored = stored_nbytes(manifests(LocalStore(tmp_path / "run"))[0], "a")

    def claim(elements: int) -> Callable[[dict[str, Any]], None]:
        def change(manifest: dict[str, Any]) -> None:
            leaf = manifest["leaves"][0]
            leaf["shape"] = leaf["chunks"][0][1] = [elements]

        return change

    most = stored * (1 << 15) // 8
    forge(tmp_path / "run", claim(most + 1))
    assert "bytes do not fit its shape" in refused(tmp_path / "run")
    forge(tmp_path / "run", claim(most))
    assert "cannot be decompressed" in refused(tmp_path / "run")


def test_a_codec_of_a_later_version_asks_for_an_upgrade(tmp_path: Path) -> None:
    """It is no damage, so an older checkpoint does not stand in."""
    one_chunk_run(tmp_path / "run")
    forge(tmp_path / "run", set_in("leaves/0/chunks/0/6", "zstd-with-a-dictionary"))
    with manager(LocalStore(tmp_path / "run")) as ckpts, pytest.raises(FormatTooNew) as caught:
        ckpts.restore()
    assert re.search("'a' in .* 'zstd-with-a-dictionary'", caught.value.message)
    assert "pip install -U holdfast" in caught.value.hint


# -- without the package ------------------------------------------------------------------


def test_a_save_without_the_package_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    for make in (holdfast.CheckpointManager, holdfast.Run):
        with pytest.raises(UsageError, match=r"needs the package .*, which is not") as caught:
            make(tmp_path / "run", compress="zstd")
        assert caught.value.hint == "pip install 'holdfast[zstd]'"
    assert not (tmp_path / "run").exists()


def test_a_restore_without_the_package_says_so_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"n": noise(9 * BLOCK, 1), "w": weights(2 * BLOCK, 1)}
    # Where PyTorch was imported, its random state is compressed too.
    monkeypatch.setattr("holdfast.manager.manager.capture_rng", dict)
    with manager(LocalStore(tmp_path)) as ckpts:
        ckpts.save(1, {"n": noise(9 * BLOCK, 3)}, block=True)
        ckpts.save(2, state, block=True)
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    with manager(LocalStore(tmp_path), None) as ckpts:
        live = {"n": np.zeros(9 * BLOCK, np.uint8), "w": np.zeros(2 * BLOCK, np.float32)}
        with pytest.raises(StateError, match=r"@2 is compressed with zstd .'w', for one") as caught:
            ckpts.restore(into=live)
        assert "pip install 'holdfast[zstd]'" in caught.value.hint
        assert not live["n"].any(), "nothing was filled, not even what is not compressed"
        assert not live["w"].any()
        with pytest.raises(StateError, match="is compressed"):
            list(ckpts.verify())
        loaded = ckpts.load(2)
        assert np.array_equal(loaded["n"], state["n"]), "a leaf that is not compressed"
        with pytest.raises(StateError, match="is compressed"):
            loaded["w"]
        assert ckpts.restore(into=live, ref=1, skip=["w"], strict=False).info.step == 1


def test_a_save_without_the_package_writes_anew_what_is_compressed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = MemoryStore("anew")
    state = {"n": noise(9 * BLOCK, 1), "w": weights(2 * BLOCK, 1)}
    with manager(store) as ckpts:
        ckpts.save(1, state, block=True)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, PACKAGE, None)
        with manager(store, None) as ckpts:
            ckpts.save(2, state, block=True)
            assert np.array_equal(ckpts.load(2)["w"], state["w"])
    _, manifest = manifests(store)
    assert set(codecs(manifest, "w")) == {""}
