"""What a task has saved is among its artifacts; what a program that it starts has saved, listed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.metaflow.support import Metaflow

# As in a notebook: a process of its own, with Metaflow's client.
_LOOK = """
import json
from metaflow import Flow
task = Flow("Branches").latest_run["left"].task
names = ("_task_checkpoints", "_task_latest_checkpoint", "of_left")
print(json.dumps([task[name].data for name in names]))
"""


def test_what_was_saved_is_told_and_is_not_in_the_way_of_a_merge(metaflow: Metaflow) -> None:
    metaflow.run("branches")
    *told, program = metaflow.told
    assert told == [{"common": 7}, {"loaded": "left 1"}]
    count, identifier, folder = program.pop("program")
    assert (count, identifier) == ("2", "end/task")
    assert not Path(folder).exists()  # removed when the program has ended
    assert program == {
        "listed": ["of a program", "of the task"],
        "metadata": {"shard": 3},
        "loaded": "program",
        "own": True,
    }
    states = metaflow.run("branches", "checkpoint", "ls").output
    assert "interrupted" not in states, "the program has not closed its run"
    out = subprocess.run(
        [sys.executable, "-c", _LOOK],
        env=metaflow.environment(),
        cwd=metaflow.folder,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    saved, latest, of_left = json.loads(out.splitlines()[-1])
    assert [each["version_id"] for each in saved] == [1, 2]
    assert saved[1] == of_left
    assert latest == saved[0]  # the other one was saved with latest=False
