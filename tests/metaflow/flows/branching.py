"""Tasks of every kind that a step can have several of. Each saves who it is, then fails where it
should: `FAILS` names steps whose first attempts do, `DIES` those that always do."""

from __future__ import annotations

import os
from pathlib import Path

import numpy
from metaflow import FlowSpec, checkpoint, current, retry, step
from telling import tell


def work(step_name, who):
    """Tell what was loaded, and save."""
    file = Path(current.checkpoint.directory, "who")
    tell(
        step=step_name,
        who=who,
        attempt=current.retry_count,
        loaded=file.read_text() if current.checkpoint.is_loaded else None,
        identifier=current.checkpoint.task_identifier,
    )
    file.write_text(who)
    current.checkpoint.save()
    listed = current.checkpoint.list()
    assert {each["pathspec"].split("/")[2] for each in listed} == {step_name}, listed
    if step_name in os.environ.get("FAILS", "") and current.retry_count == 0:
        raise RuntimeError("told to fail")
    if step_name in os.environ.get("DIES", ""):
        raise RuntimeError("told to fail always")


class Branching(FlowSpec):
    @step
    def start(self):
        self.values = ["same", "same"]
        self.next(self.plain, foreach="values")

    @retry(times=1, minutes_between_retries=0)
    @checkpoint
    @step
    def plain(self):
        work("plain", f"{self.index}")
        self.next(self.joined)

    @step
    def joined(self, inputs):
        self.next(self.arrays)

    @step
    def arrays(self):
        self.arrays_made = [numpy.arange(3), numpy.ones((2, 2))]
        self.next(self.outer, foreach="arrays_made")

    @step
    def outer(self):
        self.position = self.index
        self.inner_values = [10, 20]
        self.next(self.inner, foreach="inner_values")

    @retry(times=1, minutes_between_retries=0)
    @checkpoint
    @step
    def inner(self):
        work("inner", f"{self.position}.{self.index}")
        self.next(self.inner_joined)

    @step
    def inner_joined(self, inputs):
        self.next(self.outer_joined)

    @step
    def outer_joined(self, inputs):
        self.round = 0
        self.next(self.loop)

    @retry(times=1, minutes_between_retries=0)
    @checkpoint
    @step
    def loop(self):
        self.round += 1
        work("loop", f"i{self.round - 1}")
        self.go = "again" if self.round < 3 else "done"
        self.next({"again": self.loop, "done": self.end}, condition="go")

    @step
    def end(self):
        pass


if __name__ == "__main__":
    Branching()
