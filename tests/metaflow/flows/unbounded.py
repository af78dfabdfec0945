"""A foreach whose number of tasks Metaflow does not know; a control task starts them. The
second one fails, but not in a run that resumes."""

from __future__ import annotations

from metaflow import FlowSpec, checkpoint, current, step, unbounded_test_foreach_internal
from metaflow.plugins import InternalTestUnboundedForeachInput
from telling import tell


class Unbounded(FlowSpec):
    @step
    def start(self):
        self.values = InternalTestUnboundedForeachInput(["a", "b"])
        self.next(self.fit, foreach="values")

    @checkpoint
    @unbounded_test_foreach_internal
    @step
    def fit(self):
        info = current.checkpoint.info
        tell(
            identifier=current.checkpoint.task_identifier,
            loaded=info.metadata["value"] if info else None,
        )
        current.checkpoint.save(metadata={"value": self.input})
        if self.input == "b" and current.origin_run_id is None:
            raise RuntimeError("told to fail")
        self.next(self.joined)

    @step
    def joined(self, inputs):
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    Unbounded()
