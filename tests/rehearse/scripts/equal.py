"""All is tracked: shuffled data, noise, an epoch's prologue and tail, a box, a clock."""

import random
import time

import numpy as np

import holdfast

random.seed(1)
noise = np.random.default_rng(2)
weights = np.zeros(3)
data = [np.full(3, float(number)) for number in range(7)]

with holdfast.Run("runs/equal") as run:
    run.track(weights=weights, noise=noise)
    box = run.box(best=float("inf"), rate=0.5)
    for _epoch in run.epochs(10):
        began = time.perf_counter()
        order = random.sample(data, len(data))
        for item in run.batches(order):
            weights += box.rate * (item - weights) + noise.normal(size=3) * random.random()
            run.log(loss=float(weights.sum()), seconds=time.perf_counter() - began)
        box.best = min(box.best, float(weights.sum()))
        box.rate *= 0.9
