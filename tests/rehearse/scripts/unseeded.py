"""Starts with other numbers each time, and is resumed exactly all the same."""

import numpy as np

import holdfast

weights = np.random.rand(3)
run = holdfast.Run("runs/unseeded")
run.track(weights=weights)
for _step in run.range(100):
    weights += np.random.rand(3)
    run.log(loss=float(weights.sum()))
