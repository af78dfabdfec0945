"""Looking after a run without being its writer: order, best, verified pruning."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path

import msgspec
import numpy as np
import pytest

import holdfast
from holdfast import manager
from holdfast.core.records import Entry
from holdfast.core.sealed import seal
from holdfast.errors import BadAddress, NoIntactCheckpoint, NoStore, RunClosed
from holdfast.manager import CheckpointManager, Listing


def save_all(folder: Path, *steps: int, keep: str | None = None) -> None:
    with CheckpointManager(folder, keep=keep) as ckpts:
        for step in steps:
            # Nothing is shared, so that damage hits one checkpoint only.
            state = {"w": np.random.default_rng(step).random(500)}
            ckpts.save(step, state, metrics={"loss": 1 / step, "acc": step / 1000}).result()


def damage(folder: Path, step: int) -> None:
    """Flip a bit in the array of a checkpoint, which it shares with no other."""
    with Listing(folder) as run:
        manifest = run.manifest(step)
    [chunk] = next(leaf for leaf in manifest.leaves if leaf.path == "w").chunks
    path = folder / "packs" / f"{manifest.packs[chunk.pack].name}.safetensors"
    data = bytearray(path.read_bytes())
    data[chunk.offset] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def steps(folder: Path) -> list[int]:
    with Listing(folder) as run:
        return [info.step for info in run.checkpoints()]


# -- order ----------------------------------------------------------------------


def test_after_going_back_the_new_line_is_the_newest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_all(tmp_path / "run", 100, 400, 450, 500)
    with CheckpointManager(tmp_path / "run", keep="last=3") as ckpts:
        assert ckpts.restore({"w": np.zeros(500)}, 100) is not None
        for step in (150, 200):
            ckpts.save(step, {"w": np.random.default_rng(step).random(500)}).result()
        assert [info.step for info in ckpts.checkpoints()] == [500, 150, 200]
        latest = ckpts.latest()
        assert latest is not None
        assert latest.step == ckpts.info().step == 200
    damage(tmp_path / "run", 200)
    with CheckpointManager(tmp_path / "run", keep="last=3") as ckpts:
        restored = ckpts.restore({"w": np.zeros(500)})
        assert restored is not None
        assert restored.info.step == 150, "the one before it on this line, not step 500"


# -- best -----------------------------------------------------------------------


def test_best_follows_the_rule_that_the_run_recorded(tmp_path: Path) -> None:
    address = tmp_path / "run"
    save_all(address, 1, 2, 3, keep="last=9 best=1:acc:max best=1:loss:max")
    with Listing(address) as run:
        run.tag(2, "mine")  # a guest's transaction keeps the rule
        for best, step in [(run.best(), 3), (run.best("acc"), 3), (run.best("loss"), 1)]:
            assert best is not None
            assert best.step == step
        assert run.info("best").step == 3
        assert run.info("best:loss:min").step == 3
        assert run.best("bleu", "max") is None
    assert holdfast.open(f"{address}@best").info.step == 3
    assert holdfast.open(f"{address}@best:loss").info.step == 1
    with CheckpointManager(address, keep="best=1:loss") as own:
        assert own.info("best").step == 3, "the manager's own rule comes first"
        assert own.info("best:loss").step == 3


def test_the_rule_is_the_one_of_the_newest_save(tmp_path: Path) -> None:
    address = tmp_path / "run"
    save_all(address, 1, keep="best=1:acc:max")
    save_all(address, 2, keep=None)
    with Listing(address) as run, pytest.raises(BadAddress, match="by which metric"):
        run.best()


def test_a_rule_that_cannot_be_read_is_no_rule(tmp_path: Path) -> None:
    address = tmp_path / "run"
    save_all(address, 1, 2, keep="best=1:acc:max")
    newest = max((address / "log").iterdir())
    entry = msgspec.json.decode(newest.read_bytes())["value"]
    _, data = seal(msgspec.convert({**entry, "keep": "newer=1:rule"}, Entry))
    newest.chmod(0o644)
    newest.write_bytes(data)
    with Listing(address) as run:
        with pytest.raises(BadAddress, match="by which metric"):
            run.best()
        best = run.best("acc", "max")
        assert best is not None
        assert best.step == 2


def test_best_says_when_it_is_not_clear(tmp_path: Path) -> None:
    save_all(tmp_path / "run", 1, 2)
    with Listing(tmp_path / "run") as run:
        with pytest.raises(BadAddress, match="higher or lower"):
            run.best("acc")
        best = run.best("loss")
        assert best is not None
        assert best.step == 2
    with Listing(tmp_path / "none") as none:
        assert none.best("loss") is None


# -- pruning ---------------------------------------------------------------------


@pytest.mark.parametrize("dry_run", [True, False])
def test_prune_never_leaves_only_what_is_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, dry_run: bool
) -> None:
    address = tmp_path / "run"
    save_all(address, 1, 2, 3, 4)
    damage(address, 4)
    damage(address, 3)
    with caplog.at_level(logging.ERROR), Listing(address) as run:
        decisions = run.prune("last=1", dry_run=dry_run)
    assert {d.record.step: d.keep for d in decisions} == {1: False, 2: True, 3: True, 4: True}
    why = {d.record.step: d.why for d in decisions}
    assert why[2] == ("newest", "last=1")
    assert why[4] == ("damaged: no rule removes it",)
    assert f"checkpoint {address}@4 is damaged" in caplog.text
    assert steps(address) == ([1, 2, 3, 4] if dry_run else [2, 3, 4])


@pytest.mark.parametrize("dry_run", [True, False])
def test_prune_removes_nothing_where_none_is_intact(tmp_path: Path, dry_run: bool) -> None:
    address = tmp_path / "run"
    save_all(address, 1, 2, 3)
    for step in (1, 2, 3):
        damage(address, step)
    with Listing(address) as run:
        with pytest.raises(NoIntactCheckpoint, match="none of the 3") as caught:
            run.prune("last=1", dry_run=dry_run)
        assert f"holdfast verify {address}" in caught.value.hint
        assert caught.value.exit_code == 4
        assert len(run.prune("last=3", dry_run=dry_run)) == 3, "nothing would go: nothing is read"
    assert steps(address) == [1, 2, 3]


def test_prune_reads_no_further_than_the_newest_intact(tmp_path: Path) -> None:
    address = tmp_path / "run"
    save_all(address, 1, 2, 3)
    damage(address, 1)
    with CheckpointManager(address, keep="last=2") as run:
        decisions = run.prune()
    assert [d.keep for d in decisions] == [False, True, True], "what goes need not be intact"


def test_prune_keeps_what_it_verified_although_a_newer_one_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer commits between the verification and the commit of the prune."""
    address = tmp_path / "run"
    save_all(address, 1, 2)
    with Listing(address) as run:
        amend = run._repo.amend

        def late(*args: object) -> object:
            save_all(address, 3)
            return amend(*args)  # pyright: ignore[reportArgumentType]

        monkeypatch.setattr(run._repo, "amend", late)
        decisions = run.prune("last=1")
    assert [(d.record.step, d.why) for d in decisions if d.keep] == [
        (2, ("newest verified",)),
        (3, ("newest", "last=1")),
    ]
    assert steps(address) == [2, 3]


