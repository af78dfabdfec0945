"""Trains in a loop of `current.checkpoint.run`, and tells each step. `--with checkpoint` must name
the attribute `history`. `ENDS` is how each attempt ends, in which step: "killed 5, raises 8"; those
after them come to their end."""

from __future__ import annotations

import os
import signal
import sys
import time

import numpy as np
from metaflow import FlowSpec, current, step
from telling import attempts, die, tell


class Looping(FlowSpec):
    @step
    def start(self):
        how, at = ending()
        run = current.checkpoint.run
        weights = np.zeros(4)
        run.track(weights=weights)
        tell(
            attempt=current.retry_count,
            resumed=run.resumed.step if run.resumed else None,
            history=getattr(self, "history", None),
            loaded=current.checkpoint.is_loaded,
            address=run.address,
        )
        self.history = []
        np.random.seed(7)
        for _ in run.epochs(3):
            order = np.random.permutation(12).reshape(4, 3)
            for batch in run.batches(list(order)):
                tell(step=run.step, batch=batch.tolist())
                weights += np.random.normal(size=4) * batch.sum()
                self.history = [*self.history, float(weights.sum())]
                if run.step == at:
                    end(how)
        self.weights = weights
        self.next(self.end)

    @step
    def end(self):
        tell(weights=self.weights.tolist(), history=self.history)


def ending():
    """Of this attempt, the first of which is the first that has told its number."""
    ends = [each.split() for each in os.environ.get("ENDS", "").split(",") if each]
    number = attempts()
    return (ends[number][0], int(ends[number][1])) if number < len(ends) else ("", -1)


def end(how):
    if how == "killed":
        current.checkpoint.run.manager.wait()
        die()
    if how == "raises":
        raise RuntimeError("told to fail")
    if how == "exits":
        sys.exit(3)
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGTERM)
    if how == "late":
        time.sleep(60)  # @timeout ends it


if __name__ == "__main__":
    Looping()
