"""Two branches with checkpoints, merged; what one has saved is loaded in a later step."""

from __future__ import annotations

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


if __name__ == "__main__":
    Branches()
