"""Keeps its state in attributes: `--with checkpoint:attributes=epoch,weights` saves it, without a
file. Fails after the epochs `FAILS_AT`."""

from __future__ import annotations

import os

import numpy as np
from metaflow import FlowSpec, Parameter, current, step
from telling import tell


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
        while self.epoch < 6:
            self.epoch += 1
            self.weights = self.weights + np.array([self.rate, self.epoch])
            checkpoint.save(metadata={"epoch": self.epoch}, block=self.epoch % 2 == 0)
            if str(self.epoch) in os.environ.get("FAILS_AT", "").split():
                raise RuntimeError("told to fail")
        tell(attributes=[each["attributes"] for each in checkpoint.list()])
        self.older = checkpoint.list(full_namespace=True)[-1]
        self.next(self.end)

    @step
    def end(self):
        epoch = self.epoch
        current.checkpoint.load(self.older)
        tell(epoch=epoch, unchanged=self.epoch == epoch, weights=self.weights.tolist())


if __name__ == "__main__":
    Carrying()
