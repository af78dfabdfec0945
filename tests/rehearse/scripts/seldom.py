"""Wrong in one process of all, the second: as if by chance."""

import os
from pathlib import Path

import numpy as np

import holdfast

starts = Path(os.environ["STARTS"])
number = len(starts.read_text()) if starts.exists() else 0
starts.write_text("x" * (number + 1))
weights = np.zeros(1)
run = holdfast.Run("runs/seldom")
run.track(weights=weights)
for _step in run.range(100):
    weights += 1 + (number == 1)
    run.log(loss=float(weights[0]))
