"""`holdfast tag` and `holdfast pin`."""

from __future__ import annotations

import os
from pathlib import Path

import holdfast
from tests.cli.conftest import Command, failed, same_error_as_json, tidy


def listed(cli: Command, run: Path) -> dict[int, tuple[list[str], bool]]:
    return {
        c["step"]: (c["tags"], c["pinned"]) for c in cli("ls", run, "--json").json["checkpoints"]
    }


# -- tag ------------------------------------------------------------------------


def test_tag(run: Path, holdfast_cli: Command) -> None:
    done = holdfast_cli("tag", f"{run}@300", "paper-v1")
    assert (done.status, done.err) == (0, "")
    assert tidy(done.out, run) == "A@300 has the tag paper-v1 now.\n"
    again = holdfast_cli("tag", f"{run}@300", "paper-v1")
    assert tidy(again.out, run) == "A@300 has the tag paper-v1 already.\n"
    assert listed(holdfast_cli, run)[300] == (["paper-v1"], False)
    assert holdfast_cli("show", f"{run}@paper-v1", "--json").json["checkpoint"]["step"] == 300


def test_a_tag_moves_and_says_so(run: Path, holdfast_cli: Command) -> None:
    done = holdfast_cli("tag", run, "gold")
    assert tidy(done.out, run) == "A@400 has the tag gold now, which A@200 had before.\n"
    assert listed(holdfast_cli, run)[200] == ([], False)
    value = holdfast_cli("tag", f"{run}@100", "gold", "--json").json
    assert value["ok"] is True
    assert value["tag"] == "gold"
    assert value["checkpoint"]["step"] == 100
    assert value["checkpoint"]["tags"] == ["gold"]
    latest = holdfast_cli("show", run, "--json").json["checkpoint"]["id"]
    assert value["moved_from"] == latest
    assert holdfast_cli("tag", f"{run}@100", "gold", "--json").json["moved_from"] is None


def test_tag_delete(run: Path, holdfast_cli: Command) -> None:
    error = failed(holdfast_cli("tag", f"{run}@300", "gold", "--delete"), 1)
    assert "@300 has no tag 'gold'" in error
    assert f"holdfast tag {run} gold --delete" in error
    done = holdfast_cli("tag", f"{run}@200", "gold", "--delete")
    assert tidy(done.out, run) == "A@200 has lost the tag gold: the rules decide about it.\n"
    assert "has the tag 'gold'" in failed(holdfast_cli("tag", run, "gold", "--delete"), 1)
    holdfast_cli("tag", f"{run}@300", "gold")
    value = holdfast_cli("tag", run, "gold", "--delete", "--json").json
    assert (value["ok"], value["tag"], value["deleted"]) == (True, "gold", True)
    assert (value["checkpoint"]["step"], value["checkpoint"]["tags"]) == (300, [])


def test_names_that_are_no_tags(run: Path, holdfast_cli: Command) -> None:
    for name in ("41200", "best", "latest", "a b", "\x1b[31m", "abcd"):
        error = same_error_as_json(holdfast_cli, "tag", run, name)
        assert "cannot be a tag" in error["error"]
        assert error["exit_code"] == 2
    assert "no checkpoint at step" in failed(holdfast_cli("tag", f"{run}@7", "x-y"), 1)
    assert "no checkpoint in" in failed(holdfast_cli("tag", run.parent / "none", "x-y"), 10)
    assert os.listdir(run.parent) == ["mnist"]


# -- pin ------------------------------------------------------------------------


def test_pin_and_release(run: Path, holdfast_cli: Command) -> None:
    done = holdfast_cli("pin", f"{run}@300", "--reason", "used in the report")
    assert (done.status, done.err) == (0, "")
    assert tidy(done.out, run) == "A@300 is pinned: no rule removes it.\n"
    page = holdfast_cli("prune", run, "--keep", "last=1", "--dry-run").out
    assert "pinned: used in the report" in page
    value = holdfast_cli("pin", f"{run}@300", "--json").json
    assert (value["ok"], value["checkpoint"]["step"], value["checkpoint"]["pinned"]) == (
        True,
        300,
        True,
    )
    done = holdfast_cli("pin", f"{run}@300", "--release")
    assert tidy(done.out, run) == "A@300 is released: the rules decide about it.\n"
    done = holdfast_cli("pin", f"{run}@300", "--release")
    assert tidy(done.out, run) == "A@300 was not pinned.\n"
    assert (
        holdfast_cli("pin", f"{run}@100", "--release", "--json").json["checkpoint"]
        == (holdfast_cli("show", f"{run}@100", "--json").json["checkpoint"])
    )
    assert listed(holdfast_cli, run)[100] == ([], False)


def test_a_pin_of_a_forked_run_stays(run: Path, holdfast_cli: Command) -> None:
    with holdfast.CheckpointManager(run) as manager:
        manager.fork(300, run.parent / "child")
    done = holdfast_cli("pin", f"{run}@300", "--release")
    assert tidy(done.out, run) == "A@300 is still pinned: a forked run needs its data.\n"
    error = failed(holdfast_cli("pin", f"{run}@300", "--reason", "fork:x"), 2)
    assert "cannot start like a forked run's pin" in error


def test_pin_usage(run: Path, holdfast_cli: Command) -> None:
    words = ["pin", run, "--release", "--reason", "x"]
    assert "--release takes pins away" in failed(holdfast_cli(*words), 2)
    assert same_error_as_json(holdfast_cli, *words)["exit_code"] == 2


def test_marks_beside_a_live_writer(tmp_path: Path, holdfast_cli: Command) -> None:
    with holdfast.CheckpointManager(tmp_path / "run", keep="last=1") as manager:
        manager.save(1, {"x": 1}).result()
        assert holdfast_cli("tag", tmp_path / "run", "first-one").status == 0
        assert holdfast_cli("pin", tmp_path / "run").status == 0
        manager.save(2, {"x": 2}).result()
        manager.save(3, {"x": 3}).result()
    assert listed(holdfast_cli, tmp_path / "run") == {3: ([], False), 1: (["first-one"], True)}