# -- the object itself -------------------------------------------------------------


def test_looking_creates_nothing_and_says_where_to_look(tmp_path: Path) -> None:
    with Listing(tmp_path / "none") as run:
        assert run.checkpoints() == []
        assert run.latest() is None
        assert not run.finished
        assert run.prune("last=1") == []
        with pytest.raises(NoStore, match="there is no checkpoint in") as caught:
            run.info()
        assert "`holdfast ls FOLDER`" in caught.value.hint
    assert list(tmp_path.iterdir()) == []
    run.close()
    with pytest.raises(RunClosed):
        run.checkpoints()


def test_an_empty_run_says_where_to_look(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "run") as ckpts:
        ckpts.acquire()
        with pytest.raises(NoStore) as caught:
            ckpts.load()
    assert "`holdfast ls FOLDER`" in caught.value.hint


@pytest.mark.parametrize("kind", [Listing, CheckpointManager])
def test_every_public_method_is_documented(kind: type) -> None:
    members = inspect.getmembers(kind, lambda m: callable(m) or isinstance(m, property))
    assert [name for name, m in members if not name.startswith("_") and not m.__doc__] == []
    assert len(members) > 15


def test_the_names_of_the_package_are_there() -> None:
    for name in manager.__all__:
        assert getattr(manager, name).__doc__
    assert set(manager.__all__) <= set(dir(manager))
    with pytest.raises(AttributeError, match="no attribute 'Managr'"):
        manager.Managr  # noqa: B018 # pyright: ignore[reportAttributeAccessIssue]
