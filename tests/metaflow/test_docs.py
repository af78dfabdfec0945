"""The page about Metaflow is true: its flow runs, and its tables name what there is."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import holdfast
from holdfast.metaflow.current import CurrentCheckpoint
from holdfast.metaflow.models import CurrentModel
from tests.metaflow.support import Metaflow
from tests.support.wheel import ROOT
from tests.test_docs import blocks

PAGE = ROOT / "docs" / "metaflow.md"


def section(heading: str) -> str:
    """What is below a heading, up to the next one."""
    _, _, text = PAGE.read_text().partition(f"\n## {heading}\n")
    assert text, heading
    return text.partition("\n## ")[0]


def named(table: str) -> set[str]:
    """What the first column of a table names: `save(path)` as "save"."""
    cells = re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)", cell)}


def flow(metaflow: Metaflow, name: str) -> str:
    """The page's flow of that name, written into the folder."""
    [block] = [each for each in blocks(PAGE) if (each.word, each.about) == ("flow", f"{name}.py")]
    (metaflow.folder / block.about).write_text(block.text)
    return str(metaflow.folder / name)


def test_resume_repeats_no_step_and_goes_on_inside_of_one(metaflow: Metaflow) -> None:
    script = flow(metaflow, "steps")
    failed = metaflow.run(script, "run", "--stop-at", "7", status=1).output
    assert "goes on after 0 numbers" in failed
    resumed = metaflow.run(script, "resume").output
    assert re.findall(r"/(\w+)/\d+ \(pid \d+\)\] Task is starting", resumed) == ["add", "end"]
    assert "goes on after 7 numbers" in resumed
    assert "total 55" in resumed


def test_the_flow_with_a_model_runs_and_the_notebook_after_it(metaflow: Metaflow) -> None:
    assert "0.1 0.2 0.3" in metaflow.run(flow(metaflow, "train")).output
    subprocess.run(
        [sys.executable, flow(metaflow, "notebook") + ".py"],
        cwd=metaflow.folder,
        env=metaflow.environment(),
        check=True,
    )
    assert (metaflow.folder / "baseline" / "weights").read_text() == "0.1 0.2 0.3"
    [run] = metaflow.folder.glob(".metaflow/mf.holdfast/Train/start/task/*/models")
    assert not list((run / "packs").iterdir())  # it was deleted at the end


def test_the_loop_runs(metaflow: Metaflow) -> None:
    assert re.search(r"\b3 epochs", metaflow.run(flow(metaflow, "loop")).output)
    [run] = metaflow.folder.glob(".metaflow/mf.holdfast/Train/start/task/*/loop")
    assert [info.step for info in holdfast.CheckpointManager(run).checkpoints()] == [150]


def test_the_flow_runs_and_the_commands_see_its_checkpoints(metaflow: Metaflow) -> None:
    script = flow(metaflow, "fit")
    assert re.search(r"weights \[", metaflow.run(script).output)
    [run] = metaflow.folder.glob(".metaflow/mf.holdfast/Fit/start/task/*/main")

    def holdfast(*command: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "holdfast", *command], capture_output=True, text=True, check=True
        ).stdout

    [shown] = [block.text for block in blocks(PAGE) if block.word == "shown"]
    listed = holdfast("ls", str(run), "--json")
    steps = [each["step"] for each in json.loads(listed)["checkpoints"]]
    assert (
        sorted(steps)
        == [18, 19, 20]
        == [int(n) for n in re.findall(r"^  (\d+)  \w{8} ", shown, re.M)]
    )
    last = "3 checkpoints verified, all intact."
    assert last in shown
    assert last in holdfast("verify", str(run))
    assert "epoch 20" in holdfast("show", f"{run}@best:loss")


def test_every_member_is_in_the_table() -> None:
    public = {name for name in vars(CurrentCheckpoint) if not name.startswith("_")}
    of_the_decorator = {"go_on", "go_on_from", "finish", "heed"}
    assert named(section("`current.checkpoint`")) == public - of_the_decorator


def tables(heading: str) -> list[str]:
    return section(heading).split("\n\n| ")[1:]


def test_every_option_is_in_the_table(metaflow: Metaflow) -> None:
    code = (
        "import json, metaflow\n"
        "decorators = (metaflow.checkpoint, metaflow.model)\n"
        "print(json.dumps([list(each.args[0].defaults) for each in decorators]))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=metaflow.folder,
        env=metaflow.environment(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    of_checkpoint, of_model = map(set, json.loads(told))
    assert named(section("Options of `@checkpoint`")) == of_checkpoint
    options, members = ("| " + table for table in tables("Models: `@model`"))
    assert named(options.partition("|---|")[2]) == of_model
    public = {*vars(CurrentModel), "loaded"} - {"load_attributes", "finish"}
    assert named(members.partition("|---|")[2]) == {n for n in public if not n.startswith("_")}
