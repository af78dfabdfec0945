"""Cannot be resumed: what is tracked has another shape after the first epoch."""

import holdfast

layers = {"layer0": [0.0]}
run = holdfast.Run("runs/refused")
for epoch in run.epochs(10):
    if epoch == 1:
        run.track(more=[1.0])
    for _step in run.range(4):
        layers["layer0"][0] += 1
    run.track(layers=layers)
