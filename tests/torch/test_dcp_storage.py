"""`holdfast.torch.dcp` in one process: names, values, what is read, and what is refused."""

from __future__ import annotations

import inspect
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import LoadPlan

import holdfast
from holdfast import errors
from holdfast.manager.history import SaveEvent
from holdfast.repo.repo import Repo
from holdfast.torch.dcp import StorageReader, StorageWriter

dcp: Any = torch.distributed.checkpoint

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is (disabled|unavailable):UserWarning"
)


@pytest.fixture
def address(tmp_path: Path) -> str:
    return str(tmp_path / "run")


@pytest.fixture(autouse=True)
def given_up(address: str) -> Any:
    yield
    StorageWriter(address).close()


def save(address: str, step: int, state: dict[str, Any], **options: Any) -> None:
    planner = options.pop("planner", None)
    writer = StorageWriter(address, step=step, **options)
    dcp.save(state, storage_writer=writer, planner=planner)


def load(reference: str, state: dict[str, Any], **options: Any) -> dict[str, Any]:
    planner = options.pop("planner", None)
    dcp.load(state, storage_reader=StorageReader(reference, **options), planner=planner)
    return state


def cause(call: Callable[..., Any], *args: Any, **options: Any) -> BaseException:
    """What made DCP fail."""
    with pytest.raises(CheckpointException) as failed:
        call(*args, **options)
    return failed.value.failures[0][0]


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def small() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))


# -- what is saved, and how it comes back -------------------------------------


