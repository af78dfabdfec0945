"""Keeps its state in attributes: `--with checkpoint:attributes=epoch,weights` saves it, without a
file. Fails after the epoch `FAILS_AT`; `ALWAYS` or once. `ODD` is an attribute that cannot be saved:
a module's."""

from __future__ import annotations

import os

import numpy as np
from metaflow import FlowSpec, Parameter, current, step
from telling import tell


class Net:
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Carrying(FlowSpec):
    rate = Parameter("rate", default=0.5)
    constant = 3

    @step
    def start(self):
        checkpoint = current.checkpoint
        here = {name: vars(self)[name] for name in ("epoch", "weights") if name in vars(self)}
        tell(
            attempt=current.retry_count,
            loaded=checkpoint.is_loaded,
            epoch=here.get("epoch"),
            weights=here["weights"].tolist() if here else None,
            files=os.listdir(checkpoint.directory),
        )
        if not checkpoint.is_loaded:
            self.epoch, self.weights = 0, np.zeros(2)
        self.first = None
        while self.epoch < 6:
            self.epoch += 1
            self.weights = self.weights + [self.rate, self.epoch]
            self.odd = Net()
            saved = checkpoint.save(metadata={"epoch": self.epoch}, block=self.epoch % 2 == 0)
            self.first = self.first or saved
            if self.epoch == int(os.environ.get("FAILS_AT", 0)):
                if current.retry_count == 0 or os.environ.get("ALWAYS"):
                    raise RuntimeError("told to fail")
        tell(attributes=[each["attributes"] for each in checkpoint.list()])
        self.next(self.end)

    @step
    def end(self):
        epoch = self.epoch
        current.checkpoint.load(self.first)
        tell(epoch=epoch, unchanged=self.epoch == epoch, weights=self.weights.tolist())


if __name__ == "__main__":
    Carrying()
