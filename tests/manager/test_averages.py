"""The mean of checkpoints: a new checkpoint, or a file."""

from __future__ import annotations

import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import holdfast
from holdfast.errors import (
    BadAddress,
    DamagedObject,
    HoldfastError,
    NoStore,
    RunHeld,
    StateError,
    StructureMismatch,
    UsageError,
)
from holdfast.manager import CheckpointManager, averages, blocks
from holdfast.repo import log
from holdfast.stores.faulty import Died, Effect, FaultPlan, FaultyStore
from holdfast.stores.memory import MemoryStore
from tests.support.jobs import fresh_address


def build() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.ReLU(), torch.nn.Linear(7, 2)
    )


def trained(address: Any, count: int = 4, **options: Any) -> list[dict[str, torch.Tensor]]:
    """`count` checkpoints; the weights of each."""
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    states = []
    with CheckpointManager(address, keep=None, **options) as manager:
        for step in range(1, count + 1):
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.randn(16, 5)).square().mean().backward()
                optimizer.step()
            manager.save(step, {"model": model, "optimizer": optimizer, "epoch": step}).result()
            states.append({name: t.clone() for name, t in model.state_dict().items()})
    return states


def weights_of(address: Any) -> dict[str, torch.Tensor]:
    model = build()
    with CheckpointManager(address, keep=None) as manager:
        manager.restore({"model": model}, only=["model"], rng=False)
    return model.state_dict()


def by_torch(
    states: list[dict[str, torch.Tensor]], weights: list[float] | None = None
) -> dict[str, torch.Tensor]:
    found = {}
    weights = weights or [1.0] * len(states)
    for name, last in states[-1].items():
        if not last.is_floating_point():
            found[name] = last
            continue
        total = weights[0] * states[0][name].double()
        for weight, state in zip(weights[1:], states[1:], strict=True):
            total = total + weight * state[name].double()
        found[name] = (total / sum(weights)).to(last.dtype)
    return found


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def run() -> str:
    return fresh_address()


# -- what is computed ----------------------------------------------------------------


def test_as_torch_computes_it_bit_for_bit(run: str) -> None:
    states, to = trained(run), fresh_address()
    made = holdfast.average(f"{run}@last=3", to)
    assert equal(weights_of(to), by_torch(states[1:]))
    assert "model/0.weight" in made.averaged
    assert "optimizer/state/0/exp_avg" in made.averaged
    assert made.differing == ("model/1.num_batches_tracked", "epoch")
    weighted = fresh_address()
    holdfast.average([f"{run}@2", f"{run}@4", f"{run}@1"], weighted, weights=[1, 2.5, 0.25])
    wanted = by_torch([states[1], states[3], states[0]], [1, 2.5, 0.25])
    assert equal(weights_of(weighted), wanted)


def test_as_averaged_model_up_to_its_own_roundings(run: str) -> None:
    """It rounds its running mean to the dtype of the weights at each update."""
    states, to = trained(run, 6), fresh_address()
    theirs = torch.optim.swa_utils.AveragedModel(build(), use_buffers=True)
    for state in states[2:]:
        model = build()
        model.load_state_dict(state)
        theirs.update_parameters(model)
    holdfast.average(f"{run}@last=4", to)
    ours = weights_of(to)
    for name, tensor in theirs.module.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-7)


