"""`current.model` without flows, in a folder and in a bucket; what crosses; deletion."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from holdfast.cli.flow import on_tasks
from holdfast.errors import (
    CheckpointNotFound,
    CheckpointProtected,
    CorruptionError,
    Fenced,
    NoStore,
    UsageError,
)
from holdfast.manager.listing import Listing
from holdfast.metaflow.current import CurrentCheckpoint
from holdfast.metaflow.models import CurrentModel
from holdfast.metaflow.outside import delete_model, load_model
from holdfast.metaflow.places import MODELS, Root
from holdfast.metaflow.reading import Reading
from holdfast.metaflow.task import VARIABLE
from tests.metaflow.tasks import contents, in_bucket, task, written
from tests.support.servers import service


@pytest.fixture(params=["folder", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Root:
    if request.param == "s3":
        return in_bucket(request.getfixturevalue("s3"))
    return Root(str(tmp_path / "ds"))


@pytest.fixture(autouse=True)
def of_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`load_model` and `delete_model` are called as in a program that a task has started."""
    told = {"root": {"url": str(tmp_path / "ds"), "query": ""}}
    monkeypatch.setenv(VARIABLE, json.dumps(told))


def models(root: Root, **options: Any) -> CurrentModel:
    return CurrentModel(task(root, **{"writer": MODELS, **options}))


def run_of(reference: dict[str, Any]) -> str:
    return reference["url"].rpartition("@")[0]


def packs(reference: dict[str, Any]) -> int:
    return len(list(Path(run_of(reference), "packs").iterdir()))


def test_models_are_kept_apart_from_checkpoints_and_cross(root: Root, tmp_path: Path) -> None:
    fit = task(root, keep="last=1")
    checkpoint, model = CurrentCheckpoint(fit), models(root)
    kept = [
        model.save(written(tmp_path / "x", weights=str(n) * 5000), f"m {n}", {"loss": n})
        for n in range(3)
    ]
    for n in range(3):
        saved = checkpoint.save(written(tmp_path / "x", weights=f"checkpoint {n}"))
    assert checkpoint.list() == [saved]
    assert [each.key for each in task(root, attempt=1).to_go_on_from("fresh")] == [saved["key"]]
    assert fit.saved_by("Train/7/fit") == fit.list()

    # By each means what the other has saved.
    loaded = model.load(saved)
    assert contents(Path(loaded)) == {"weights": "checkpoint 2"}
    assert contents(Path(model.load(kept[0]["key"]))) == {"weights": "0" * 5000}
    assert set(model.loaded) == set(model.loaded.info) == {saved["key"], kept[0]["key"]}
    checkpoint.load(kept[1])
    assert contents(Path(checkpoint.directory)) == {"weights": "1" * 5000}
    assert checkpoint.info is not None
    assert checkpoint.info.metadata == {"loss": 1}
    into = written(tmp_path / "into", weights="old", mine="stays")
    assert model.load(kept[2], into) == str(into)
    assert contents(into) == {"weights": "2" * 5000, "mine": "stays"}

    # Of a model, everything that `metaflow-checkpoint` tells, and that it is one.
    assert kept[0]["type"] == "model"
    assert kept[0]["label"] == kept[0]["name"] == "m 0"
    assert len({each["model_uuid"] for each in kept}) == 3
    assert saved["type"] == "checkpoint"

    model.loaded.cleanup(saved["key"])
    assert not Path(loaded).exists()
    with pytest.raises(KeyError):
        model.loaded[saved["key"]]
    model.loaded.cleanup(kept[2]["key"])  # whose folder is somebody else's
    assert contents(into) == {"weights": "2" * 5000, "mine": "stays"}
    model.finish()
    checkpoint.finish()
    assert not any(path and Path(path).exists() for path in model.loaded.values())


def test_what_a_task_has_saved_is_found_by_its_pathspec(root: Root, tmp_path: Path) -> None:
    saved: list[str] = []
    of_tasks: list[dict[str, Any]] = [
        {},
        {"foreach": (1,)},
        {"run": "8", "origin": "7"},
        {"run": "9"},
    ]
    for options in of_tasks:
        fit = CurrentCheckpoint(task(root, **options))
        saved.append(fit.save(written(tmp_path / "x", a=str(options)))["key"])
        fit.finish()

    def found(pathspec: str) -> list[str]:
        return [each["key"] for each in CurrentCheckpoint(task(root)).list(task=pathspec)]

    assert found("Train") == saved[::-1]
    assert found("Train/7") == saved[1::-1]
    assert found("Train/7/fit") == saved[1::-1]
    assert found("Train/8/fit/2") == saved[2:3]
    for nothing in ("Other", "Train/6", "Train/7/end", "Train/7/fit/3"):
        assert found(nothing) == []
    for wrong in ("", "Train//fit", "Train/7/fit/2/0"):
        with pytest.raises(UsageError, match="names no task"):
            found(wrong)


