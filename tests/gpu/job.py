"""`python -m tests.gpu.job DEVICE FOLDER DIE_AT`: trains, and prints a digest of the end."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from pathlib import Path

import torch

import holdfast
from tests.gpu.checks import Net, Place, adam, copies


def main() -> None:
    device, folder, die_at = sys.argv[1:]
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    place = Place(torch.device(device))
    model = Net(place)
    optimizer = adam()(model.parameters())
    with holdfast.Run(Path(folder), every=2, keep="last=3") as run:
        run.track(model=model, optimizer=optimizer)
        for n in run.range(20):
            if n + 1 == int(die_at):
                run.manager.wait()
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.zero_grad()
            model.loss().backward()
            optimizer.step()
    digest = hashlib.sha256()
    for part in copies(model, optimizer):
        for name, value in sorted(part.items()):
            digest.update(name.encode())
            digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    print(digest.hexdigest()[:16])


if __name__ == "__main__":
    main()
