"""`@model`, `load_model`, `delete_model` and `Checkpoint()` in flows, and in programs later."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.metaflow.support import Metaflow


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.slow)])
def flows(request: pytest.FixtureRequest) -> Metaflow:
    return request.getfixturevalue("metaflow" if request.param == "folder" else "metaflow_on_s3")


# What a task of another flow, which has started this one, leaves in the environment.
_OUTER = {"pathspec": "Outer/1/start/1", "root": {"url": "/nowhere", "query": ""}}

# As in a notebook: no flow runs, and what it is told is in Metaflow's settings.
_LATER = """
import json, os, sys, tempfile
from pathlib import Path
from metaflow import Checkpoint, Flow, delete_model, load_model
run = Flow("Modelling").latest_run
told = {}
trained, part = run["joined"].task.data.trained, run["joined"].task
for how, reference in {"dict": trained, "key": trained["key"]}.items():
    load_model(reference, how)
    told[how] = Path(how, "weights").read_text()
with Checkpoint() as own:
    listed = own.list(task=run["joined"].task)
    own.load(listed[0])
    told["listed"] = [len(listed), Path(own.directory, "part").read_text()]
    told["stored"] = len(run["start"].task["_task_stored_models"].data)
    told["of_run"] = len(own.list(task=run.pathspec))
    folder = own.directory
told["folder"] = os.path.exists(folder)
told["refused"] = []
for use in (lambda: own.save("dict"), own.list, lambda: own.task_identifier):
    try:
        use()
    except ValueError as error:
        told["refused"].append(str(error).partition("\\n")[0])
told["deleted"] = [delete_model(trained), delete_model(trained["key"])]
print(json.dumps(told))
"""


def _later(flows: Metaflow) -> dict[str, Any]:
    kind, root = (option.partition("=")[2] for option in flows.datastore or ("=local", "="))
    where = {
        "METAFLOW_DEFAULT_DATASTORE": kind,
        **({"METAFLOW_DATASTORE_SYSROOT_S3": root} if root else {}),
    }
    done = subprocess.run(
        [sys.executable, "-c", _LATER],
        env={**flows.environment(), **where},
        cwd=flows.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("is gone already: nothing is deleted") == 1
    return json.loads(done.stdout.splitlines()[-1])


def test_models_are_saved_loaded_and_deleted(flows: Metaflow) -> None:
    temporary = flows.folder / "temporary"
    temporary.mkdir()
    ran = flows.run("modelling", TMPDIR=str(temporary), HOLDFAST_METAFLOW_TASK=json.dumps(_OUTER))
    assert not list(temporary.glob("model-*")), "folders are left"
    attempt, weights = "attempt 1", {"weights": "attempt 1"}
    *parts, joined, end = flows.told
    assert sorted(parts, key=lambda each: each["part"]) == [
        {"part": index, "loaded": weights, "listed": True} for index in range(2)
    ]
    assert joined == {
        "deleted": [True, False],
        "model": {"part": "model 1"},
        "own": ["joined/task", True, {"epoch": 3}],
    }
    assert end == {
        "names": ["gone", "saved", "trained"],
        "trained": weights,
        "accuracy": 0.5,
        "saved": ["named", {"part": "checkpoint 1"}],
        "gone": None,
        "crossed": {"part": "model 1"},
        "called": weights,
    }
    assert "[@model] loaded 'saved': mf.holdfast/Modelling/part/task-1/" in ran.output
    assert "[@model] 'gone' is missing: 'part' of Modelling/" in ran.output

    later = _later(flows)
    saves, lists, identifies = later.pop("refused")
    assert saves == "outside of a task of a flow `Checkpoint()` cannot save"
    assert 'give `task="flow/run/step/task"`' in lists
    assert "has no task" in identifies
    assert later == {
        "dict": attempt,
        "key": attempt,
        "listed": [1, "model 1"],
        "of_run": 3,
        "stored": 2,
        "folder": False,
        "deleted": [True, False],
    }


def test_what_is_missing_fails_the_task_and_says_so(metaflow: Metaflow) -> None:
    output = metaflow.run("plain", "run", '--with=model:load=["absent"]', status=1).output
    assert "@model on step start: the flow has no attribute 'absent' here" in output
    assert "Traceback" not in output
    assert not metaflow.told


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("load=7", "load of @model on step end must be a name, or a list of names"),
        ("load=a b", "load of @model on step end must be a name, or a list of names"),
        ("best_effort_load=perhaps", "best_effort_load of @model on step end must be True"),
    ],
)
def test_what_cannot_be_is_refused_before_the_run(
    metaflow: Metaflow, options: str, said: str
) -> None:
    output = metaflow.run("plain", "run", f"--with=model:{options}", status=1).output
    assert said in " ".join(output.split())
    assert "Task is starting" not in output
