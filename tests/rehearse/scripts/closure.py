"""What a closure counts is not tracked. `inner` is, in `outer`: where it differs, it follows."""

import numpy as np

import holdfast


class Outer:
    def __init__(self, inner):
        self.inner = inner

    def state_dict(self):
        return {"inner": self.inner.copy()}

    def load_state_dict(self, state):
        self.inner[:] = state["inner"]


def counting():
    count = 0

    def more():
        nonlocal count
        count += 1
        return count

    return more


inner = np.zeros(3)
outer = Outer(inner)
count = counting()
run = holdfast.Run("runs/closure")
run.track(outer=outer)
for _step in run.range(100):
    inner += count()
    run.log(loss=float(inner.sum()))