def test_all_kinds_of_values_come_back(address: str) -> None:
    state = {
        "model": small().state_dict(),
        "half": torch.randn(3, 2).bfloat16(),
        "complex": torch.randn(2, 3, dtype=torch.complex128),
        "turned": torch.randn(4, 3).t(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "flag": True,
        "text": "é" * 5000,
        "history": [1.0, float("nan")],
        "tensors": [torch.ones(2), {"deep": 3}],
        "pair": (torch.arange(3), "x"),
        "numbers": {1: "one", "two": None},
    }
    save(address, 7, state)
    new: Any = {
        "model": {name: torch.zeros_like(t) for name, t in state["model"].items()},
        **{k: torch.zeros_like(state[k]) for k in ("half", "complex", "turned", "scalar", "empty")},
        **dict.fromkeys(("flag", "text", "history", "pair")),
        "tensors": [torch.zeros(2), {"deep": 0}],
        "numbers": {"1": None, "two": 2},
    }
    load(address, new)
    for name, tensor in state["model"].items():
        assert torch.equal(new["model"][name], tensor)
    for name in ("half", "complex", "turned", "scalar", "empty"):
        assert torch.equal(new[name], state[name])
    assert (new["flag"], new["text"]) == (True, state["text"])
    assert str(new["history"]) == "[1.0, nan]"
    assert torch.equal(new["tensors"][0], torch.ones(2))
    assert new["tensors"][1] == {"deep": 3}
    assert torch.equal(new["pair"][0], torch.arange(3))
    assert new["numbers"] == {"1": "one", "two": None}


def test_it_is_a_checkpoint_like_any_other(address: str, tmp_path: Path) -> None:
    model = small()
    save(address, 1, {"model": model.state_dict()}, metrics={"loss": 2}, note="first")
    save(address, 2, {"model": model.state_dict()}, metrics={"loss": 1}, tags=["good"])
    loaded = holdfast.open(f"{address}@best:loss")
    assert loaded.info.tags == ("good",)
    assert torch.equal(loaded["model"]["0.weight"], model.state_dict()["0.weight"])
    with holdfast.CheckpointManager(address) as ckpts:
        assert [one.note for one in ckpts.checkpoints()] == ["first", ""]
        differences = ckpts.compare(1, ckpts, 2).differences
        assert [one.section for one in differences] == ["metrics"]
        assert all(one.ok for one in ckpts.verify())
        names = ckpts.export_tensors(2, tmp_path / "a.safetensors", only="model")
        assert sorted(names) == sorted(model.state_dict())
        live = small()
        ckpts.restore(into={"model": live})
    for name, tensor in live.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_a_model_that_loads_in_its_own_way_takes_a_dict(address: str) -> None:
    class Own(torch.nn.Linear):
        def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
            return super().load_state_dict(state_dict, *args, **kwargs)

    model, live = Own(3, 2), Own(3, 2)
    save(address, 1, {"model": model.state_dict()})
    with holdfast.CheckpointManager(address) as ckpts:
        ckpts.restore(into={"model": live})
        assert torch.equal(live.weight, model.weight)
        with pytest.raises(errors.StructureMismatch, match=r"0\.weight"):
            ckpts.restore(into={"model": small()})
        with pytest.raises(errors.StructureMismatch, match="saved as a dict"):
            ckpts.restore(into={"model": torch.optim.SGD(model.parameters())})


def test_what_a_manager_saved_is_loaded(address: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight  # tied
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    memory = torch.arange(12.0)
    image = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    views = {"low": memory[:8].view(2, 4), "high": memory[4:]}
    with holdfast.CheckpointManager(address) as ckpts:
        state = {"model": model, "optim": optimizer, "image": image, "views": views, "n": 3}
        ckpts.save(4, state).result()
    new: Any = {
        "model": {name: torch.zeros_like(t) for name, t in model.state_dict().items()},
        "optim": torch.optim.Adam(model.parameters()).state_dict(),
        "image": torch.zeros(2, 3, 4, 4),
        "views": {"low": torch.zeros(2, 4), "high": torch.zeros(8)},
        "n": 0,
    }
    new["optim"]["state"] = {
        number: {name: torch.zeros_like(t) for name, t in entry.items()}
        for number, entry in optimizer.state_dict()["state"].items()
    }
    load(f"{address}@4", new)
    for name, tensor in model.state_dict().items():
        assert torch.equal(new["model"][name], tensor)
    for number, entry in optimizer.state_dict()["state"].items():
        for name, tensor in entry.items():
            assert torch.equal(new["optim"]["state"][number][name], tensor)
    assert torch.equal(new["image"], image)
    assert torch.equal(new["views"]["low"], views["low"])
    assert torch.equal(new["views"]["high"], views["high"])
    assert new["n"] == 3


def test_a_folder_of_dcp_is_imported_and_loaded(address: str, tmp_path: Path) -> None:
    state = {"model": small().state_dict(), "lr": 0.5, "list": [torch.ones(2), torch.zeros(1)]}
    dcp.save(state, checkpoint_id=tmp_path / "old")
    holdfast.import_checkpoint(tmp_path / "old", address, step=3)
    new: Any = {"model": small().state_dict(), "lr": 0, "list": [torch.zeros(2), torch.ones(1)]}
    load(f"{address}@3", new)
    for name, tensor in state["model"].items():
        assert torch.equal(new["model"][name], tensor)
    assert (new["lr"], new["list"][0].tolist(), new["list"][1].tolist()) == (0.5, [1, 1], [0])


def test_types_are_converted_and_parts_left_out_as_dcp_does_it(address: str) -> None:
    save(address, 1, {"a": torch.tensor([1.5, 2.5]), "b": 3})
    new = load(address, {"a": torch.zeros(2, dtype=torch.float64)})
    assert new["a"].tolist() == [1.5, 2.5]
    partial = DefaultLoadPlanner(allow_partial_load=True)
    assert load(address, {"b": 0, "more": 5}, planner=partial) == {"b": 3, "more": 5}
    assert "more" in str(cause(load, address, {"more": 5}))
    assert "ize mismatch" in str(cause(load, address, {"a": torch.zeros(3)}))


def test_all_of_it_can_be_loaded_without_a_state(address: str) -> None:
    save(address, 1, {"a": {"w": torch.ones(2)}, "l": [torch.ones(1), {}, 4], "n": 3})
    found = state_dict_loader._load_state_dict_from_keys(
        {"a", "l", "n"}, storage_reader=StorageReader(address)
    )
    assert torch.equal(found["a"]["w"], torch.ones(2))
    # DCP says nothing of an empty dict.
    assert (found["l"][1:], found["n"]) == ([None, 4], 3)


def test_only_the_chunks_that_are_needed_are_read(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {name: torch.randn(64, 1024) for name in "abcd"}
    save(address, 1, state, sparse_rows=["a"])  # four chunks
    read: list[int] = []
    whole = Repo.read_pack

    def counted(repo: Repo, pack: Any, offset: int, into: memoryview, **options: Any) -> None:
        read.append(into.nbytes)
        whole(repo, pack, offset, into, **options)

    monkeypatch.setattr(Repo, "read_pack", counted)
    assert torch.equal(load(address, {"c": torch.zeros(64, 1024)})["c"], state["c"])
    assert sum(read) == state["c"].nbytes
    read.clear()

    class Rows(DefaultLoadPlanner):
        """Wants a few rows only, as a rank with a shard does."""

        def create_local_plan(self) -> LoadPlan:
            (item,) = super().create_local_plan().items
            some = {"storage_offsets": torch.Size([10, 0]), "lengths": torch.Size([10, 1024])}
            item.__dict__.update(some)
            return LoadPlan([item])

    rows = load(address, {"a": torch.zeros(64, 1024)}, planner=Rows())["a"]
    assert torch.equal(rows[:10], state["a"][10:20])
    assert sum(read) == 2 * 64 * 1024  # rows 0 to 15 and 16 to 31


# -- what is damaged, or not allowed -------------------------------------------


def test_damage_is_named_and_not_used(address: str) -> None:
    save(address, 1, {"a": torch.ones(4000), "b": torch.ones(4000)})
    with holdfast.CheckpointManager(address) as ckpts:
        manifest = ckpts.manifest()
    (leaf,) = [leaf for leaf in manifest.leaves if leaf.path == "b"]
    (chunk,) = leaf.chunks
    flip(Path(address) / f"packs/{manifest.packs[chunk.pack].name}.safetensors", chunk.offset + 9)
    new = {"b": torch.zeros(4000)}
    error = cause(load, address, new)
    assert isinstance(error, errors.DamagedObject)
    assert error.leaf == "b"
    assert not new["b"].any()
    assert load(address, {"a": torch.zeros(4000)})["a"].all()


def test_what_is_damaged_is_read_from_the_mirror(address: str, tmp_path: Path) -> None:
    tensor = torch.randn(4000)
    with holdfast.CheckpointManager(address, mirror=tmp_path / "mirror") as ckpts:
        ckpts.save(1, {"w": tensor}).result()
        (chunk,) = ckpts.manifest().leaves[0].chunks
        name = ckpts.manifest().packs[chunk.pack].name
    flip(Path(address) / f"packs/{name}.safetensors", chunk.offset)
    new = load(address, {"w": torch.zeros(4000)}, mirror=tmp_path / "mirror")
    assert torch.equal(new["w"], tensor)


class Plain:
    def __eq__(self, other: object) -> bool:
        return type(other) is Plain

    __hash__ = None  # type: ignore[assignment]


def test_nothing_is_pickled_unless_it_is_said_twice(address: str) -> None:
    state = {"w": torch.ones(2), "odd": Plain()}
    error = cause(save, address, 1, state)
    assert isinstance(error, errors.UnsupportedValue)
    assert error.path == "odd"
    save(address, 1, state, allow_pickle=True)
    assert load(address, {"w": torch.zeros(2)})["w"].all()
    assert isinstance(cause(load, address, {"odd": None}), errors.PickleRefused)
    assert load(address, {"odd": None}, allow_pickle=True)["odd"] == Plain()


def test_no_unpickler_runs_on_what_is_stored(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save(address, 1, {"w": torch.ones(2), "n": {"deep": [1, "x"]}})
    made: list[bytes] = []
    monkeypatch.setattr(pickle, "load", lambda *args, **kwargs: pytest.fail("unpickled"))
    whole = torch.save

    def kept(value: object, file: io.BytesIO) -> None:
        whole(value, file)
        made.append(file.getvalue())

    monkeypatch.setattr(torch, "save", kept)
    metadata = StorageReader(address).read_metadata()
    assert sorted(metadata.state_dict_metadata) == ["n.deep", "w"]
    load(address, {"w": torch.zeros(2)})
    assert made == []  # and for values only what was made here
    packs = b"".join(file.read_bytes() for file in (Path(address) / "packs").iterdir())
    assert b"PK\x03\x04" not in packs


def test_planners_of_ones_own(address: str) -> None:
    class Halves(DefaultSavePlanner):
        def transform_object(self, write_item: Any, object: Any) -> Any:
            if isinstance(object, torch.Tensor):
                return object.half().float()
            return super().transform_object(write_item, object + 1)

    save(address, 1, {"w": torch.tensor([1 / 3]), "n": 3}, planner=Halves())
    found = load(address, {"w": torch.zeros(1), "n": 0})
    assert found == {"w": torch.tensor([1 / 3]).half().float(), "n": 4}

    class Bytes(DefaultSavePlanner):
        def transform_object(self, write_item: Any, object: Any) -> Any:
            return io.BytesIO(b"anything")

    error = cause(save, address, 2, {"n": 3}, planner=Bytes())
    assert "torch.save" in str(error)


if "enable_plan_caching" in inspect.signature(DefaultSavePlanner).parameters:

    def test_plans_that_are_kept_are_refused(address: str) -> None:
        class Cached(DefaultSavePlanner):
            """Its plans have a place of their own in torch's cache."""

        save(address, 3, {"n": 3}, planner=Cached(enable_plan_caching=True))
        error = cause(save, address, 4, {"n": 3}, planner=Cached(enable_plan_caching=True))
        assert "enable_plan_caching=False" in str(error)


@pytest.mark.parametrize("tensor", [torch.ones(2, 2).to_sparse(), torch.ones(2, device="meta")])
def test_tensors_without_bytes_of_their_own_are_refused(address: str, tensor: torch.Tensor) -> None:
    error = cause(save, address, 1, {"w": tensor})
    assert isinstance(error, errors.UnsupportedValue)
    assert error.path == "w"


# -- the run --------------------------------------------------------------------


def test_which_checkpoint_a_call_means(address: str) -> None:
    for id in (1, "out/step-2", "3"):
        dcp.save({"n": id}, storage_writer=StorageWriter(address), checkpoint_id=id)
    dcp.save({"n": "named"}, storage_writer=StorageWriter(address, step=3), checkpoint_id="gold")
    with holdfast.CheckpointManager(address) as ckpts:
        found = [(one.step, one.tags) for one in ckpts.checkpoints()]
    assert found == [(1, ()), (2, ()), (3, ("gold",))]  # of two at one step the newer one counts
    for id, expected in (("gold", "named"), ("step_2", "out/step-2"), ("latest", "named")):
        state = {"n": None}
        dcp.load(state, storage_reader=StorageReader(address), checkpoint_id=id)
        assert state["n"] == expected
    assert isinstance(cause(save, address, None, {}), errors.UsageError)  # type: ignore[arg-type]
    assert StorageWriter.validate_checkpoint_id("step-3")
    assert not StorageWriter.validate_checkpoint_id("best:loss")
    assert StorageReader.validate_checkpoint_id("best:loss")
    assert not StorageReader.validate_checkpoint_id("a b")


def test_retention_is_that_of_the_run(address: str) -> None:
    for step in range(1, 6):
        rules = {"keep": "last=2 best=1:loss", "metrics": {"loss": step}}
        save(address, step, {"w": torch.full((9,), step)}, **rules)
    with holdfast.CheckpointManager(address) as ckpts:
        assert [one.step for one in ckpts.checkpoints()] == [1, 4, 5]
        assert ckpts.best().step == 1  # type: ignore[union-attr]
        packs = {pack.name for one in (1, 4, 5) for pack in ckpts.manifest(one).packs}
        saved = [event.step for event in ckpts.events() if isinstance(event, SaveEvent)]
        assert saved == [1, 2, 3, 4, 5]
    assert len(list((Path(address) / "packs").iterdir())) == len(packs)


def test_one_process_writes_a_run(address: str) -> None:
    save(address, 1, {"n": 1})
    with holdfast.CheckpointManager(address) as ckpts:
        with pytest.raises(errors.RunHeld):
            ckpts.save(2, {"n": 2})
        ckpts.tag(1, "good")  # as a guest
    save(address, 2, {"n": 2})
    with holdfast.CheckpointManager(address, take_over=True) as ckpts:
        ckpts.save(3, {"n": 3}).result()
        assert isinstance(cause(save, address, 4, {"n": 4}), errors.Fenced)
    StorageWriter(address).close()
    save(address, 5, {"n": 5})
    assert load(address, {"n": 0})["n"] == 5


def test_what_it_builds_on_may_be_removed_meanwhile(address: str) -> None:
    state = {"w": torch.randn(100, 100)}
    save(address, 1, state)

    class Late(StorageWriter):
        def finish(self, metadata: Any, results: Any) -> None:
            with holdfast.CheckpointManager(address) as guest:
                guest.remove([1], force=True)
            super().finish(metadata, results)

    with pytest.raises(CheckpointException) as failed:
        dcp.save(state, storage_writer=Late(address, step=2))
    assert isinstance(failed.value.failures[0][0], errors.BaseLost)
    save(address, 3, state)
    assert torch.equal(load(address, {"w": torch.zeros(100, 100)})["w"], state["w"])


def test_ranks_that_find_different_checkpoints_are_told(address: str) -> None:
    save(address, 1, {"n": 1})
    reader = StorageReader(address)
    reader.read_metadata()
    plans = [reader.prepare_local_plan(LoadPlan([]))]
    save(address, 2, {"n": 2})
    reader.read_metadata()
    plans.append(reader.prepare_local_plan(LoadPlan([])))
    with pytest.raises(errors.GroupError, match="different checkpoints"):
        reader.prepare_global_plan(plans)
    reader.reset()


def test_a_run_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(errors.NoStore, match="there is no checkpoint"):
        StorageReader(tmp_path / "nothing").read_metadata()
    assert "there is no checkpoint" in str(cause(load, str(tmp_path / "nothing"), {"n": 0}))


@pytest.mark.usefixtures("world_of_one")
def test_the_state_may_change_once_async_save_has_returned(address: str) -> None:
    state = {"w": torch.ones(1000), "n": 1}
    saved = dcp.async_save(state, storage_writer=StorageWriter(address, step=1))
    state["w"].zero_()
    saved.result()
    assert load(address, {"w": torch.zeros(1000)})["w"].all()
