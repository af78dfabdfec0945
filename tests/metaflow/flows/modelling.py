"""Models, and what crosses: saved in a step with `@model` alone, which fails once after its first
save; with `@checkpoint` in either order; loaded by each means, also in a step without any."""

from __future__ import annotations

from pathlib import Path

from metaflow import (
    Checkpoint,
    FlowSpec,
    checkpoint,
    current,
    delete_model,
    load_model,
    model,
    retry,
    step,
)
from telling import tell


def contents(folder):
    return {path.name: path.read_text() for path in Path(folder).iterdir()}


class Modelling(FlowSpec):
    @retry(times=1, minutes_between_retries=0)
    @model
    @step
    def start(self):
        weights = Path("made", "weights")
        weights.parent.mkdir(exist_ok=True)
        weights.write_text(f"attempt {current.retry_count}")
        self.trained = current.model.save("made", label="trained", metadata={"accuracy": 0.5})
        current.model.load(self.trained)
        if current.retry_count == 0:
            raise RuntimeError("told to fail")
        self.alone = current.model.save(weights)
        self.numbers = [7, 7]
        self.next(self.part, foreach="numbers")

    @model(load="trained")
    @checkpoint
    @step
    def part(self):
        file = Path(current.checkpoint.directory, "part")
        file.write_text(f"checkpoint {self.index}")
        self.saved = current.checkpoint.save()
        file.write_text(f"model {self.index}")
        self.of_part = current.model.save(file, label="part")
        tell(
            part=self.index,
            loaded=contents(current.model.loaded["trained"]),
            listed=[each["key"] for each in current.checkpoint.list()] == [self.saved["key"]],
        )
        self.next(self.joined)

    @step
    def joined(self, inputs):
        self.merge_artifacts(inputs, exclude=["of_part", "saved"])
        self.gone, self.of_part = (each.of_part for each in inputs)
        self.saved = inputs[1].saved
        deleted = [delete_model(self.gone), delete_model(self.gone)]
        load_model(self.of_part["key"], "by key")
        own = Checkpoint()
        own.save("by key", {"epoch": 3})  # in the order of metaflow-checkpoint
        [listed] = own.list()
        tell(
            deleted=deleted,
            model=contents("by key"),
            own=[own.task_identifier, listed["pathspec"] == current.pathspec, listed["metadata"]],
        )
        self.next(self.end)

    @checkpoint
    @model(load=["trained", ("saved", "named"), ("gone", None)], best_effort_load=True)
    @step
    def end(self):
        current.checkpoint.load(self.of_part)
        loaded = current.model.loaded
        tell(
            names=sorted(loaded),
            trained=contents(loaded["trained"]),
            accuracy=loaded.info["trained"]["metadata"]["accuracy"],
            saved=[loaded["saved"], contents("named")],
            gone=loaded["gone"],
            crossed=contents(current.checkpoint.directory),
            called=contents(current.model.load(self.trained["key"])),
        )


if __name__ == "__main__":
    Modelling()