def test_equal_models_are_stored_once(tmp_path: Path) -> None:
    model = models(Root(str(tmp_path / "ds")))
    source = written(tmp_path / "x")
    (source / "weights").write_bytes(os.urandom(1 << 20))
    saved = [model.save(source, label=str(n)) for n in range(5)]
    model.finish()
    files = [path for path in Path(run_of(saved[0])).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1.1 * (1 << 20)


def test_a_model_is_deleted_and_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also the newest and the last one; a task that saves goes on; who comes later is no heir."""
    root = Root(str(tmp_path / "ds"))
    model = models(root)
    source = written(tmp_path / "x", weights="same" * 1000)
    first, newest = model.save(source), model.save(source)
    before = packs(first)
    assert delete_model(newest) is True
    with pytest.raises(CheckpointNotFound, match=r"Train_fit.* is gone"):
        load_model(newest, tmp_path / "gone")
    with caplog.at_level(logging.WARNING):
        assert delete_model(newest) is False
    assert f"{newest['key']} is gone already: nothing is deleted" in caplog.text
    load_model(first, tmp_path / "first")

    assert delete_model(first) is True
    assert packs(first) < before
    again = model.save(source)  # of which nothing that is stored can be used
    model.finish()
    load_model(again, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "first") == contents(source)
    assert delete_model(again) is True
    assert packs(again) == 0
    assert delete_model(again) is False  # of a run that has none left
    with pytest.raises(CheckpointNotFound, match="is gone"):
        load_model(again, tmp_path / "gone")

    retried = models(root, attempt=1)
    heir = retried.save(written(tmp_path / "x", weights="another"))
    retried.finish()
    assert heir["version_id"] == first["version_id"]
    for gone in (first, newest, again):
        assert delete_model(gone) is delete_model(gone["key"]) is False
        for reference in (gone, gone["key"]):
            with pytest.raises(CheckpointNotFound):
                load_model(reference, tmp_path / "gone")
    assert contents(tmp_path / "gone") == {}
    load_model(heir, tmp_path / "heir")
    assert contents(tmp_path / "heir") == {"weights": "another"}


def test_a_checkpoint_is_deleted_and_its_number_means_no_other(tmp_path: Path) -> None:
    fit = CurrentCheckpoint(task(tmp_path / "ds"))
    saved = fit.save(written(tmp_path / "x", a="1"))
    fit.finish()
    assert delete_model(saved) is True
    fit = CurrentCheckpoint(task(tmp_path / "ds", attempt=1))
    heir = fit.save(written(tmp_path / "x", a="2"))
    fit.finish()
    assert heir["key"] == saved["key"]
    with pytest.raises(CheckpointNotFound, match="is gone"):
        load_model(saved, tmp_path / "into")
    assert delete_model(saved) is False
    load_model(heir, tmp_path / "into")
    assert contents(tmp_path / "into") == {"a": "2"}


def test_what_is_held_back_or_not_there_is_not_deleted(tmp_path: Path) -> None:
    model = models(Root(str(tmp_path / "ds")))
    saved = model.save(written(tmp_path / "x", a="1"))
    model.finish()
    with Listing(run_of(saved)) as listing:
        listing.pin(saved["version_id"])
        with pytest.raises(CheckpointProtected, match="pinned"):
            delete_model(saved)
        listing.unpin(saved["version_id"])
    (tmp_path / "ds").rename(tmp_path / "away")
    with pytest.raises(NoStore, match="has moved, give the `key`"):  # it has lost nothing
        delete_model(saved)
    with pytest.raises(NoStore, match="has moved, give the `key`"):
        load_model(saved, tmp_path / "into")
    moved = Reading(Root(str(tmp_path / "away")))
    moved.load(moved.find(saved["key"]), tmp_path / "into")
    (tmp_path / "away").rename(tmp_path / "ds")
    assert delete_model(saved) is True


@pytest.mark.parametrize(
    "reference", [None, "", "x", 7, {}, {"key": "x"}, {"type": "model"}, {"key": "mf.holdfast/x"}]
)
def test_what_names_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: object
) -> None:
    monkeypatch.chdir(tmp_path)
    for use in (delete_model, lambda each: load_model(each, "into"), models(Root("ds")).load):
        with pytest.raises(ValueError, match="no checkpoint") as error:
            use(reference)
        assert isinstance(error.value, UsageError)
    with pytest.raises(ValueError, match="folder"):
        load_model({}, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "reference",
    [
        "mf.models/models/artifacts/Fit_start_0123",
        {"type": "checkpoint", "key": "mf.huggingface_hub/checkpoints/artifacts/F/s/0/1/a.0.b.0"},
    ],
)
def test_what_another_extension_has_saved_needs_it(tmp_path: Path, reference: object) -> None:
    """With it installed: tests/metaflow/test_installed.py."""
    for use in (delete_model, lambda each: load_model(each, tmp_path)):
        with pytest.raises(UsageError, match="metaflow-checkpoint has saved this, and is not ins"):
            use(reference)


def test_damage_is_noticed_and_nothing_is_loaded(tmp_path: Path) -> None:
    fit = task(tmp_path / "ds", writer=MODELS)
    model = CurrentModel(fit, temp_dir_root=str(tmp_path / "temporary"))
    saved = model.save(written(tmp_path / "x", a="1" * 1000))
    [pack] = Path(run_of(saved), "packs").iterdir()
    data = bytearray(pack.read_bytes())
    data[-1] ^= 1
    pack.write_bytes(data)
    into = written(tmp_path / "into", a="old")
    with pytest.raises(CorruptionError):
        model.load(saved, into)
    assert contents(into) == {"a": "old"}
    with pytest.raises(CorruptionError):
        model.load(saved)
    with pytest.raises(CorruptionError):  # damaged is not missing
        model.load_attributes(SimpleNamespace(m=saved), [("m", None)], best_effort=True)
    assert dict(model.loaded) == {}
    assert list((tmp_path / "temporary").iterdir()) == []
    assert delete_model(saved) is True
    model.finish()


def test_writers_never_meet_and_an_older_attempt_saves_no_more(tmp_path: Path) -> None:
    root = Root(str(tmp_path / "ds"))
    source = written(tmp_path / "x", a="1")
    nodes = [models(root, rank=n, writer=f"{MODELS}-rank-{n}" if n else MODELS) for n in range(3)]
    saved = [node.save(source, f"node {n}") for n, node in enumerate(nodes)]
    later = models(root, attempt=1)
    saved.append(later.save(source, "later"))
    with pytest.raises(Fenced):
        nodes[0].save(source)
    loaded = later.load(saved[0])
    if not (child := os.fork()):
        try:
            load_model(later.save(source, "child"), tmp_path / "of child")
            later.finish()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert contents(Path(loaded)) == {"a": "1"}  # the child has ended, not the task
    for node in (later, *nodes[1:]):
        node.save(source)
        node.finish()
    assert len({each["key"] for each in saved}) == 4
    folders = {path.name.partition("-")[0] for path in Path(run_of(saved[0])).parent.iterdir()}
    assert folders == {MODELS}
    assert task(root).list() == []


def test_commands_show_models_and_prune_leaves_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Root(str(tmp_path / "ds"))
    fit, model = CurrentCheckpoint(task(root)), models(root)
    source = written(tmp_path / "x", a="1")
    saved = [model.save(source, f"model {n}") for n in range(3)]
    for _ in range(3):
        fit.save(source)
    fit.finish()
    model.finish()
    assert on_tasks("prune", root, "Train", ["--keep", "last=1"]) == 0
    said = capsys.readouterr().out
    assert "Removed 2 checkpoints, kept 1" in said
    assert MODELS not in said
    assert on_tasks("ls", root, "Train", run_id="7") == 0
    said = capsys.readouterr().out
    assert "fit/task of run 7, models" in said
    assert all(f"(model {n}, attempt 0)" in said for n in range(3))
    for each in saved:
        delete_model(each)
    for command in ("ls", "verify", "gc"):  # an empty list is no error
        assert on_tasks(command, root, "Train", step="fit") == 0


_LATER = """
import json, sys
from pathlib import Path
from metaflow import Checkpoint, delete_model, load_model
model, saved = json.loads(sys.argv[1])
for number, reference in enumerate((model, model["key"], saved, saved["key"])):
    load_model(reference, f"{number}")
[listed] = Checkpoint().list(task="Train/7/fit/2")
Checkpoint().load(listed, "4")
print(json.dumps([
    [Path(f"{number}", "a").read_text() for number in range(5)],
    [delete_model(model), delete_model(model["key"]), delete_model(saved["key"])],
]))
"""


def test_a_program_reaches_the_bucket_by_the_settings_of_metaflow(
    s3: service.Place, tmp_path: Path
) -> None:
    """Also where the server has another name than it had for the task that saved."""
    root = in_bucket(s3)
    model, fit = models(root), CurrentCheckpoint(task(root))
    references = json.dumps(
        [
            model.save(written(tmp_path / "x", a="model")),
            fit.save(written(tmp_path / "x", a="checkpoint")),
        ]
    )
    model.finish()
    fit.finish()
    told = subprocess.run(
        [sys.executable, "-c", _LATER, references.replace(s3.endpoint, "http://127.0.0.1:9")],
        cwd=tmp_path,
        env={
            **{name: value for name, value in os.environ.items() if name != VARIABLE},
            "METAFLOW_USER": "tester",
            "METAFLOW_DEFAULT_DATASTORE": "s3",
            "METAFLOW_DATASTORE_SYSROOT_S3": root.url,
            "METAFLOW_S3_ENDPOINT_URL": s3.endpoint,
        },
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    loaded, deleted = json.loads(told.splitlines()[-1])
    assert loaded == ["model", "model", "checkpoint", "checkpoint", "checkpoint"]
    assert deleted == [True, False, True]
