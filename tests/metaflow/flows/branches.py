"""Two branches with checkpoints, merged; what one has saved is loaded in a later step, which
starts a program that saves, too."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from metaflow import FlowSpec, checkpoint, current, step
from telling import tell


def save(flow, name):
    file = Path(current.checkpoint.directory, "name")
    for count in range(2):
        file.write_text(f"{name} {count}")
        reference = current.checkpoint.save(name=name, latest=count == 0)
    flow.common = 7
    return reference


PROGRAM = """
from pathlib import Path
from metaflow import Checkpoint
own = Checkpoint()
Path(own.directory, "name").write_text("program")
own.save(None, {"shard": 3}, name="of a program")  # in the order of metaflow-checkpoint
print(len(own.list()), own.task_identifier, own.directory)
"""


class Branches(FlowSpec):
    @step
    def start(self):
        self.next(self.left, self.right)

    @checkpoint
    @step
    def left(self):
        self.of_left = save(self, "left")
        self.next(self.joined)

    @checkpoint
    @step
    def right(self):
        self.of_right = save(self, "right")
        self.next(self.joined)

    @step
    def joined(self, inputs):
        self.merge_artifacts(inputs)
        tell(common=self.common)
        self.next(self.end)

    @checkpoint
    @step
    def end(self):
        with tempfile.TemporaryDirectory() as folder:
            current.checkpoint.load(self.of_left, folder)
            tell(loaded=Path(folder, "name").read_text())
        own = current.checkpoint.save(name="of the task")
        out = subprocess.run(
            [sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True
        ).stdout
        listed = current.checkpoint.list()
        current.checkpoint.load(listed[0])
        tell(
            program=out.split(),
            listed=[each["name"] for each in listed],
            metadata=listed[0]["metadata"],
            loaded=Path(current.checkpoint.directory, "name").read_text(),
            own=own == listed[1],
        )


if __name__ == "__main__":
    Branches()
