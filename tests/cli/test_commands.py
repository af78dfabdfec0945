"""Each command on a real run: what it prints, what it returns, what it changes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import holdfast
from holdfast.cli import cli
from tests.cli.conftest import Command, failed, flip, same_error_as_json

ROOT = Path(__file__).resolve().parents[2]


# -- ls -----------------------------------------------------------------------


def test_ls(run: Path, holdfast_cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    # Room for an id of more than 8 characters: one that starts with digits only is longer.
    monkeypatch.setenv("COLUMNS", "100")
    done = holdfast_cli("ls", run)
    assert done.status == 0
    assert done.err == ""
    title, *rows, total = done.out.splitlines()
    assert title.split() == ["STEP", "SAVED", "SIZE", "NEW", "acc", "val_loss", "TAGS/NOTE", "ID"]
    assert re.fullmatch(r"4 checkpoints, [0-9.]+ KB stored\.", total)
    assert [row.split()[0] for row in rows] == ["400", "300", "200", "100"]
    assert "gold (every=100)" in rows[2]
    assert "pinned (every=100)" in rows[3]
    assert "0.231" in rows[2]
    assert "nan" in rows[0]
    assert all(len(row) <= 100 for row in (title, *rows))


def test_ls_json(run: Path, holdfast_cli: Command) -> None:
    value = holdfast_cli("ls", run, "--json").json
    assert value["ok"] is True
    assert value["run"] == str(run)
    assert [c["step"] for c in value["checkpoints"]] == [400, 300, 200, 100]
    assert value["checkpoints"][0]["odd_metrics"] == {"val_loss": "nan"}
    assert value["checkpoints"][2]["tags"] == ["gold"]
    assert value["checkpoints"][3]["pinned"] is True
    assert value["checkpoints"][0]["new_bytes"] < value["checkpoints"][0]["nbytes"]
    assert (value["finished"], value["writer"], value["best"]) == (False, None, {})
    packs = sum(pack.stat().st_size for pack in (run / "packs").iterdir())
    assert value["stored_bytes"] == packs


def test_ls_of_a_long_run(tmp_path: Path, holdfast_cli: Command) -> None:
    """The newest, older ones that are marked, and how many there are besides."""
    address = tmp_path / "long"
    with holdfast.CheckpointManager(address, keep=None) as ckpts:
        for step in range(1, 46):
            ckpts.save(step, {"x": step}, tags=("gold",) if step == 7 else ())
    done = holdfast_cli("ls", address)
    _, *rows, left, total = done.out.splitlines()
    assert [int(row.split()[0]) for row in rows] == [*range(45, 15, -1), 7]
    assert left == "… and 14 older (--all shows them)"
    assert total.startswith("45 checkpoints, ")
    _, *rows, total = holdfast_cli("ls", address, "--all").out.splitlines()
    assert [int(row.split()[0]) for row in rows] == [*range(45, 0, -1)]
    assert len(holdfast_cli("ls", address, "--json").json["checkpoints"]) == 45


def test_ls_says_what_the_run_is_doing(tmp_path: Path, holdfast_cli: Command) -> None:
    address = tmp_path / "runs" / "gpt"

    def listed() -> tuple[str, str]:
        last = holdfast_cli("ls", address).out.splitlines()[-1]
        return last.split("stored")[1], holdfast_cli("ls", address.parent).out.splitlines()[1]

    with holdfast.CheckpointManager(address, keep="best=1:acc:max") as manager:
        manager.save(1, {"x": 1}, metrics={"acc": 0.5}, note="best").result()
        me = f"process {os.getpid()} on "
        assert listed()[0].startswith(f"; {me}")
        assert listed()[0].endswith(" is writing it.")
        assert listed()[1].endswith("running")
    assert listed()[0] == "."
    assert "best:acc  " in holdfast_cli("ls", address).out, "and not the note (best), too"
    code = (
        "import os, signal, sys, holdfast\n"
        "holdfast.CheckpointManager(sys.argv[1], keep=None).save(2, {'x': 2}).result()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(address)], check=False)
    assert listed()[0] == "; its process is gone: start the job again."
    assert listed()[1].endswith("interrupted")
    with holdfast.CheckpointManager(address) as manager:
        manager.save(3, {"x": 3}, finished=True).result()
    assert listed()[0] == "; the run is finished."
    assert listed()[1].endswith("finished")


def test_ls_metric(run: Path, holdfast_cli: Command) -> None:
    title = holdfast_cli("ls", run, "--metric", "val_loss").out.splitlines()[0]
    assert "val_loss" in title
    assert "acc" not in title


def test_ids_that_ls_prints_are_references(run: Path, holdfast_cli: Command) -> None:
    for row in holdfast_cli("ls", run).out.splitlines()[1:-1]:
        step, id = row.split()[0], row.split()[-1]
        assert holdfast_cli("show", f"{run}@{id}", "--json").json["checkpoint"]["step"] == int(step)


def test_ls_of_a_folder_lists_its_runs(run: Path, holdfast_cli: Command) -> None:
    with holdfast.CheckpointManager(run.parent / "deep" / "gpt") as other:
        other.save(7, {"x": 1}, finished=True).result()
    (run.parent / "no-run").mkdir()
    done = holdfast_cli("ls", run.parent)
    title, *rows, total = done.out.splitlines()
    assert title.split() == ["RUN", "KEPT", "STEP", "SAVED", "SIZE", "STATE"]
    assert [row.split()[:3] for row in rows] == [["deep/gpt", "1", "7"], ["mnist", "4", "400"]]
    assert rows[0].endswith("finished")
    assert total == f"2 runs in {run.parent}"
    value = holdfast_cli("ls", run.parent.parent, "--json").json
    assert [(r["run"], r["checkpoints"], r["finished"]) for r in value["runs"]] == [
        (str(run.parent / "deep" / "gpt"), 1, True),
        (str(run), 4, False),
    ]
    assert value["runs"][1]["latest"]["step"] == 400


def test_ls_without_an_argument_looks_here(
    run: Path, holdfast_cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    [listed] = holdfast_cli("ls", "--json").json["runs"]
    assert listed["checkpoints"] == 4
    monkeypatch.chdir(run)
    assert holdfast_cli("ls", "--json").json["run"] == "."


def test_a_damaged_run_does_not_hide_the_others(run: Path, holdfast_cli: Command) -> None:
    bad = run.parent / "bad"
    with holdfast.CheckpointManager(bad) as other:
        other.save(1, {"x": 1}).result()
    for entry in (bad / "log").iterdir():
        flip(entry, 100)
    done = holdfast_cli("ls", run.parent)
    assert done.status == 0
    _, broken, whole, _ = done.out.splitlines()
    assert broken.startswith("bad ")
    assert "no entry of the log of" in broken
    assert whole.startswith("mnist ")
    listed = holdfast_cli("ls", run.parent, "--json").json["runs"]
    assert listed[0]["exit_code"] == 4
    assert listed[1]["checkpoints"] == 4


def test_nothing_there(tmp_path: Path, holdfast_cli: Command) -> None:
    for words in (
        ["ls", tmp_path],
        ["ls", tmp_path / "none"],
        ["show", tmp_path],
        ["verify", tmp_path],
        ["restore", tmp_path, tmp_path / "out"],
        ["prune", tmp_path, "--keep", "last=1"],
        ["diff", tmp_path, tmp_path],
        ["export", tmp_path, tmp_path / "out"],
        ["tag", tmp_path, "gold"],
        ["tag", tmp_path, "gold", "--delete"],
        ["pin", tmp_path],
        ["rm", f"{tmp_path}@1"],
    ):
        assert "no checkpoint in" in failed(holdfast_cli(*words), 10)
        assert "ls FOLDER" in same_error_as_json(holdfast_cli, *words)["hint"]
    assert list(tmp_path.iterdir()) == [], "looking creates nothing"


# -- show ---------------------------------------------------------------------


def test_show(run: Path, holdfast_cli: Command) -> None:
    done = holdfast_cli("show", f"{run}@best:val_loss")
    assert done.status == 0
    page = done.out
    assert page.splitlines()[0] == f"{run}@200: step 200"
    assert "acc 0.81, val_loss 0.231" in page
    assert "gold" in page
    for line in page.splitlines():
        if line.startswith("model "):
            assert line.split() == ["model", "2", "40.1", "KB", "F32,", "F64"]
            break
    else:
        pytest.fail(page)
    assert "\nvalues\n  epoch: 2\n  box.best: 0.5\n  box.history: 1, 2\n" in page
    assert "  data.seed: 0" in page
    assert "  argv: train.py, --fast" in page


def test_show_leaves(run: Path, holdfast_cli: Command) -> None:
    page = holdfast_cli("show", run, "--leaves").out
    [row] = [line for line in page.splitlines() if line.startswith("model/w ")]
    assert row.split() == ["model/w", "F32", "[8,", "4]", "128", "B"]
    assert "~" not in page, "random states are no part of the state"


def test_show_json(run: Path, holdfast_cli: Command) -> None:
    value = holdfast_cli("show", f"{run}@100", "--json", "--leaves").json
    assert value["ok"] is True
    assert value["checkpoint"]["step"] == 100
    assert [part["name"] for part in value["state"]] == ["model", "counts", "epoch", "box"]
    assert value["state"][0] == {
        "name": "model",
        "leaves": 2,
        "nbytes": 40128,
        "dtypes": ["F32", "F64"],
    }
    assert value["state"][2]["value"] == 1
    assert value["config"] == {"lr": 0.1, "layers": [2, 3], "data": {"seed": 0}}
    assert value["environment"]["python"] == "3.11.7"
    assert {leaf["path"] for leaf in value["leaves"]} == {"model/w", "model/frozen", "counts"}


@pytest.mark.parametrize(
    ("selector", "status", "says"),
    [
        ("999", 1, "no checkpoint at step 999"),
        ("silver", 1, "has the tag 'silver'"),
        ("best", 2, "does not say by which metric"),
        ("best:acc", 2, "does not say whether higher or lower is better"),
        ("a b", 2, "names no checkpoint"),
    ],
)
def test_show_what_is_not_there(
    run: Path, holdfast_cli: Command, selector: str, status: int, says: str
) -> None:
    assert says in failed(holdfast_cli("show", f"{run}@{selector}"), status)
    error = same_error_as_json(holdfast_cli, "show", f"{run}@{selector}")
    if status == 1:
        assert "steps 100, 200, 300, 400; tags gold; metrics acc, val_loss" in error["hint"]


# -- verify -------------------------------------------------------------------


def test_verify_intact(run: Path, holdfast_cli: Command) -> None:
    done = holdfast_cli("verify", run)
    assert done.status == 0
    assert done.out.count("intact") == 5
    assert done.out.endswith("4 checkpoints verified, all intact.\n")
    value = holdfast_cli("verify", f"{run}@gold", "--json").json
    assert value["ok"] is True
    [checkpoint] = value["checkpoints"]
    assert checkpoint["step"] == 200
    assert checkpoint["intact"] is True
    assert checkpoint["problems"] == []
    assert checkpoint["bytes_read"] >= 40_000


def test_verify_names_what_is_damaged(run: Path, holdfast_cli: Command) -> None:
    newest = max((run / "packs").iterdir(), key=lambda pack: pack.name)
    manifest = holdfast_cli("show", f"{run}@400", "--json").json["checkpoint"]["id"]
    for pack in (run / "packs").iterdir():
        if manifest and holdfast_cli("verify", f"{run}@400").status == 0:
            data = pack.read_bytes()
            at = data.find(np.float32(400).tobytes() * 4)
            if at >= 0:
                newest = pack
                flip(pack, at)
    done = holdfast_cli("verify", run)
    assert "1 of 4 checkpoints in" in failed(done, 4)
    assert f"holdfast restore {run}@300 DIR" in done.err
    assert "DAMAGED" in done.out
    assert "'model/w'" in done.out
    assert newest.name in done.out
    value = same_error_as_json(holdfast_cli, "verify", run)
    assert [c["intact"] for c in value["checkpoints"]] == [True, True, True, False]
    assert holdfast_cli("verify", f"{run}@300").status == 0
    assert "1 of 1 checkpoint in" in failed(holdfast_cli("verify", f"{run}@latest"), 4)


def test_verify_a_lost_pack(run: Path, holdfast_cli: Command) -> None:
    for pack in (run / "packs").iterdir():
        pack.unlink()
    done = holdfast_cli("verify", run)
    assert "4 of 4 checkpoints" in failed(done, 4)
    assert "None of these is intact" in done.err
    assert done.out.count("packs/") >= 4


# -- restore ------------------------------------------------------------------


def test_restore(run: Path, tmp_path: Path, holdfast_cli: Command) -> None:
    out = tmp_path / "new" / "out"
    done = holdfast_cli("restore", f"{run}@gold", out)
    assert done.status == 0, done.err
    assert "every byte verified" in done.out
    assert sorted(p.name for p in out.iterdir()) == ["state.json", "state.safetensors"]
    tensors = load_file(out / "state.safetensors")
    assert np.array_equal(tensors["model/w"], np.full((8, 4), 200, np.float32))
    assert np.array_equal(tensors["model/frozen"], np.arange(5000.0))
    described = json.loads((out / "state.json").read_text())
    assert described["config"]["lr"] == 0.1
    assert [p.name for p in out.parent.iterdir()] == ["out"], "no scratch is left"


def test_restore_into_the_current_folder(
    run: Path, tmp_path: Path, holdfast_cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    before = here.stat().st_ino
    assert holdfast_cli("restore", run, ".").status == 0
    assert here.stat().st_ino == before, "a shell that stands here sees the files"
    assert sorted(os.listdir()) == ["state.json", "state.safetensors"]


def test_restore_json(run: Path, tmp_path: Path, holdfast_cli: Command) -> None:
    value = holdfast_cli("restore", run, tmp_path / "out", "--json").json
    assert value["ok"] is True
    assert value["checkpoint"]["step"] == 400
    assert {Path(f["path"]).name for f in value["files"]} == {"state.json", "state.safetensors"}
    assert all(Path(f["path"]).stat().st_size == f["nbytes"] for f in value["files"])


def test_restore_does_not_overwrite(run: Path, tmp_path: Path, holdfast_cli: Command) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert holdfast_cli("restore", f"{run}@100", out).status == 0, "an empty folder is fine"
    mine = out / "mine.txt"
    mine.write_text("mine")
    assert "is not empty" in failed(holdfast_cli("restore", f"{run}@200", out), 2)
    assert "--force" in same_error_as_json(holdfast_cli, "restore", f"{run}@200", out)["hint"]
    assert load_file(out / "state.safetensors")["model/w"][0, 0] == 100
    assert holdfast_cli("restore", f"{run}@200", out, "--force").status == 0
    assert load_file(out / "state.safetensors")["model/w"][0, 0] == 200
    assert mine.read_text() == "mine"
    assert sorted(p.name for p in out.iterdir()) == ["mine.txt", "state.json", "state.safetensors"]
    assert "is not a folder" in failed(holdfast_cli("restore", run, mine), 2)


def test_restore_force_puts_no_file_in_place_of_a_folder_or_behind_a_link(
    tmp_path: Path, holdfast_cli: Command
) -> None:
    tracked = tmp_path / "tracked.txt"
    tracked.write_text("content")
    with holdfast.CheckpointManager(tmp_path / "run") as manager:
        manager.save(1, {"f": holdfast.File(tracked)}).result()
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    out.mkdir()
    (out / "files").symlink_to(elsewhere)
    assert "is in the way" in failed(holdfast_cli("restore", tmp_path / "run", out, "--force"), 2)
    assert list(elsewhere.iterdir()) == []
    (out / "files").unlink()
    (out / "state.json").mkdir()
    assert "is in the way" in failed(holdfast_cli("restore", tmp_path / "run", out, "--force"), 2)
    (out / "state.json").rmdir()
    assert holdfast_cli("restore", tmp_path / "run", out, "--force").status == 0
    [file] = [p for p in (out / "files").rglob("*") if p.is_file()]
    assert file.read_text() == "content"


def test_restore_of_a_damaged_checkpoint_leaves_nothing(
    run: Path, tmp_path: Path, holdfast_cli: Command
) -> None:
    for pack in (run / "packs").iterdir():
        flip(pack, pack.stat().st_size - 1)
    out = tmp_path / "out"
    said = failed(holdfast_cli("restore", run, out), 4)
    assert "is damaged" in said
    assert f"holdfast verify {run}" in said  # which ones are not
    assert not out.exists()
    assert not list(tmp_path.glob(".holdfast-restore-*"))


def test_restore_into_a_place_that_cannot_be_written(
    run: Path, tmp_path: Path, holdfast_cli: Command
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    error = failed(holdfast_cli("restore", run, blocker / "out"), 1)
    assert str(blocker) in error


# -- all of them --------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_help_has_an_example_and_the_page_has_the_command(name: str, holdfast_cli: Command) -> None:
    done = holdfast_cli(name, "--help")
    assert done.status == 0
    assert "Examples:" in done.out
    assert f"\n    holdfast {name} " in done.out
    assert "--json" in done.out
    assert all(len(line) <= 80 for line in done.out.splitlines())
    page = (ROOT / "docs" / "cli.md").read_text()
    assert f"## `holdfast {name}" in page
    for option in cli.commands[name].params:
        for word in option.opts:
            if word.startswith("--"):
                assert f"`{word}" in page, word


def test_a_run_without_holdfast_json_is_listed(run: Path, holdfast_cli: Command) -> None:
    (run / "holdfast.json").unlink()
    done = holdfast_cli("ls", run.parent)
    assert done.status == 0
    assert done.out.splitlines()[1].split()[:3] == ["mnist", "4", "400"]
    assert "holdfast.json is missing" in done.err
    (run.parent / "other" / "log").mkdir(parents=True)  # a folder with logs is no run
    assert holdfast_cli("ls", run.parent).out.endswith("1 run in " + str(run.parent) + "\n")


def test_what_a_tag_or_a_pin_leaves_behind(run: Path, holdfast_cli: Command) -> None:
    holdfast_cli("tag", f"{run}@100", "paper")
    assert "its tag paper keeps it" in holdfast_cli("pin", f"{run}@100", "--release").out
    holdfast_cli("pin", f"{run}@200")
    assert "its pin keeps it" in holdfast_cli("tag", run, "gold", "--delete").out


def test_a_hostile_run_cannot_reach_the_terminal(tmp_path: Path, holdfast_cli: Command) -> None:
    hostile = "\x1b[31mloss\u202e\x07"
    with holdfast.CheckpointManager(tmp_path / "run") as manager:
        for step in (1, 2):
            manager.save(
                step,
                {hostile: np.zeros(3), "text": hostile},
                metrics={hostile: 0.5},
                note=hostile,
            ).result()
    for words in (
        ["ls", tmp_path / "run"],
        ["ls", tmp_path / f"none{hostile}"],
        ["show", tmp_path / "run", "--leaves"],
        ["show", f"{tmp_path}/run@best:nothing"],
        ["show", f"{tmp_path}/run@{hostile}"],
        ["verify", tmp_path / "run"],
        ["prune", tmp_path / "run", "--keep", f"best=1:{hostile}", "--dry-run"],
        ["prune", tmp_path / "run", "--keep", hostile],
        ["diff", f"{tmp_path}/run@1", f"{tmp_path}/run@2"],
        ["diff", f"{tmp_path}/run@1", f"{tmp_path}/none{hostile}", "--values"],
        ["doctor", tmp_path / "run"],
        ["doctor", tmp_path / f"none{hostile}"],
        ["gc", tmp_path / "run", "--dry-run"],
        ["gc", tmp_path / f"none{hostile}"],
        ["tag", tmp_path / "run", hostile],
        ["tag", tmp_path / "run", hostile, "--delete"],
        ["pin", tmp_path / "run", "--reason", hostile],
        ["rm", f"{tmp_path}/run@2", "--dry-run"],
        ["rm", f"{tmp_path}/run@{hostile}"],
        ["export", tmp_path / "run", tmp_path / f"out{hostile}", "--force"],
        ["export", tmp_path / "run", tmp_path / "out", "--only", hostile],
        [hostile],
        ["ls", f"--{hostile}"],
    ):
        for extra in ([], ["--json"]):
            done = holdfast_cli(*words, *extra)
            for line in (done.out + done.err).splitlines():
                assert line.isprintable(), (words, line)


def test_a_damaged_newest_entry_is_told_with_escapes(run: Path, holdfast_cli: Command) -> None:
    newest = max((run / "log").iterdir(), key=lambda entry: entry.name)
    flip(newest, newest.stat().st_size // 2)
    done = holdfast_cli("ls", run)
    assert done.status == 0
    assert done.err.startswith("Damage: ")
    assert newest.name in done.err


def test_a_damaged_log_is_told_in_lines_that_fit(
    run: Path, holdfast_cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    entries = sorted((run / "log").iterdir())
    for entry in entries[1:]:
        flip(entry, entry.stat().st_size // 2)
    said = holdfast_cli("ls", "mnist").err.splitlines()
    assert [line.split()[0] for line in said[1:4]] == [
        f"log/{entry.name}:" for entry in reversed(entries[-3:])
    ]
    assert said[4].strip() == f"and {len(entries) - 4} more"
    flip(entries[0], 100)
    said += failed(holdfast_cli("ls", "mnist"), 4).splitlines()
    assert all(len(line) <= 80 for line in said if not line.startswith("Hint: "))


def test_reading_needs_no_writable_store(run: Path, holdfast_cli: Command) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    for words in (["ls", run], ["show", run], ["verify", run], ["diff", run, run]):
        assert holdfast_cli(*words).status == 0
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before
    assert os.listdir(run.parent) == ["mnist"]