def values(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    randn = partial(torch.randn, generator=generator)
    return {
        "half": randn(9).half(),
        "brain": randn(3, 3).bfloat16(),
        "double": randn(4, dtype=torch.float64),
        "complex": randn(4, dtype=torch.complex64),
        "wide": randn(4, dtype=torch.complex128),
        "numpy": randn(5, dtype=torch.float64).numpy(),
        "single": randn(5).numpy(),
        "zz": randn(5, dtype=torch.complex128).numpy(),
        "last": randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(float(step)),
        "ints": torch.arange(3) + step,
        "flags": np.array([step % 2 == 0, True]),
        "text": "x" * (5000 + step),
        "numbers": [0.5] * (5000 + step),
        "lr": 0.1 * step,
        "same": np.arange(4),
    }


def test_each_dtype(run: str) -> None:
    with CheckpointManager(run, keep=None) as manager:
        for step in (1, 2, 3):
            manager.save(step, values(step)).result()
    to = fresh_address()
    made = holdfast.average(f"{run}@all", to)
    all_of_it = [values(step) for step in (1, 2, 3)]
    found = holdfast.open(to).read()
    for name in made.averaged:
        parts = [torch.as_tensor(one[name]) for one in all_of_it]
        wide = torch.complex128 if parts[0].is_complex() else torch.float64
        total = parts[0].to(wide) + parts[1].to(wide) + parts[2].to(wide)
        if parts[0].is_complex():  # torch divides complex numbers in another way
            wanted = torch.view_as_complex(torch.view_as_real(total) / 3).to(parts[0].dtype)
        else:
            wanted = (total / 3).to(parts[0].dtype)
        assert torch.equal(torch.as_tensor(found[name]), wanted), name
    assert {*made.averaged, *made.differing, "same"} == set(values(1))
    assert made.differing == ("ints", "flags", "text", "numbers", "lr")
    last = all_of_it[-1]
    assert found["last"].stride() == last["last"].stride()
    for name in made.differing:
        assert np.array_equal(found[name], last[name]), name


def test_equal_ones_stay_the_same_bit_for_bit(run: str) -> None:
    """Three times a 64-bit number, divided by three, may be another one."""
    frozen = np.random.default_rng(0).standard_normal(1000)
    assert not np.array_equal((frozen + frozen + frozen) / 3, frozen)
    with CheckpointManager(run, keep=None) as manager:
        for step in (1, 2, 3):
            manager.save(step, {"frozen": frozen, "w": np.full(3, step)}).result()
    to = fresh_address()
    assert holdfast.average(f"{run}@all", to).averaged == ("frozen",)
    assert np.array_equal(holdfast.open(to)["frozen"], frozen)


def test_tensors_that_share_memory(run: str) -> None:
    """Overlapping views are one leaf of bytes, and tied ones are one tensor."""

    def state(step: int) -> dict[str, Any]:
        flat = torch.arange(20, dtype=torch.float32) * step
        tied = torch.full((3,), float(step))
        return {"a": flat[:12].view(3, 4), "b": flat[8:], "model": {"x": tied, "y": tied}}

    with CheckpointManager(run, keep=None) as manager:
        for step in (1, 2):
            manager.save(step, state(step)).result()
    to = fresh_address()
    holdfast.average(f"{run}@all", to)
    found = holdfast.open(to).read()
    for name, wanted in state(3).items():
        if name != "model":
            assert torch.equal(found[name], wanted / 2)
    with CheckpointManager(to, keep=None) as manager:
        into = state(9)
        manager.restore(into)
    assert into["a"].untyped_storage().data_ptr() == into["b"].untyped_storage().data_ptr()
    assert torch.equal(into["a"], state(3)["a"] / 2)
    assert into["model"]["x"] is into["model"]["y"]


def test_blocks_and_chunks_that_are_cut_elsewhere(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of a few blocks, and a run whose chunks are small, or compressed."""
    monkeypatch.setattr(blocks, "GROUP_BYTES", 100_000)
    shape = (3, 211, 107)  # 270 KB

    def state(step: int) -> dict[str, Any]:
        random = np.random.default_rng(step)
        names = [f"t{n}" for n in range(40)]
        small = {name: random.standard_normal(n).astype("f4") for n, name in enumerate(names)}
        return {"big": random.standard_normal(shape).astype("f4"), **small}

    other, squeezed = tmp_path / "other", tmp_path / "zstd"
    with CheckpointManager(run, keep=None) as manager:
        manager.save(1, state(1)).result()
    with CheckpointManager(other, keep=None, sparse_rows=["big"]) as manager:
        manager.save(2, state(2)).result()
    with CheckpointManager(squeezed, keep=None, compress="zstd") as manager:
        manager.save(3, state(3)).result()
    for order in ((run, other, squeezed), (squeezed, run, other)):
        to = fresh_address()
        holdfast.average(order, to)
        states = {run: state(1), other: state(2), squeezed: state(3)}
        found = holdfast.open(to).read()
        for name in found:
            parts = [states[address][name].astype("f8") for address in order]
            wanted = ((parts[0] + parts[1] + parts[2]) / 3).astype("f4")
            assert np.array_equal(found[name], wanted), name


def test_a_few_blocks_are_in_memory(tmp_path: Path) -> None:
    count = 16
    with CheckpointManager(tmp_path / "run", keep=None, memory="64MiB") as manager:
        for step in (1, 2):
            tensors = {f"t{n}": np.full(1 << 20, step, np.float32) for n in range(count)}
            manager.save(step, tensors, block=True)
            del tensors
    tracemalloc.start()
    holdfast.average(f"{tmp_path / 'run'}@all", export=tmp_path / "mean.safetensors")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 110 * 2**20, f"{peak / 2**20:.0f} MiB, of {2 * count * 4} MiB"


# -- what is made -----------------------------------------------------------------


def test_a_checkpoint_like_others(run: str, tmp_path: Path) -> None:
    trained(run, config={"lr": 0.05})
    to = tmp_path / "mean"
    made = holdfast.average(f"{run}@last=2", to)
    assert made.info is not None
    assert (made.info.step, made.info.note, dict(made.info.metrics)) == (4, "average of 2", {})
    assert [info.step for info in made.of] == [3, 4]
    loaded = holdfast.open(to)
    assert loaded.config == {"lr": 0.05}
    assert loaded.environment["average"] == {
        "of": [f"{run}@3", f"{run}@4"],
        "ids": [info.id for info in made.of],
        "weights": [1.0, 1.0],
    }
    with CheckpointManager(to, keep=None) as manager:
        assert [v.ok for v in manager.verify()] == [True]
        assert not manager.gc()
        again = holdfast.average(f"{run}@last=3", fresh_address())
        assert len(again.of) == 3
        with pytest.raises(RunHeld):  # by `gc`, as its writer
            holdfast.average(f"{run}@last=3", to)
    holdfast.average(f"{run}@last=3", to)
    with CheckpointManager(to, keep=None) as manager:
        assert [info.note for info in manager.checkpoints()] == ["average of 2", "average of 3"]


def test_a_run_goes_on_from_it() -> None:
    """With averaged weights, at the last one's place in the loops."""
    run, to = fresh_address(), fresh_address()

    def program(address: str, epochs: int) -> tuple[list[int], np.ndarray[Any, Any]]:
        weights, done = np.zeros(3), []
        with holdfast.Run(address, every=1, keep=None, quiet=True) as r:
            r.track(weights=weights)
            for epoch in r.epochs(epochs):
                done.append(epoch)
                weights += epoch + 1
        return done, weights

    assert program(run, 3)[0] == [0, 1, 2]
    holdfast.average(f"{run}@1 2 3", to)  # 1, 3, 6
    done, weights = program(to, 5)
    assert done == [3, 4]
    assert np.allclose(weights, 10 / 3 + 4 + 5, rtol=1e-15)


def test_a_part_of_it(run: str) -> None:
    states, to = trained(run), fresh_address()
    made = holdfast.average(f"{run}@last=2", to, only="model")
    loaded = holdfast.open(to)
    assert list(loaded) == ["model"]
    assert all(path.startswith("model/") for path in made.averaged)
    assert equal(weights_of(to), by_torch(states[2:]))
    with CheckpointManager(to, keep=None) as manager:
        found = manager.read_loop()
        assert found is not None
        assert found.loop is None
        assert all(v.ok for v in manager.verify())
    two = fresh_address()
    holdfast.average(f"{run}@last=2", two, only=["model", "epoch"])
    assert list(holdfast.open(two)) == ["model", "epoch"]


def test_a_file(run: str, tmp_path: Path) -> None:
    states, file = trained(run), tmp_path / "mean.safetensors"
    made = holdfast.average(f"{run}@last=2", export=file, only="model", weights=[1, 3])
    assert made.info is None
    assert made.file == file
    assert equal({name: load_file(file)[name] for name in states[0]}, by_torch(states[2:], [1, 3]))
    build().load_state_dict(load_file(file))
    with safe_open(file, "pt") as opened:
        assert '"weights":[1.0,3.0]' in opened.metadata()["holdfast"]
    with pytest.raises(UsageError, match="exists"):
        holdfast.average(f"{run}@last=2", export=file)
    holdfast.average(f"{run}@last=3", export=file, replace=True)
    assert "optimizer/state/0/exp_avg" in load_file(file)


# -- what is refused -----------------------------------------------------------------


def saved(*states: dict[str, Any]) -> str:
    address = fresh_address()
    with CheckpointManager(address, keep=None) as manager:
        for step, state in enumerate(states, 1):
            manager.save(step, state).result()
    return address


@pytest.mark.parametrize(
    ("first", "last", "words"),
    [
        ({"a": np.zeros(2), "b": np.zeros(2)}, {"a": np.zeros(2)}, "b is in A@1, and not in A@2"),
        ({"a": np.zeros(2)}, {"a": np.zeros(2), "b": np.zeros(2)}, "b is in A@2, and not in A@1"),
        (
            {"x": np.zeros(2), "a": np.zeros((2, 3)), "b": np.zeros(1)},
            {"x": np.zeros(2), "a": np.zeros((3, 2)), "b": np.zeros(2)},
            r"a is float64\[3, 2\] in A@2, and float64\[2, 3\] in A@1",
        ),
        (
            {"a": torch.zeros(2)},
            {"a": torch.zeros(2).bfloat16()},
            r"a is bfloat16\[2\] in A@2, and float32\[2\] in A@1",
        ),
        ({"a": np.zeros(2), "i": np.zeros(2, int)}, {"a": np.zeros(2), "i": 1}, "i is in A@1"),
    ],
)
def test_arrays_that_do_not_fit(first: Any, last: Any, words: str) -> None:
    run, to = saved(first, last), fresh_address()
    with pytest.raises(StructureMismatch, match=words.replace("A@", f"{run}@")):
        holdfast.average(f"{run}@all", to)
    with CheckpointManager(to) as manager:
        assert manager.checkpoints() == []


def test_what_has_no_mean_must_be_the_same() -> None:
    def state(step: int, eight: int = 1, at: int = 1) -> dict[str, Any]:
        return {
            "w": np.full(2, float(step)),
            "eight": torch.full((2,), eight).to(torch.float8_e4m3fn),
            "sparse": torch.sparse_coo_tensor(
                torch.tensor([[at]]), torch.ones(1), (3,), check_invariants=True
            ),
        }

    same = saved(state(1), state(2))
    to = fresh_address()
    holdfast.average(f"{same}@all", to)
    assert holdfast.open(to)["w"].tolist() == [1.5, 1.5]
    with pytest.raises(StateError, match=r"eight: float8_e4m3fn\[2\] is not the same in all"):
        holdfast.average(f"{saved(state(1), state(2, eight=2))}@all", to)
    with pytest.raises(
        StateError, match="sparse tensor is not the same in all, and cannot be averaged"
    ):
        holdfast.average(f"{saved(state(1), state(2, at=2))}@all", to)


def test_wrong_use(run: str, tmp_path: Path) -> None:
    trained(run, 3)
    to = fresh_address()
    for words, call in {
        "goes into a run or into a file": lambda: holdfast.average(f"{run}@all"),
        "into a file": lambda: holdfast.average(f"{run}@all", to, export=tmp_path / "x"),
        f"needs two checkpoints, and this is {run}@3": lambda: holdfast.average(run, to),
        "2 weights for 3": lambda: holdfast.average(f"{run}@all", to, weights=[1, 2]),
        "not all 0": lambda: holdfast.average(f"{run}@last=2", to, weights=[0, 0]),
        "is one of the runs": lambda: holdfast.average([f"{run}@all"], run),
        "nothing in the checkpoint is called 'modle'": lambda: holdfast.average(
            f"{run}@all", to, only="modle"
        ),
        "no floating-point tensor": lambda: holdfast.average(f"{run}@all", to, only="epoch"),
    }.items():
        with pytest.raises(UsageError, match=words):
            call()
    with pytest.raises(BadAddress):
        holdfast.average(f"{run}@", to)
    with pytest.raises(NoStore):
        holdfast.average(f"{fresh_address()}@all", to)
    with CheckpointManager(to) as manager:
        assert manager.checkpoints() == []


def damage(folder: Path, path: str) -> None:
    """Flip a bit of a leaf of the newest checkpoint."""
    with CheckpointManager(folder) as manager:
        manifest = manager.manifest()
    [chunk] = next(leaf for leaf in manifest.leaves if leaf.path == path).chunks
    pack = folder / "packs" / f"{manifest.packs[chunk.pack].name}.safetensors"
    data = bytearray(pack.read_bytes())
    data[chunk.offset + 1] ^= 1
    pack.chmod(0o644)
    pack.write_bytes(data)


def test_damage_leaves_nothing_and_is_named(tmp_path: Path) -> None:
    trained(tmp_path / "run")
    damage(tmp_path / "run", "model/3.weight")
    to, file = tmp_path / "mean", tmp_path / "mean.safetensors"
    references = f"{tmp_path / 'run'}@last=2"
    with pytest.raises(DamagedObject, match=r"run@4: .* is damaged"):
        holdfast.average(references, to)
    with pytest.raises(DamagedObject, match=r"run@4: .* is damaged"):
        holdfast.average(references, export=file)
    with CheckpointManager(to) as manager:
        assert manager.checkpoints() == []
    assert not file.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    holdfast.average(f"{tmp_path / 'run'}@2 3", to)
    with CheckpointManager(to) as manager:
        assert [info.step for info in manager.checkpoints()] == [3]


# -- stopped at any storage call -------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # it died
@pytest.mark.parametrize("effect", [Effect.DIE_BEFORE, Effect.DIE_AFTER, Effect.LOSE_REPLY])
def test_stopped_at_each_storage_call(effect: Effect, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new checkpoint is there whole, or not at all; then it can be made."""
    monkeypatch.setattr(log, "_CREATE_BACKOFF_S", 0.0)
    run = saved({"w": np.zeros(500)}, {"w": np.ones(500)})
    stores: list[Any] = []

    def opened(address: str, **options: Any) -> CheckpointManager:
        return CheckpointManager(address, store=stores[-1], **options)

    monkeypatch.setattr(averages, "CheckpointManager", opened)
    stores.append(FaultyStore(MemoryStore("mean")))
    holdfast.average(f"{run}@all", "memory://mean")
    calls = len(stores[0].calls)
    assert calls > 10
    for number in range(1, calls + 1):
        stores.append(FaultyStore(MemoryStore("mean"), FaultPlan.at(number, effect)))
        done = False
        try:
            holdfast.average(f"{run}@all", "memory://mean")
            done = True
        except (Died, HoldfastError):
            pass
        stores.append(stores[-1].survivor())
        with CheckpointManager("x", keep=None, store=stores[-1]) as manager:
            before = len(manager.checkpoints())
            assert before == 1 if done else before in (0, 1)
            assert all(v.ok for v in manager.verify()) if before else True
        holdfast.average(f"{run}@all", "memory://mean")
        with CheckpointManager("x", keep=None, store=stores[-1]) as manager:
            assert len(manager.checkpoints()) == before + 1
            assert manager.load()["w"].tolist() == [0.5] * 500
