"""Whatever reads a checkpoint whose leaves were cut in boxes finds what it would otherwise."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import holdfast
from holdfast.core.plan import Part
from holdfast.core.records import Leaf, Manifest
from holdfast.foreign import open_foreign
from holdfast.manager import CheckpointManager, Listing, blocks, numbers
from holdfast.manager.comparison import Apart, Comparison
from holdfast.manager.foreign_comparison import compare_files, of_foreign
from holdfast.repo.repo import Repo
from holdfast.stores.open import open_store
from tests.core.exactness import assert_exact
from tests.golden.make import state
from tests.support.jobs import fresh_address
from tests.support.recut import Cut, at_random, by_columns, recut
from tests.torch.roundtrip import assert_same

CUTS = {"by columns": by_columns, "at random": at_random(1), "and again": at_random(2)}
cuts = pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())
LEAVES = ("plain", "numpy", "frozen")


def saved(what: dict[str, Any]) -> str:
    address = fresh_address()
    with CheckpointManager(address) as manager:
        manager.save(6, what, metrics={"loss": 0.5}).result()
    return address


def boxed(source: str, cut: Cut, **options: Any) -> str:
    address = fresh_address()
    manifest = recut(source, address, cut, **options)
    assert any(len(leaf.chunks) > 1 for leaf in manifest.leaves)
    return address


@pytest.fixture(scope="module")
def whole() -> str:
    return saved(state(6))


def assert_state(found: Any, step: int = 6) -> None:
    wanted = state(step)
    assert_same(found["torch"], wanted["torch"])
    for name in LEAVES:
        assert_exact(found[name], wanted[name], name)


# -- back in the program -----------------------------------------------------------------


@cuts
@pytest.mark.parametrize("compress", [False, True])
def test_values_come_back(whole: str, cut: Cut, compress: bool) -> None:
    address = boxed(whole, cut, compress=compress)
    with CheckpointManager(address, keep=None) as manager:
        [found] = manager.verify()
        assert found.ok, found.problems
        back = manager.restore(rng=False)
        assert back is not None
        assert_state(back.values)
        opened = manager.load()
        assert (opened["numpy"]["f4"] == state(6)["numpy"]["f4"]).all()
        # Into live objects, and a save after it that uses again what it can.
        live = state(5)
        manager.restore(live, rng=False)
        assert_state(live)
        manager.save(7, state(7)).result()
        again = manager.restore(ref=7, rng=False)
        assert again is not None
        assert_state(again.values, 7)
        assert all(found.ok for found in manager.verify())


@cuts
def test_a_model_and_its_optimizer(cut: Cut) -> None:
    def built(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 5)
        )
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore
        optimizer = torch.optim.AdamW(model.parameters())
        torch.stack([p.square().sum() for p in model.parameters()]).sum().backward()
        optimizer.step()
        return {"model": model, "optimizer": optimizer}

    one, other = built(1), built(2)
    with CheckpointManager(boxed(saved(one), cut)) as manager:
        manager.restore(other, rng=False)
    for name, tensor in one["model"].state_dict().items():
        assert torch.equal(other["model"].state_dict()[name], tensor), name
    ours, theirs = one["optimizer"].state_dict(), other["optimizer"].state_dict()
    for number, entries in ours["state"].items():
        for name, value in entries.items():
            assert torch.equal(theirs["state"][number][name], value), (number, name)


@cuts
def test_files_and_long_texts(cut: Cut, tmp_path: Path) -> None:
    kept = tmp_path / "log.txt"
    kept.write_bytes(bytes(range(256)) * 40)
    source = saved({"file": holdfast.File(kept), "text": "äx" * 4000, "data": bytearray(5000)})
    kept.write_bytes(b"something else")
    with CheckpointManager(boxed(source, cut)) as manager:
        found = manager.restore({"file": holdfast.File(kept)}, only=["file"], rng=False)
        assert found is not None
        assert kept.read_bytes() == bytes(range(256)) * 40
        assert manager.load()["text"] == "äx" * 4000


def test_a_save_uses_again_what_has_the_same_bytes() -> None:
    """A box whose bytes are those of a whole chunk, wherever it was in its leaf."""
    what = {"kept": np.arange(20_000.0), "cut": np.arange(400.0).reshape(20, 20)}

    def cut(leaf: Leaf) -> list[Part]:
        one: list[Part] = [((0,) * len(leaf.shape), leaf.shape)]
        return by_columns(leaf) if leaf.path == "cut" else one if prod(leaf.shape) else []

    address = boxed(saved(what), cut, packs=1)
    with CheckpointManager(address, keep=None) as manager:
        manager.restore(dict(what), rng=True)
        # The left half of `cut`, as a leaf of its own.
        what["left"] = what["cut"][:, :10].copy()
        info = manager.save(7, what).result()
        assert info.new_bytes < info.nbytes - what["kept"].nbytes
        # Its copy is referred to, and `cut` is written as it is cut now.
        assert all(found.ok for found in manager.verify())
        assert_exact(dict(manager.load(7)), what)
        named = {leaf.path: leaf for leaf in _manifests(address)[-1].leaves}
        old = {leaf.path: leaf for leaf in _manifests(address)[0].leaves}
        assert named["kept"].chunks[0].offset == old["kept"].chunks[0].offset
        assert named["left"].chunks[0].offset == old["cut"].chunks[1].offset
        assert len(named["cut"].chunks) == 1


def _manifests(address: str) -> list[Manifest]:
    repo = Repo(open_store(address))
    return [repo.manifest(record) for record in repo.records()]


# -- compared ----------------------------------------------------------------------------


@cuts
def test_two_that_are_cut_in_other_ways_are_compared(whole: str, cut: Cut) -> None:
    other = boxed(whole, cut)
    changed = state(6)
    changed["numpy"]["f4"] = changed["numpy"]["f4"].copy()
    changed["numpy"]["f4"][1, 2] += 3
    changed["torch"]["bf16"][2] = 9
    elsewhere = boxed(saved(changed), at_random(3))
    with Listing(whole) as a, Listing(other) as b, Listing(elsewhere) as c:
        assert a.compare(None, b, None, values=True).equal
        assert b.compare(None, a, None).equal
        with Listing(saved(changed)) as plain:
            expected = a.compare(None, plain, None, values=True)
        for pair in (a, c), (b, c):
            found = _in_state(pair[0].compare(None, pair[1], None, values=True))
            assert found == _in_state(expected)
            assert [path for path, _, _ in found] == ["numpy/f4", "torch/bf16"]


def _in_state(result: Comparison) -> list[tuple[str, str, Apart | None]]:
    return [(d.path, d.kind, d.apart) for d in result.differences if d.section == "state"]


def test_of_two_that_are_cut_alike_only_what_differs_is_read(monkeypatch: Any) -> None:
    """By columns, both; one element is another."""
    one = np.arange(4096.0).reshape(64, 64)
    other = one.copy()
    other[3, 60] = -1
    names = [boxed(saved({"x": array}), by_columns) for array in (one, other)]
    asked: list[int] = []
    real = numbers.assembled

    def counted(*args: Any) -> memoryview:
        asked.append(len(args[2]))
        return real(*args)

    monkeypatch.setattr(numbers, "assembled", counted)
    with Listing(names[0]) as a, Listing(names[1]) as b:
        [found] = [d for d in a.compare(None, b, None, values=True).differences if d.path == "x"]
    assert found.apart is not None
    assert (found.apart.differing, found.apart.largest) == (1, 3 * 64 + 60 + 1)
    assert asked == [1, 1]


@cuts
def test_a_file_is_compared_with_one(cut: Cut, tmp_path: Path) -> None:
    model = {"w": torch.randn(40, 30), "b": torch.arange(40)}
    torch.save(model, tmp_path / "same.pt")
    torch.save({**model, "w": model["w"] + (torch.arange(30) == 7)}, tmp_path / "other.pt")
    with Listing(boxed(saved({"model": model}), cut)) as run:
        for name, different in (("same.pt", []), ("other.pt", ["w"])):
            with open_foreign(str(tmp_path / name)) as foreign:
                for sides in (
                    [of_foreign(foreign), run.to_compare(None)],
                    [run.to_compare(None), of_foreign(foreign)],
                ):
                    found = compare_files(*sides, values=True)
                    assert [d.path for d in found.differences] == [
                        f"model/{key}" for key in different
                    ]
                    assert [d.apart.differing for d in found.differences if d.apart] == [40] * len(
                        different
                    )


# -- written elsewhere ---------------------------------------------------------------------


@cuts
def test_exports_are_the_same_files(whole: str, cut: Cut, tmp_path: Path) -> None:
    for name, address in (("one", whole), ("two", boxed(whole, cut, compress=True))):
        with Listing(address) as run:
            run.export(None, tmp_path / name)
            run.export_as(None, "safetensors", tmp_path / f"{name}.safetensors", only="torch")
    for file in ("one/state.safetensors", "one.safetensors"):
        ours, theirs = load_file(tmp_path / file), load_file(tmp_path / file.replace("one", "two"))
        assert ours.keys() == theirs.keys()
        assert len(ours) > 5
        for key, tensor in ours.items():
            found = theirs[key]
            assert tensor.shape == found.shape
            assert _bytes(tensor) == _bytes(found)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@cuts
def test_files_of_torch(cut: Cut, tmp_path: Path) -> None:
    model = {"w": torch.randn(12, 10, dtype=torch.bfloat16), "b": torch.arange(7)}
    with Listing(boxed(saved({"model": model}), cut)) as run:
        run.export_as(None, "pt", tmp_path / "x.pt", only="model")
        run.export_as(None, "dcp", tmp_path / "dcp", only="model")
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "y.pt")
    for name in ("x.pt", "y.pt"):
        found = torch.load(tmp_path / name, weights_only=True)
        assert found.keys() == model.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in model.items())


@cuts
def test_averages(cut: Cut, monkeypatch: Any) -> None:
    """Also where a chunk reaches through several groups of blocks."""
    states = [
        {
            "w": torch.randn(16, 9),
            "b": np.random.default_rng(n).random((3, 5)),
            "n": torch.tensor(n),
        }
        for n in range(3)
    ]
    plain = [saved({"model": one}) for one in states]
    other = [boxed(name, cut) for name in plain]
    monkeypatch.setattr(blocks, "GROUP_BYTES", 150)
    real = blocks.boxes
    monkeypatch.setattr(blocks, "boxes", lambda shape, size: real(shape, size, 100))
    expected, found = fresh_address(), fresh_address()
    holdfast.average([f"{name}@6" for name in plain], expected, weights=[1, 2, 3])
    holdfast.average([f"{name}@6" for name in other], found, weights=[1, 2, 3])
    with Listing(expected) as a, Listing(found) as b:
        result = a.compare(None, b, None)
    assert [d.path for d in result.differences if d.section == "state"] == []


@cuts
def test_copies(whole: str, cut: Cut) -> None:
    address, to, last = boxed(whole, cut, compress=True), fresh_address(), fresh_address()
    with Listing(address) as run:
        run.copy([None], to, verify=True)
        run.sync(last, verify=True)
        ids = [info.id for info in run.checkpoints()]
    for name in (to, last):
        with Listing(name) as copied:
            assert [info.id for info in copied.checkpoints()] == ids
            assert all(found.ok for found in copied.verify())
    assert open_store(to).address != open_store(last).address
