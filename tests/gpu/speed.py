"""What a save holds a training loop up for, beside others."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import async_save

import holdfast
from tests.gpu.checks import Place

ROUNDS = 5


class Loop:
    """A loop that is bound by the device, with a model and its Adam of about `mib` in all."""

    def __init__(self, place: Place, mib: int) -> None:
        self.place = place
        self.width = width = 4096 if place.is_gpu else 1024
        self.batch = 256 if place.is_gpu else 8
        layer_nbytes = 3 * 4 * width * width  # with two moments
        layers = max(1, mib * 2**20 // layer_nbytes)
        self.model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
        self.model.to(place.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), fused=True)
        self.nbytes = layers * layer_nbytes

    def step(self) -> None:
        self.optimizer.zero_grad()
        x = torch.randn(self.batch, self.width, device=self.place.device)
        for _ in range(4):  # as with accumulated gradients
            self.model(x).square().mean().backward()
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


def table(place: Place, mib: int) -> str:
    loop = Loop(place, mib)
    for _ in range(3):
        loop.step()
    place.synchronize()
    steps = 6
    free = _timed(place, lambda: [loop.step() for _ in range(steps)])
    folder = Path(tempfile.mkdtemp(prefix="holdfast-gpu-"))
    lines = [
        f"state {loop.nbytes / 2**30:.2f} GiB, a step {free / steps * 1000:.0f} ms, "
        f"median of {ROUNDS}; seconds",
        f"{'':28}{'call':>9}{'lost by training':>18}{'until saved':>13}",
    ]
    try:
        savers = {
            "holdfast.Run": _Holdfast(loop, folder / "run"),
            "torch.save": _TorchSave(loop, folder / "torch.pt"),
            "DCP async_save": _Dcp(loop, folder / "dcp", pinned=False),
            "DCP, pinned and staged": _Dcp(loop, folder / "pinned", pinned=True),
        }
        rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in savers}
        for number in range(ROUNDS + 1):  # in turn; the first makes memory, and does not count
            for name, saver in list(savers.items()):
                place.synchronize()
                start = time.perf_counter()
                try:
                    saver.save(number)
                    call = time.perf_counter() - start
                    for _ in range(steps):
                        loop.step()
                    place.synchronize()
                    lost = time.perf_counter() - start - free
                    saver.wait()
                except Exception as error:
                    if isinstance(saver, _Holdfast):
                        raise
                    lines.append(f"{name:28}   failed: {type(error).__name__}: {error}")
                    del savers[name]
                    continue
                if number:
                    rows[name].append((call, lost, time.perf_counter() - start))
        for name, saver in savers.items():
            medians = [statistics.median(column) for column in zip(*rows[name], strict=True)]
            lines.append(f"{name:28}{medians[0]:9.3f}{medians[1]:18.3f}{medians[2]:13.3f}")
            saver.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return "\n".join(lines)


def _timed(place: Place, what: Callable[[], object]) -> float:
    start = time.perf_counter()
    what()
    place.synchronize()
    return time.perf_counter() - start


class _Holdfast:
    """As a Run does it: with the optimizer's hook as the barrier."""

    def __init__(self, loop: Loop, folder: Path) -> None:
        self._tracked = {"model": loop.model, "optimizer": loop.optimizer}
        self._manager = holdfast.CheckpointManager(folder, keep="last=1")
        from holdfast.torch.overlap import Barrier

        self._barrier = Barrier(self._manager.drain)
        self._barrier.watch(self._tracked)
        loop.step()  # so that it is trusted

    def save(self, number: int) -> None:
        protected = self._barrier.protected()
        self._manager.save(number, self._tracked, in_place=lambda source, path: protected(source))

    def wait(self) -> None:
        self._manager.wait()

    def close(self) -> None:
        self._barrier.close()
        self._manager.close()


class _TorchSave:
    """Written to the page cache alone: no fsync."""

    def __init__(self, loop: Loop, path: Path) -> None:
        self._loop, self._path = loop, path

    def save(self, number: int) -> None:
        torch.save(self._loop.state(), self._path)

    def wait(self) -> None: ...

    def close(self) -> None: ...


class _Dcp:
    def __init__(self, loop: Loop, folder: Path, *, pinned: bool) -> None:
        self._loop, self._folder = loop, folder
        self._future: Any = None
        options: Any = None
        if pinned:
            from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

            gpu = loop.place.is_gpu
            options = DefaultStager(
                StagingOptions(
                    use_pinned_memory=gpu,
                    use_shared_memory=False,
                    use_async_staging=gpu,
                    use_non_blocking_copy=gpu,
                )
            )
        self._stager = options

    def save(self, number: int) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        named = {} if self._stager is None else {"async_stager": self._stager}
        answer: Any = async_save(
            self._loop.state(), checkpoint_id=str(self._folder), no_dist=True, **named
        )
        staged = getattr(answer, "staging_completion", None)
        if staged is not None:
            staged.result()  # the next step would change what is being staged
        self._future = getattr(answer, "upload_completion", answer)

    def wait(self) -> None:
        self._future.result()

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()
