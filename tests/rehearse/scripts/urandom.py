"""Not repeatable at all: noise from the operating system."""

import os

import numpy as np

import holdfast

weights = np.zeros(3)
run = holdfast.Run("runs/urandom")
run.track(weights=weights)
for _step in run.range(100):
    weights += np.frombuffer(os.urandom(3), np.uint8)
    run.log(loss=float(weights.sum()))
