"""Three nodes of one step. `SAVE` is which of them save: "control" or "all". The control node
fails once, and the others save on after they began, as an attempt that was given up would. Where
all save, each node of the second attempt waits until its list has what all have saved in it."""

from __future__ import annotations

import os
import time
from pathlib import Path

from metaflow import FlowSpec, checkpoint, current, load_model, model, parallel, retry, step
from telling import tell


def load(reference):
    load_model(reference, "loaded")
    return Path("loaded", "who").read_text()


def refused():
    """What `run` says in a step like this."""
    try:
        return repr(current.checkpoint.run)
    except Exception as error:
        return str(error)


class Gang(FlowSpec):
    @step
    def start(self):
        self.next(self.fit, num_parallel=3)

    @retry(times=1, minutes_between_retries=0)
    @model
    @checkpoint(attributes=["who"])
    @parallel
    @step
    def fit(self):
        rank = current.parallel.node_index
        file = Path(current.checkpoint.directory, "who")
        tell(
            rank=rank,
            attempt=current.retry_count,
            loaded=file.read_text() if current.checkpoint.is_loaded else None,
            key=current.checkpoint.info.key if current.checkpoint.is_loaded else None,
            identifier=current.checkpoint.task_identifier,
            who=vars(self).get("who"),
            refused=refused(),
        )
        self.saved, self.models = [], []
        if rank == 0 or os.environ["SAVE"] == "all":
            for count in range(3):
                self.who = f"{rank}: {count}"
                file.write_text(self.who)
                self.saved.append(current.checkpoint.save(metadata={"count": count}))
            self.models.append(current.model.save(file, label=f"node {rank}"))
        if rank == 0 and current.retry_count == 0:
            raise RuntimeError("told to fail")
        if os.environ["SAVE"] == "all" and current.retry_count == 1:
            listed, until = [], time.monotonic() + 30
            while len(listed) < 9 and time.monotonic() < until:
                time.sleep(0.05)
                listed = [each["rank"] for each in current.checkpoint.list(attempt=1)]
            tell(listed=sorted(listed))
        self.next(self.joined)

    @step
    def joined(self, inputs):
        keys = [each["key"] for node in inputs for each in node.saved]
        models = [each for node in inputs for each in node.models]
        tell(keys=keys, models={load(each): each["rank"] for each in models})
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    Gang()
