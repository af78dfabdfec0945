"""Uses what another extension has, `@model`, in the same step as a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

from metaflow import FlowSpec, checkpoint, current, model, step
from telling import tell


class Beside(FlowSpec):
    @model
    @checkpoint
    @step
    def start(self):
        folder = Path(current.checkpoint.directory)
        Path(folder, "weights").write_text("as trained")
        self.saved = current.checkpoint.save(metadata={"epoch": 1})
        self.trained = current.model.save(str(folder), label="trained")
        self.next(self.end)

    @model(load=["trained"])
    @checkpoint
    @step
    def end(self):
        current.checkpoint.load(self.saved)
        tell(
            model=os.listdir(current.model.loaded["trained"]),
            checkpoint=os.listdir(current.checkpoint.directory),
        )


if __name__ == "__main__":
    Beside()
